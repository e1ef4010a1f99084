"""Grounds and colours of drawn pictures."""

import colorsys
from functools import partial

import numpy as np
from jaxtyping import Float
from PIL import Image

ROLES = 4  # colours of an object's parts


def noise_map(
    rng: np.random.Generator, height: int, width: int, rows: int, columns: int
) -> Float[np.ndarray, "height width"]:
    """Draw noise of variance 1 on a grid of rows x columns, and resize it to height x width."""
    coarse = rng.standard_normal((max(2, rows), max(2, columns)), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def hsv(h: float, s: float, v: float) -> Float[np.ndarray, " 3"]:
    """Return RGB from 0 to 255 of a hue (1: once around), saturation and value in [0, 1]."""
    return np.array(colorsys.hsv_to_rgb(h % 1, s, v), np.float32) * 255


def background_image(
    rng: np.random.Generator, kind: str, size: int
) -> Float[np.ndarray, "3 height width"]:
    """Draw a textured background of one kind; RGB in about [0, 255], not yet clipped."""
    axis = np.arange(size, dtype=np.float32) / size
    x, y = axis[None, :], axis[:, None]
    noise = partial(noise_map, rng, size, size)
    uniform = rng.uniform
    if kind == "grass":
        colour = hsv(uniform(0.2, 0.38), uniform(0.4, 0.8), uniform(0.35, 0.7))
        shade = 15 * noise(size // 4, size // 2) + 12 * noise(6, 6)
    elif kind == "sky":
        colour = hsv(uniform(0.53, 0.64), uniform(0.2, 0.6), uniform(0.7, 0.95))
        shade = (y - 0.5) * uniform(-70, 70) + np.maximum(26 * noise(6, 4), 0)
    elif kind == "water":
        colour = hsv(uniform(0.47, 0.65), uniform(0.5, 0.9), uniform(0.35, 0.7))
        ripple = np.sin(uniform(35, 70) * y + 1.8 * noise(5, 5))
        shade = 15 * ripple + 6 * noise(size // 4, size // 16)
    elif kind == "road":
        colour = np.full(3, uniform(70, 130), np.float32)
        line = np.abs(x - uniform(0.2, 0.8) + (y - 0.5) * uniform(-0.5, 0.5)) < 0.02
        shade = 12 * noise(size // 2, size // 2) + 110 * (line & ((y * 8) % 2 < 1.2))
    elif kind == "wall":
        colour = hsv(rng.random(), uniform(0.1, 0.45), uniform(0.45, 0.85))
        rows = y * rng.integers(5, 10)
        columns = x * (rows.max() // 2 + 1) + 0.5 * (rows.astype(int) % 2)
        shade = 6 * noise(size // 4, size // 4) - 34 * ((rows % 1 < 0.1) | (columns % 1 < 0.05))
    elif kind == "sand":
        colour = hsv(uniform(0.09, 0.14), uniform(0.25, 0.5), uniform(0.7, 0.92))
        shade = 9 * noise(size // 2, size // 2) + 8 * noise(4, 4)
    elif kind == "snow":
        colour = np.full(3, uniform(210, 240), np.float32) + np.float32([-6, -2, 0])
        shade = 9 * noise(4, 4) - 22 * (noise(size // 2, size // 2) > 1.3)
    else:  # railway: gravel, sleepers, two rails
        colour = hsv(uniform(0.03, 0.12), uniform(0.1, 0.3), uniform(0.4, 0.65))
        along, across = (x, y) if rng.random() < 0.5 else (y, x)
        offset, gauge = uniform(0.2, 0.6), uniform(0.15, 0.25)
        bed = (across > offset - 0.06) & (across < offset + gauge + 0.06)
        rails = (np.abs(across - offset) < 0.015) | (np.abs(across - offset - gauge) < 0.015)
        shade = 16 * noise(size // 3, size // 3) - 40 * (bed & ((along * 14) % 1 < 0.4))
        shade = np.where(rails, 85, shade)
    return colour[:, None, None] + np.broadcast_to(shade, (size, size)).astype(np.float32)
