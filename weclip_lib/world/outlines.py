"""Outlines of drawn parts: polygons in the unit square [-1, 1], with y down."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

SUPERSAMPLE = 2  # pen strokes a pixel: edges are smooth

Points = Float[np.ndarray, "_ 2"]
Part = tuple[Points, int]  # a polygon, and the role of its colour: 0 and 1 body, 2 and 3 details
CIRCLE = np.stack([f(np.linspace(0, 2 * np.pi, 20, endpoint=False)) for f in (np.cos, np.sin)], 1)


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> Points:
    """Return an ellipse around (x, y), turned by `angle` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return CIRCLE * (rx, ry) @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def box(x0: float, y0: float, x1: float, y1: float) -> Points:
    """Return a rectangle from its left upper to its right lower corner."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)


def polygon(*points: tuple[float, float]) -> Points:
    """Return a polygon of these corners."""
    return np.array(points, float)


def limb(x: float, y: float, length: float, width: float, angle: float) -> Points:
    """Return a bar that hangs from (x, y), turned by `angle` radians from straight down."""
    cos, sin = np.cos(angle), np.sin(angle)
    bar = box(-width / 2, 0, width / 2, length)
    return bar @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def bar(
    start: Sequence[float] | np.ndarray, end: Sequence[float] | np.ndarray, width: float
) -> Points:
    """Return a bar between two points."""
    (x, y), (dx, dy) = start, np.subtract(end, start)
    return limb(x, y, np.hypot(dx, dy), width, np.arctan2(-dx, dy))


def ring(x: float, y: float, outer: float, inner: float) -> Points:
    """Return a ring around (x, y) as one line: once around outside, and back inside."""
    circle = np.concatenate([CIRCLE, CIRCLE[:1]])
    return np.array((x, y)) + np.concatenate([circle * outer, circle[::-1] * inner])


def plain_shape(rng: np.random.Generator, kind: int) -> list[Part]:
    """Return a shape of no class: a blob (kind 0), a triangle (1) or a frame (2)."""
    if kind == 0:
        return [(CIRCLE * rng.uniform(0.45, 1.0, (len(CIRCLE), 1)), 0)]
    if kind == 1:
        return [(rng.uniform(0.4, 1.0, (3, 1)) * CIRCLE[[0, 7, 13]], 0)]
    return [(box(-0.7, -0.6, 0.7, 0.6), 0), (box(-0.35, -0.3, 0.35, 0.3), 1)]


def stamp(
    polygons: Iterable[tuple[Points, int]],
    corner: Sequence[int],
    width: int,
    height: int,
    outline: int | None,
) -> tuple[Image.Image, Float[np.ndarray, "height width"], UInt8[np.ndarray, "height width"]]:
    """Draw filled polygons, the later over the earlier ones.

    Args:
        polygons: Points in pixels of the picture, and a number from 1 to 255 to fill them with.
        corner: Left and upper end of the stamp in the picture, in pixels.
        outline: Number for the lines around them; None: the same as inside.

    Returns:
        The stamp at `SUPERSAMPLE` times its size, the covered part of each pixel in [0, 1], and the
        number at each pixel, with 0 outside.
    """
    large = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    pen = ImageDraw.Draw(large)
    for points, number in polygons:
        pen.polygon(((points - corner) * SUPERSAMPLE).ravel().tolist(), number, outline)
    fine = np.asarray(large)
    rows = (fine[::SUPERSAMPLE] > 0).view(np.uint8) + (fine[1::SUPERSAMPLE] > 0)
    covered = (rows[:, ::SUPERSAMPLE] + rows[:, 1::SUPERSAMPLE]) / np.float32(SUPERSAMPLE**2)
    return large, covered, fine[::SUPERSAMPLE, ::SUPERSAMPLE]
