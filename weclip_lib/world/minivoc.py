"""MiniVOC: drawn pictures with exact masks, image-level labels and captions, in VOC layout.

The pictures show twelve object classes on eight textured backgrounds. Each object has parts and
random colours, texture, light, pose and scale. Other objects and clutter can hide some of it. The
fields of `world.settings.World` set how difficult the pictures are for weak supervision. Every
process draws the same picture for the same `seed` and `index`.
"""

import colorsys
import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from tqdm import tqdm

from weclip_lib.labels import (
    IGNORE_INDEX,
    MINIVOC_BACKGROUNDS,
    MINIVOC_CLASSES,
)
from weclip_lib.storage.files import locked, whole
from weclip_lib.storage.pictures import write_mask
from weclip_lib.world.settings import World

Points = Float[np.ndarray, "_ 2"]
Part = tuple[Points, int]  # a polygon in the unit square [-1, 1], and the role of its colour

DRAWING_VERSION = 1  # to be raised when a change makes the same seed draw another picture
SUPERSAMPLE = 2
ROLES = 4
SPLIT_SEEDS = {"train": 1, "val": 2, "test": 3}  # settings.Pretraining has other seeds
TEMPLATES = (
    "a clean origami {}.",
    "a photo of {}.",
    "a picture of {}.",
    "an image of {}.",
    "a drawing of {}.",
    "there is {}.",
    "a scene with {}.",
    "{}.",
)
USUAL_BACKGROUND = {
    "aeroplane": "sky",
    "bird": "sky",
    "boat": "water",
    "bottle": "sand",
    "car": "road",
    "cat": "grass",
    "chair": "wall",
    "fish": "water",
    "person": "snow",
    "plant": "grass",
    "train": "railway",
    "tv": "wall",
}

_CIRCLE = np.stack([f(np.linspace(0, 2 * np.pi, 20, endpoint=False)) for f in (np.cos, np.sin)], 1)


@dataclass(frozen=True)
class Scene:
    """One drawn picture with its mask, classes, background and caption."""

    image: UInt8[np.ndarray, "height width 3"]
    mask: UInt8[np.ndarray, "height width"]  # class_id 0-C, IGNORE_INDEX on object borders
    classes: tuple[str, ...]  # names of the visible classes, in class order
    background: str
    caption: str


# --- shapes: unit square, y down, later parts lie over earlier ones --------------------------


def _ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> Points:
    cos, sin = np.cos(angle), np.sin(angle)
    return _CIRCLE * (rx, ry) @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def _box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)


def _polygon(*points: tuple[float, float]) -> Points:
    return np.array(points, float)


def _limb(x: float, y: float, length: float, width: float, angle: float) -> Points:
    """Return a bar that hangs from (x, y), turned by `angle` radians from straight down."""
    cos, sin = np.cos(angle), np.sin(angle)
    bar = _box(-width / 2, 0, width / 2, length)
    return bar @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def _wheels(xs: Iterable[float], y: float, radius: float) -> list[Part]:
    return [(_ellipse(x, y, r, r), role) for x in xs for r, role in ((radius, 2), (radius / 2, 3))]


def _aeroplane(rng: np.random.Generator) -> list[Part]:
    sweep, span = rng.uniform(0.1, 0.4), rng.uniform(0.5, 0.85)
    body = rng.uniform(0.13, 0.2)
    return [
        (_polygon((-0.05, 0), (0.28, 0), (0.1 - sweep, -span), (-0.1 - sweep, -span)), 1),
        (_polygon((-0.95, -0.5), (-0.75, -0.5), (-0.5, 0), (-0.92, 0)), 1),
        (_ellipse(0, 0, 0.97, body), 0),
        (_ellipse(0.72, -0.04, 0.12, 0.07), 3),
        *((_ellipse(x, -0.04, 0.05, 0.05), 3) for x in (-0.1, 0.12, 0.34)),
        (_polygon((-0.1, 0.03), (0.28, 0.03), (0.05 - sweep, span), (-0.15 - sweep, span)), 2),
    ]


def _bird(rng: np.random.Generator) -> list[Part]:
    lean, wing = rng.uniform(-0.45, -0.1), rng.uniform(-0.3, 0.5)
    return [
        (_polygon((-0.3, 0), (-0.97, rng.uniform(-0.1, 0.25)), (-0.88, 0.4), (-0.25, 0.25)), 1),
        (_limb(-0.05, 0.3, 0.5, 0.08, rng.uniform(-0.15, 0.1)), 2),
        (_limb(0.14, 0.3, 0.5, 0.08, rng.uniform(-0.1, 0.15)), 2),
        (_ellipse(0, 0.08, 0.55, 0.33, lean), 0),
        (_ellipse(0.47, -0.35, 0.25, 0.23), 0),
        (_polygon((0.65, -0.47), (1.0, -0.32), (0.65, -0.22)), 2),
        (_ellipse(-0.1, 0.05, 0.38, 0.17, lean + wing), 1),
        (_ellipse(0.53, -0.4, 0.06, 0.06), 3),
    ]


def _boat(rng: np.random.Generator) -> list[Part]:
    mast, jib = rng.uniform(0.75, 0.97), rng.uniform(0.5, 0.9)
    return [
        (_box(-0.05, -mast, 0.05, 0.4), 2),
        (_polygon((-0.09, -mast), (-0.09, 0.22), (-rng.uniform(0.55, 0.8), 0.22)), 1),
        (_polygon((0.09, -mast * jib), (0.09, 0.22), (rng.uniform(0.45, 0.7), 0.22)), 3),
        (_polygon((-0.97, 0.33), (0.97, 0.33), (0.6, 0.83), (-0.62, 0.83)), 0),
        (_polygon((-0.93, 0.4), (0.93, 0.4), (0.87, 0.52), (-0.86, 0.52)), 2),
    ]


def _bottle(rng: np.random.Generator) -> list[Part]:
    wide, neck = rng.uniform(0.26, 0.38), rng.uniform(0.09, 0.13)
    shoulder, top = rng.uniform(-0.3, 0.0), rng.uniform(0.1, 0.25)
    outline = [(-wide, shoulder), (-neck, shoulder - 0.32), (-neck, -0.85)]
    return [
        (_polygon(*outline, *((-x, y) for x, y in outline[::-1]), (wide, 0.96), (-wide, 0.96)), 0),
        (_box(-neck * 1.35, -0.97, neck * 1.35, -0.78), 2),
        (_box(-wide, top, wide, top + rng.uniform(0.3, 0.5)), 1),
        (_ellipse(0, top + 0.18, wide * 0.45, 0.11), 3),
    ]


def _car(rng: np.random.Generator) -> list[Part]:
    roof, rear, front = rng.uniform(-0.6, -0.4), rng.uniform(-0.5, -0.3), rng.uniform(0.15, 0.35)
    hull = [(-0.98, 0.05), (-0.7, -0.04), (0.6, -0.04), (0.98, 0.12), (0.98, 0.4), (-0.98, 0.4)]
    return [
        (_polygon((-0.68, 0), (rear, roof), (front, roof), (0.62, 0)), 0),
        (
            _polygon((-0.5, -0.04), (rear + 0.04, roof + 0.1), (-0.06, roof + 0.1), (-0.06, -0.04)),
            3,
        ),
        (_polygon((0.03, -0.04), (0.03, roof + 0.1), (front - 0.04, roof + 0.1), (0.44, -0.04)), 3),
        (_polygon(*hull), 0),
        (_box(-0.96, 0.17, 0.96, 0.24), 1),
        *_wheels((-0.55, 0.55), 0.4, rng.uniform(0.19, 0.25)),
    ]


def _cat(rng: np.random.Generator) -> list[Part]:
    tail = rng.uniform(-0.9, -0.5)
    legs = zip((-0.5, -0.26, 0.14, 0.36), rng.uniform(-0.15, 0.15, 4), strict=True)
    tail_points = ((-0.5, 0.32), (-0.95, tail + 0.3), (-0.98, tail), (-0.83, tail), (-0.42, 0.12))
    return [
        (_polygon(*tail_points), 1),
        *((_limb(x, 0.4, 0.52, 0.15, angle), 0) for x, angle in legs),
        (_ellipse(-0.1, 0.3, 0.56, 0.3), 0),
        *((_box(x, 0.03, x + 0.08, 0.4), 1) for x in (-0.35, -0.15, 0.05)),
        (_polygon((0.27, -0.4), (0.3, -0.87), (0.56, -0.5)), 1),
        (_polygon((0.55, -0.5), (0.86, -0.87), (0.85, -0.38)), 1),
        (_ellipse(0.56, -0.22, 0.35, 0.32), 0),
        *((_ellipse(x, -0.28, 0.06, 0.08), 3) for x in (0.44, 0.7)),
        (_polygon((0.51, -0.14), (0.63, -0.14), (0.57, -0.05)), 2),
    ]


def _chair(rng: np.random.Generator) -> list[Part]:
    back, seat = rng.uniform(0.65, 0.97), rng.uniform(0.0, 0.15)
    legs = ((-0.55, 0.97), (0.38, 0.97), (-0.27, 0.82), (0.12, 0.82))
    rails = np.linspace(-back + 0.08, seat - 0.3, rng.integers(2, 4))
    return [
        *((_box(-0.45, y, 0.25, y + 0.12), 3) for y in rails),
        (_box(-0.58, -back, -0.4, seat + 0.1), 1),
        (_box(0.12, -back, 0.28, seat + 0.1), 1),
        *((_box(x, seat + 0.15, x + 0.16, y), 2) for x, y in legs),
        (_polygon((-0.6, seat), (0.4, seat), (0.62, seat + 0.24), (-0.52, seat + 0.24)), 0),
    ]


def _fish(rng: np.random.Generator) -> list[Part]:
    thick = rng.uniform(0.28, 0.42)
    return [
        (_polygon((-0.4, 0), (-0.97, -0.45), (-0.8, 0), (-0.97, 0.45)), 1),
        (_polygon((-0.2, -thick * 0.8), (0.0, -thick - 0.32), (0.35, -thick * 0.8)), 2),
        (_polygon((0, thick * 0.8), (-0.05, thick + 0.25), (0.25, thick * 0.8)), 2),
        (_ellipse(0.15, 0, 0.7, thick), 0),
        *((_box(x, -thick * 0.75, x + 0.09, thick * 0.75), 1) for x in (-0.1, 0.12)),
        (_ellipse(0.58, -0.08, 0.1, 0.1), 3),
    ]


def _person(rng: np.random.Generator) -> list[Part]:
    left, right, stride = rng.uniform(0.05, 0.9), rng.uniform(0.05, 0.9), rng.uniform(0.02, 0.3)
    return [
        (_limb(-0.24, -0.45, 0.62, 0.14, left), 3),
        (_limb(0.24, -0.45, 0.62, 0.14, -right), 3),
        (_limb(-0.14, 0.12, 0.85, 0.23, stride), 1),
        (_limb(0.14, 0.12, 0.85, 0.23, -stride), 1),
        (_polygon((-0.3, -0.5), (0.3, -0.5), (0.25, 0.2), (-0.25, 0.2)), 0),
        (_ellipse(0, -0.74, 0.2, 0.23), 3),
        (_ellipse(0, -0.86, 0.21, 0.12), 2),
    ]


def _plant(rng: np.random.Generator) -> list[Part]:
    leaves = []
    for number, angle in enumerate(np.pi * np.linspace(0.08, 0.92, rng.integers(5, 8))):
        turned, length = angle + rng.uniform(-0.1, 0.1), rng.uniform(0.75, 1.1)
        x, y = np.cos(turned) * length / 2, 0.3 - np.sin(turned) * length / 2
        leaves.append((_ellipse(x, y, length * 0.55, 0.13, -turned), number % 2))
    pot = _polygon((-0.38, 0.3), (0.38, 0.3), (0.27, 0.96), (-0.27, 0.96))
    return [*leaves, (pot, 2), (_box(-0.45, 0.24, 0.45, 0.42), 3)]


def _train(rng: np.random.Generator) -> list[Part]:
    roof, stack = rng.uniform(-0.6, -0.4), rng.uniform(0.5, 0.68)
    return [
        (_box(stack, -0.62, stack + 0.18, -0.1), 2),
        (_box(-0.15, -0.2, 0.9, 0.32), 0),
        (_ellipse(0.9, 0.06, 0.09, 0.26), 3),
        (_box(-0.95, roof, -0.1, 0.32), 1),
        (_box(-1.0, roof - 0.1, -0.03, roof + 0.03), 2),
        *((_box(x, roof + 0.12, x + 0.26, roof + 0.4), 3) for x in (-0.85, -0.46)),
        (_box(-0.97, 0.3, 0.95, 0.42), 2),
        (_polygon((0.9, 0.3), (1.0, 0.62), (0.75, 0.62)), 1),
        *_wheels((-0.7, -0.25, 0.2, 0.62), 0.48, 0.18),
    ]


def _tv(rng: np.random.Generator) -> list[Part]:
    top, glare = rng.uniform(-0.8, -0.55), rng.uniform(-0.6, 0.2)
    return [
        (_box(-0.1, 0.4, 0.1, 0.74), 2),
        (_box(-0.48, 0.68, 0.48, 0.84), 2),
        (_box(-0.97, top, 0.97, 0.5), 0),
        (_box(-0.84, top + 0.12, 0.84, 0.36), 1),
        (
            _polygon(
                (glare, top + 0.18), (glare + 0.3, top + 0.18), (glare, 0.28), (glare - 0.2, 0.28)
            ),
            3,
        ),
    ]


SHAPES: dict[str, Callable[[np.random.Generator], list[Part]]] = {
    "aeroplane": _aeroplane,
    "bird": _bird,
    "boat": _boat,
    "bottle": _bottle,
    "car": _car,
    "cat": _cat,
    "chair": _chair,
    "fish": _fish,
    "person": _person,
    "plant": _plant,
    "train": _train,
    "tv": _tv,
}


def _clutter(rng: np.random.Generator) -> list[Part]:
    """Return a shape of no class: a blob, a triangle, a frame, or a single part of an object."""
    kind = rng.integers(4)
    if kind == 0:
        return [(_CIRCLE * rng.uniform(0.45, 1.0, (len(_CIRCLE), 1)), 0)]
    if kind == 1:
        return [(rng.uniform(0.4, 1.0, (3, 1)) * _CIRCLE[[0, 7, 13]], 0)]
    if kind == 2:
        return [(_box(-0.7, -0.6, 0.7, 0.6), 0), (_box(-0.35, -0.3, 0.35, 0.3), 1)]
    parts = SHAPES[MINIVOC_CLASSES[rng.integers(len(MINIVOC_CLASSES))]](rng)
    points, role = parts[rng.integers(len(parts))]
    centred = points - (points.max(0) + points.min(0)) / 2
    return [(centred * 0.8 / np.abs(centred).max(), role)]


# --- texture and light -----------------------------------------------------------------------


def _noise(
    rng: np.random.Generator, height: int, width: int, rows: int, columns: int
) -> Float[np.ndarray, "height width"]:
    """Draw noise of variance 1 on a grid of rows x columns, and resize it to height x width."""
    coarse = rng.standard_normal((max(2, rows), max(2, columns)), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def _hsv(h: float, s: float, v: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(h % 1, s, v), np.float32) * 255


def _background(
    rng: np.random.Generator, kind: str, size: int
) -> Float[np.ndarray, "3 height width"]:
    """Draw a textured background of one kind; RGB in about [0, 255], not yet clipped."""
    axis = np.arange(size, dtype=np.float32) / size
    x, y = axis[None, :], axis[:, None]
    noise = partial(_noise, rng, size, size)
    uniform = rng.uniform
    if kind == "grass":
        colour = _hsv(uniform(0.2, 0.38), uniform(0.4, 0.8), uniform(0.35, 0.7))
        shade = 15 * noise(size // 4, size // 2) + 12 * noise(6, 6)
    elif kind == "sky":
        colour = _hsv(uniform(0.53, 0.64), uniform(0.2, 0.6), uniform(0.7, 0.95))
        shade = (y - 0.5) * uniform(-70, 70) + np.maximum(26 * noise(6, 4), 0)
    elif kind == "water":
        colour = _hsv(uniform(0.47, 0.65), uniform(0.5, 0.9), uniform(0.35, 0.7))
        ripple = np.sin(uniform(35, 70) * y + 1.8 * noise(5, 5))
        shade = 15 * ripple + 6 * noise(size // 4, size // 16)
    elif kind == "road":
        colour = np.full(3, uniform(70, 130), np.float32)
        line = np.abs(x - uniform(0.2, 0.8) + (y - 0.5) * uniform(-0.5, 0.5)) < 0.02
        shade = 12 * noise(size // 2, size // 2) + 110 * (line & ((y * 8) % 2 < 1.2))
    elif kind == "wall":
        colour = _hsv(rng.random(), uniform(0.1, 0.45), uniform(0.45, 0.85))
        rows = y * rng.integers(5, 10)
        columns = x * (rows.max() // 2 + 1) + 0.5 * (rows.astype(int) % 2)
        shade = 6 * noise(size // 4, size // 4) - 34 * ((rows % 1 < 0.1) | (columns % 1 < 0.05))
    elif kind == "sand":
        colour = _hsv(uniform(0.09, 0.14), uniform(0.25, 0.5), uniform(0.7, 0.92))
        shade = 9 * noise(size // 2, size // 2) + 8 * noise(4, 4)
    elif kind == "snow":
        colour = np.full(3, uniform(210, 240), np.float32) + np.float32([-6, -2, 0])
        shade = 9 * noise(4, 4) - 22 * (noise(size // 2, size // 2) > 1.3)
    else:  # railway: gravel, sleepers, two rails
        colour = _hsv(uniform(0.03, 0.12), uniform(0.1, 0.3), uniform(0.4, 0.65))
        along, across = (x, y) if rng.random() < 0.5 else (y, x)
        offset, gauge = uniform(0.2, 0.6), uniform(0.15, 0.25)
        bed = (across > offset - 0.06) & (across < offset + gauge + 0.06)
        rails = (np.abs(across - offset) < 0.015) | (np.abs(across - offset - gauge) < 0.015)
        shade = 16 * noise(size // 3, size // 3) - 40 * (bed & ((along * 14) % 1 < 0.4))
        shade = np.where(rails, 85, shade)
    return colour[:, None, None] + np.broadcast_to(shade, (size, size)).astype(np.float32)


def _palette(rng: np.random.Generator, behind: np.ndarray) -> Float[np.ndarray, "role 3"]:
    """Choose one to four colours for the roles, if possible unlike the background `behind`."""
    colours = []
    for _ in range(rng.integers(1, ROLES + 1)):
        for _ in range(4):
            colour = _hsv(rng.random(), rng.uniform(0.15, 1.0), rng.uniform(0.2, 1.0))
            if np.abs(colour - behind).sum() > 120:
                break
        colours.append(colour)
    return np.stack(colours)[rng.integers(len(colours), size=ROLES)]


def _surface(
    rng: np.random.Generator, height: int, width: int
) -> Float[np.ndarray, "role height width"]:
    """Draw the brightness of each role: stripes, fine or coarse noise, under one light."""
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    towards = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0.05, 0.35) * (x * math.cos(towards) + y * math.sin(towards))
    materials = []
    for _ in range(2):
        kind, depth = rng.integers(3), rng.uniform(0.08, 0.28)
        if kind == 0:
            turn, pitch = rng.uniform(0, np.pi), rng.uniform(6, 16)
            pattern = np.sin(pitch * (x * math.cos(turn) + y * math.sin(turn)))
        elif kind == 1:
            pattern = 0.8 * _noise(rng, height, width, height // 3, width // 3)
        else:
            pattern = 0.7 * _noise(rng, height, width, 4, 4)
        materials.append(light * (1 + depth * pattern))
    return np.stack(materials)[rng.integers(2, size=ROLES)]


# --- composition -----------------------------------------------------------------------------


class _Canvas:
    """An image, and the number of the top object at each pixel. Channels first is fast in numpy."""

    def __init__(self, image: Float[np.ndarray, "3 height width"]) -> None:
        self.image = image
        self.size = image.shape[-1]
        self.top = np.zeros((self.size, self.size), np.uint8)
        self.behind = image[:, :: self.size // 8, :: self.size // 8].mean((1, 2))

    def draw(
        self,
        rng: np.random.Generator,
        parts: Sequence[Part],
        centre: np.ndarray,
        radius: float,
        number: int,
    ) -> int:
        """Draw parts as object `number` and return the number of covered pixels.

        `centre` and `radius` are in pixels. Number 0 is clutter: it hides objects and is none.
        """
        turn = rng.uniform(-0.35, 0.35)
        stretch = rng.uniform(0.85, 1.15, 2) * (rng.choice([-1, 1]), 1)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        placed = [(points * stretch @ rotation * radius + centre, role) for points, role in parts]
        everything = np.concatenate([points for points, _ in placed])
        left, upper = np.clip(np.floor(everything.min(0)).astype(int), 0, self.size)
        right, lower = np.clip(np.ceil(everything.max(0)).astype(int) + 1, 0, self.size)
        palette = _palette(rng, self.behind)
        outline = 1 + int(rng.integers(ROLES)) if rng.random() < 0.3 else None
        if right - left < 2 or lower - upper < 2:
            return 0
        width, height = int(right - left), int(lower - upper)
        roles = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
        pen = ImageDraw.Draw(roles)
        for points, role in placed:
            corners = ((points - (left, upper)) * SUPERSAMPLE).ravel().tolist()
            pen.polygon(corners, fill=1 + role, outline=outline)
        fine = np.asarray(roles)
        rows = (fine[::SUPERSAMPLE] > 0).view(np.uint8) + (fine[1::SUPERSAMPLE] > 0)
        alpha = (rows[:, ::SUPERSAMPLE] + rows[:, 1::SUPERSAMPLE]) / np.float32(SUPERSAMPLE**2)
        role_map = fine[::SUPERSAMPLE, ::SUPERSAMPLE]
        surface = _surface(rng, height, width)
        shade = np.take_along_axis(surface, (np.maximum(role_map, 1) - 1)[None], 0)[0]
        roles.putpalette(np.concatenate([self.behind[None], palette]).astype(np.uint8).tobytes())
        flat = np.asarray(roles.convert("RGB").reduce(SUPERSAMPLE)).transpose(2, 0, 1)
        below = self.image[:, upper:lower, left:right]
        below += alpha * (flat * shade - below)
        covered = alpha >= 0.5
        self.top[upper:lower, left:right][covered] = number
        return int(covered.sum())


def _places(rng: np.random.Generator, radii: Float[np.ndarray, " object"]) -> list[np.ndarray]:
    """Choose centres (fractions of the picture), each from a few random tries with enough room."""
    centres: list[np.ndarray] = []
    for number, radius in enumerate(radii):
        tries = rng.uniform(radius * 0.7, 1 - radius * 0.7, (8, 2))
        room = np.full(len(tries), np.inf)
        for other, other_radius in zip(centres, radii[:number], strict=True):
            gap = np.hypot(*(tries - other).T) / (radius + other_radius)
            room = np.minimum(room, gap)
        enough = np.flatnonzero(room > 0.8)
        centres.append(tries[enough[0] if len(enough) else room.argmax()])
    return centres


def with_article(noun: str) -> str:
    """Put `a` or `an` before a noun: `a car`, `an aeroplane`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _caption(rng: np.random.Generator, classes: Sequence[str], background: str) -> str:
    nouns = " and ".join(with_article(classes[i]) for i in rng.permutation(len(classes)))
    places = (" on {}", " with {} background", " in front of {}")
    if not classes:
        nouns = background
    elif rng.random() < 0.4:
        nouns += str(rng.choice(places)).format(background)
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(nouns)


def _border(top: UInt8[np.ndarray, "height width"]) -> np.ndarray:
    """Mark pixels whose object differs from a 4-neighbour's: a band two pixels wide."""
    border = np.zeros(top.shape, bool)
    rows, columns = top[1:] != top[:-1], top[:, 1:] != top[:, :-1]
    border[1:] |= rows
    border[:-1] |= rows
    border[:, 1:] |= columns
    border[:, :-1] |= columns
    return border


def draw(seed: int, index: int, world: World = World()) -> Scene:
    """Draw picture `index` of the stream `seed`; the same arguments give the same bytes."""
    rng = np.random.default_rng([seed, index])
    count = 1 + rng.choice(3, p=world.object_counts)
    names = [MINIVOC_CLASSES[i] for i in rng.choice(len(MINIVOC_CLASSES), count)]
    usual = rng.random() < world.co_occurrence
    anywhere = MINIVOC_BACKGROUNDS[rng.integers(len(MINIVOC_BACKGROUNDS))]
    background = USUAL_BACKGROUND[names[0]] if usual else anywhere
    canvas = _Canvas(_background(rng, background, world.size))

    for _ in range(rng.integers(1, 4) if rng.random() < world.clutter else 0):
        at, radius = rng.random(2) * world.size, rng.uniform(0.08, 0.2) * world.size
        canvas.draw(rng, _clutter(rng), at, radius, 0)
    crowding = (1.0, 0.85, 0.72)[count - 1]
    radii = rng.uniform(*world.object_radius, count) * crowding
    areas = []
    for number, (name, at) in enumerate(zip(names, _places(rng, radii), strict=True), start=1):
        radius = radii[number - 1]
        areas.append(
            canvas.draw(rng, SHAPES[name](rng), at * world.size, radius * world.size, number)
        )
        if rng.random() < world.occlusion:
            aside = at + radius * rng.uniform(0.4, 0.9) * _CIRCLE[rng.integers(len(_CIRCLE))]
            hidden = radius * rng.uniform(0.25, 0.5) * world.size
            canvas.draw(rng, _clutter(rng), aside * world.size, hidden, 0)

    seen = np.bincount(canvas.top.ravel(), minlength=count + 1)[1 : count + 1]
    visible = seen >= np.maximum(world.min_visible * np.array(areas), world.size**2 / 256)
    ids = [MINIVOC_CLASSES.index(name) + 1 for name in names]
    shown = [i if v else IGNORE_INDEX for i, v in zip(ids, visible, strict=True)]
    mask = np.array([0, *shown], np.uint8)[canvas.top]
    mask[_border(canvas.top)] = IGNORE_INDEX
    classes = tuple(name for name in MINIVOC_CLASSES if name in np.array(names)[visible])

    light = 1 + 0.08 * _noise(rng, world.size, world.size, 3, 3)
    grain = rng.standard_normal((world.size, world.size), dtype=np.float32) * rng.uniform(1, 6)
    pixels = np.clip(canvas.image * light + grain, 0, 255).astype(np.uint8)
    image = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return Scene(image, mask, classes, background, _caption(rng, classes, background))


def draw_many(
    seed: int, indices: Sequence[int], world: World = World(), *, processes: int = 1
) -> Iterator[Scene]:
    """Draw pictures in the order of `indices`, with `processes` processes."""
    task = partial(draw, seed, world=world)
    if processes == 1:
        yield from map(task, indices)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(task, indices, chunksize=16)


# --- on disk ---------------------------------------------------------------------------------


def _draw_into(folder: Path, counts: dict[str, int], world: World, processes: int) -> None:
    """Draw splits into an empty folder."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    rows = [("name", "labels")]
    with tqdm(total=sum(counts.values()), desc="drawing MiniVOC", unit="picture") as progress:
        for split, count in counts.items():
            names = [f"{split}_{index:05d}" for index in range(count)]
            scenes = draw_many(SPLIT_SEEDS[split], range(count), world, processes=processes)
            for name, scene in zip(names, scenes, strict=True):
                jpeg = folder / "JPEGImages" / f"{name}.jpg"
                Image.fromarray(scene.image).save(jpeg, quality=95)
                write_mask(folder / "SegmentationClass" / f"{name}.png", scene.mask)
                rows.append((name, ";".join(scene.classes)))
                progress.update()
            listing = folder / "ImageSets/Segmentation" / f"{split}.txt"
            listing.write_text("".join(f"{name}\n" for name in names))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_voc(
    folder: Path, counts: dict[str, int], world: World = World(), *, processes: int = 1
) -> Path:
    """Draw splits into a folder of VOC layout: pictures, masks, split lists, labels.csv.

    An existing folder with the same arguments is kept. A new folder gets its name only when it is
    complete.

    Args:
        counts: Pictures per split; `SPLIT_SEEDS` has the names of the splits.

    Raises:
        ValueError: If the folder exists with other content.
    """
    recipe = {"world": asdict(world), "counts": counts, "drawing": DRAWING_VERSION}
    recipe = json.dumps(recipe, indent=1, sort_keys=True)
    record = folder / "minivoc.json"
    with locked(folder):
        if folder.exists() and any(folder.iterdir()):
            if record.exists() and record.read_text() == recipe:
                return folder
            raise ValueError(f"{folder} holds something else than this MiniVOC: move or delete it")
        if folder.exists():
            folder.rmdir()
        with whole(folder) as partial:
            partial.mkdir()
            _draw_into(partial, counts, world, processes)
            (partial / record.name).write_text(recipe)
    return folder
