"""Version 1's shapes of the twelve classes and of clutter: parts in the unit square, y down.

Later parts lie over earlier ones.
"""

from collections.abc import Callable, Iterable

import numpy as np

from weclip_lib.labels import MINIVOC_1_CLASSES
from weclip_lib.world.outlines import Part, box, ellipse, limb, plain_shape, polygon


def _wheels(xs: Iterable[float], y: float, radius: float) -> list[Part]:
    return [(ellipse(x, y, r, r), role) for x in xs for r, role in ((radius, 2), (radius / 2, 3))]


def _aeroplane(rng: np.random.Generator) -> list[Part]:
    sweep, span = rng.uniform(0.1, 0.4), rng.uniform(0.5, 0.85)
    body = rng.uniform(0.13, 0.2)
    return [
        (polygon((-0.05, 0), (0.28, 0), (0.1 - sweep, -span), (-0.1 - sweep, -span)), 1),
        (polygon((-0.95, -0.5), (-0.75, -0.5), (-0.5, 0), (-0.92, 0)), 1),
        (ellipse(0, 0, 0.97, body), 0),
        (ellipse(0.72, -0.04, 0.12, 0.07), 3),
        *((ellipse(x, -0.04, 0.05, 0.05), 3) for x in (-0.1, 0.12, 0.34)),
        (polygon((-0.1, 0.03), (0.28, 0.03), (0.05 - sweep, span), (-0.15 - sweep, span)), 2),
    ]


def _bird(rng: np.random.Generator) -> list[Part]:
    lean, wing = rng.uniform(-0.45, -0.1), rng.uniform(-0.3, 0.5)
    return [
        (polygon((-0.3, 0), (-0.97, rng.uniform(-0.1, 0.25)), (-0.88, 0.4), (-0.25, 0.25)), 1),
        (limb(-0.05, 0.3, 0.5, 0.08, rng.uniform(-0.15, 0.1)), 2),
        (limb(0.14, 0.3, 0.5, 0.08, rng.uniform(-0.1, 0.15)), 2),
        (ellipse(0, 0.08, 0.55, 0.33, lean), 0),
        (ellipse(0.47, -0.35, 0.25, 0.23), 0),
        (polygon((0.65, -0.47), (1.0, -0.32), (0.65, -0.22)), 2),
        (ellipse(-0.1, 0.05, 0.38, 0.17, lean + wing), 1),
        (ellipse(0.53, -0.4, 0.06, 0.06), 3),
    ]


def _boat(rng: np.random.Generator) -> list[Part]:
    mast, jib = rng.uniform(0.75, 0.97), rng.uniform(0.5, 0.9)
    return [
        (box(-0.05, -mast, 0.05, 0.4), 2),
        (polygon((-0.09, -mast), (-0.09, 0.22), (-rng.uniform(0.55, 0.8), 0.22)), 1),
        (polygon((0.09, -mast * jib), (0.09, 0.22), (rng.uniform(0.45, 0.7), 0.22)), 3),
        (polygon((-0.97, 0.33), (0.97, 0.33), (0.6, 0.83), (-0.62, 0.83)), 0),
        (polygon((-0.93, 0.4), (0.93, 0.4), (0.87, 0.52), (-0.86, 0.52)), 2),
    ]


def _bottle(rng: np.random.Generator) -> list[Part]:
    wide, neck = rng.uniform(0.26, 0.38), rng.uniform(0.09, 0.13)
    shoulder, top = rng.uniform(-0.3, 0.0), rng.uniform(0.1, 0.25)
    outline = [(-wide, shoulder), (-neck, shoulder - 0.32), (-neck, -0.85)]
    return [
        (polygon(*outline, *((-x, y) for x, y in outline[::-1]), (wide, 0.96), (-wide, 0.96)), 0),
        (box(-neck * 1.35, -0.97, neck * 1.35, -0.78), 2),
        (box(-wide, top, wide, top + rng.uniform(0.3, 0.5)), 1),
        (ellipse(0, top + 0.18, wide * 0.45, 0.11), 3),
    ]


def _car(rng: np.random.Generator) -> list[Part]:
    roof, rear, front = rng.uniform(-0.6, -0.4), rng.uniform(-0.5, -0.3), rng.uniform(0.15, 0.35)
    hull = [(-0.98, 0.05), (-0.7, -0.04), (0.6, -0.04), (0.98, 0.12), (0.98, 0.4), (-0.98, 0.4)]
    return [
        (polygon((-0.68, 0), (rear, roof), (front, roof), (0.62, 0)), 0),
        (
            polygon((-0.5, -0.04), (rear + 0.04, roof + 0.1), (-0.06, roof + 0.1), (-0.06, -0.04)),
            3,
        ),
        (polygon((0.03, -0.04), (0.03, roof + 0.1), (front - 0.04, roof + 0.1), (0.44, -0.04)), 3),
        (polygon(*hull), 0),
        (box(-0.96, 0.17, 0.96, 0.24), 1),
        *_wheels((-0.55, 0.55), 0.4, rng.uniform(0.19, 0.25)),
    ]


def _cat(rng: np.random.Generator) -> list[Part]:
    tail = rng.uniform(-0.9, -0.5)
    legs = zip((-0.5, -0.26, 0.14, 0.36), rng.uniform(-0.15, 0.15, 4), strict=True)
    tail_points = ((-0.5, 0.32), (-0.95, tail + 0.3), (-0.98, tail), (-0.83, tail), (-0.42, 0.12))
    return [
        (polygon(*tail_points), 1),
        *((limb(x, 0.4, 0.52, 0.15, angle), 0) for x, angle in legs),
        (ellipse(-0.1, 0.3, 0.56, 0.3), 0),
        *((box(x, 0.03, x + 0.08, 0.4), 1) for x in (-0.35, -0.15, 0.05)),
        (polygon((0.27, -0.4), (0.3, -0.87), (0.56, -0.5)), 1),
        (polygon((0.55, -0.5), (0.86, -0.87), (0.85, -0.38)), 1),
        (ellipse(0.56, -0.22, 0.35, 0.32), 0),
        *((ellipse(x, -0.28, 0.06, 0.08), 3) for x in (0.44, 0.7)),
        (polygon((0.51, -0.14), (0.63, -0.14), (0.57, -0.05)), 2),
    ]


def _chair(rng: np.random.Generator) -> list[Part]:
    back, seat = rng.uniform(0.65, 0.97), rng.uniform(0.0, 0.15)
    legs = ((-0.55, 0.97), (0.38, 0.97), (-0.27, 0.82), (0.12, 0.82))
    rails = np.linspace(-back + 0.08, seat - 0.3, rng.integers(2, 4))
    return [
        *((box(-0.45, y, 0.25, y + 0.12), 3) for y in rails),
        (box(-0.58, -back, -0.4, seat + 0.1), 1),
        (box(0.12, -back, 0.28, seat + 0.1), 1),
        *((box(x, seat + 0.15, x + 0.16, y), 2) for x, y in legs),
        (polygon((-0.6, seat), (0.4, seat), (0.62, seat + 0.24), (-0.52, seat + 0.24)), 0),
    ]


def _fish(rng: np.random.Generator) -> list[Part]:
    thick = rng.uniform(0.28, 0.42)
    return [
        (polygon((-0.4, 0), (-0.97, -0.45), (-0.8, 0), (-0.97, 0.45)), 1),
        (polygon((-0.2, -thick * 0.8), (0.0, -thick - 0.32), (0.35, -thick * 0.8)), 2),
        (polygon((0, thick * 0.8), (-0.05, thick + 0.25), (0.25, thick * 0.8)), 2),
        (ellipse(0.15, 0, 0.7, thick), 0),
        *((box(x, -thick * 0.75, x + 0.09, thick * 0.75), 1) for x in (-0.1, 0.12)),
        (ellipse(0.58, -0.08, 0.1, 0.1), 3),
    ]


def _person(rng: np.random.Generator) -> list[Part]:
    left, right, stride = rng.uniform(0.05, 0.9), rng.uniform(0.05, 0.9), rng.uniform(0.02, 0.3)
    return [
        (limb(-0.24, -0.45, 0.62, 0.14, left), 3),
        (limb(0.24, -0.45, 0.62, 0.14, -right), 3),
        (limb(-0.14, 0.12, 0.85, 0.23, stride), 1),
        (limb(0.14, 0.12, 0.85, 0.23, -stride), 1),
        (polygon((-0.3, -0.5), (0.3, -0.5), (0.25, 0.2), (-0.25, 0.2)), 0),
        (ellipse(0, -0.74, 0.2, 0.23), 3),
        (ellipse(0, -0.86, 0.21, 0.12), 2),
    ]


def _plant(rng: np.random.Generator) -> list[Part]:
    leaves = []
    for number, angle in enumerate(np.pi * np.linspace(0.08, 0.92, rng.integers(5, 8))):
        turned, length = angle + rng.uniform(-0.1, 0.1), rng.uniform(0.75, 1.1)
        x, y = np.cos(turned) * length / 2, 0.3 - np.sin(turned) * length / 2
        leaves.append((ellipse(x, y, length * 0.55, 0.13, -turned), number % 2))
    pot = polygon((-0.38, 0.3), (0.38, 0.3), (0.27, 0.96), (-0.27, 0.96))
    return [*leaves, (pot, 2), (box(-0.45, 0.24, 0.45, 0.42), 3)]


def _train(rng: np.random.Generator) -> list[Part]:
    roof, stack = rng.uniform(-0.6, -0.4), rng.uniform(0.5, 0.68)
    return [
        (box(stack, -0.62, stack + 0.18, -0.1), 2),
        (box(-0.15, -0.2, 0.9, 0.32), 0),
        (ellipse(0.9, 0.06, 0.09, 0.26), 3),
        (box(-0.95, roof, -0.1, 0.32), 1),
        (box(-1.0, roof - 0.1, -0.03, roof + 0.03), 2),
        *((box(x, roof + 0.12, x + 0.26, roof + 0.4), 3) for x in (-0.85, -0.46)),
        (box(-0.97, 0.3, 0.95, 0.42), 2),
        (polygon((0.9, 0.3), (1.0, 0.62), (0.75, 0.62)), 1),
        *_wheels((-0.7, -0.25, 0.2, 0.62), 0.48, 0.18),
    ]


def _tv(rng: np.random.Generator) -> list[Part]:
    top, glare = rng.uniform(-0.8, -0.55), rng.uniform(-0.6, 0.2)
    return [
        (box(-0.1, 0.4, 0.1, 0.74), 2),
        (box(-0.48, 0.68, 0.48, 0.84), 2),
        (box(-0.97, top, 0.97, 0.5), 0),
        (box(-0.84, top + 0.12, 0.84, 0.36), 1),
        (
            polygon(
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


def clutter(rng: np.random.Generator) -> list[Part]:
    """Return a shape of no class: a blob, a triangle, a frame, or a single part of an object."""
    kind = int(rng.integers(4))
    if kind < 3:
        return plain_shape(rng, kind)
    parts = SHAPES[MINIVOC_1_CLASSES[rng.integers(len(MINIVOC_1_CLASSES))]](rng)
    points, role = parts[rng.integers(len(parts))]
    centred = points - (points.max(0) + points.min(0)) / 2
    return [(centred * 0.8 / np.abs(centred).max(), role)]
