"""Parts that several classes of MiniVOC's version 2 share: they tell the family, not the class.

Each function draws the parts of one family, always from the same distribution. Parts are polygons
in the unit square, y down; later ones lie over earlier ones, and objects look to the right. The
telling parts are made to fit: a head goes to (0.5, -0.2), the front of a vehicle to x = 0.45.
"""

import numpy as np

from weclip_lib.world.outlines import Part, bar, box, ellipse, limb, polygon, ring


def wheel(x: float, y: float, radius: float) -> list[Part]:
    """Draw a wheel around (x, y)."""
    return [(ellipse(x, y, radius, radius), 2), (ellipse(x, y, radius / 2, radius / 2), 3)]


def animal(rng: np.random.Generator) -> list[Part]:
    """Draw a body with four legs and a tail."""
    thick, length = rng.uniform(0.23, 0.3), rng.uniform(0.5, 0.65)
    legs = zip((-0.52, 0.22, -0.64, 0.34), rng.uniform(-0.2, 0.2, 4), (1, 1, 0, 0), strict=True)
    return [
        (limb(-0.66, 0.05, rng.uniform(0.3, 0.5), 0.1, rng.uniform(0.2, 2.4)), 0),
        *((limb(x, 0.2, length, 0.14, angle), role) for x, angle, role in legs),
        (ellipse(-0.15, 0.12, 0.6, thick), 0),
        (ellipse(rng.uniform(-0.5, 0.1), 0.08, rng.uniform(0.08, 0.2), thick * 0.6), 1),
    ]


def hull(rng: np.random.Generator) -> list[Part]:
    """Draw the rear of a road vehicle, with a row of windows and two wheels."""
    roof, sill = rng.uniform(-0.5, -0.4), rng.uniform(-0.08, 0.02)
    return [
        (box(-0.95, roof, 0.45, 0.4), 0),
        (box(-0.97, roof - 0.06, 0.45, roof + 0.04), 1),
        *((box(x, roof + 0.12, x + 0.32, sill), 3) for x in (-0.86, -0.43, 0.0)),
        (box(-0.95, 0.14, 0.45, 0.21), 1),
        *wheel(-0.62, 0.42, 0.2),
        *wheel(0.05, 0.42, 0.2),
    ]


def wheels(rng: np.random.Generator) -> list[Part]:
    """Draw two large wheels with spokes, a bar between them, a fork and a saddle."""
    turn = rng.uniform(0, np.pi)
    parts = []
    for x in (-0.57, 0.57):
        hub = np.array((x, 0.42))
        for angle in turn + np.array([0.0, 1.05, 2.09]):
            reach = 0.34 * np.array([np.cos(angle), np.sin(angle)])
            parts.append((bar(hub - reach, hub + reach, 0.035), 3))
        parts += [(ring(x, 0.42, 0.39, 0.29), 2), (ellipse(x, 0.42, 0.08, 0.08), 1)]
    return [
        *parts,
        (bar((-0.57, 0.42), (0.1, 0.42), 0.08), 0),
        (bar((0.36, -0.32), (0.57, 0.42), 0.08), 0),
        (bar((-0.24, -0.34), (-0.12, 0.42), 0.08), 0),
        (ellipse(-0.27, -0.37, 0.2, 0.07), 1),
    ]


def furniture(rng: np.random.Generator) -> list[Part]:
    """Draw a thick slab on four legs with a bar between them."""
    foot = rng.uniform(0.6, 0.95)
    return [
        (box(-0.5, foot - 0.2, 0.5, foot - 0.12), 1),
        *((box(x, 0.2, x + 0.11, foot - 0.08), 1) for x in (-0.42, 0.3)),
        *((box(x, 0.2, x + 0.14, foot), 0) for x in (-0.64, 0.5)),
        (box(-0.66, 0.0, 0.66, 0.32), 0),
        (box(-0.66, 0.2, 0.66, 0.28), 1),
    ]


def flyer(rng: np.random.Generator) -> list[Part]:
    """Draw a long body with two wings."""
    sweep, span, body = rng.uniform(0.1, 0.4), rng.uniform(0.6, 0.85), rng.uniform(0.14, 0.19)
    return [
        (polygon((-0.08, 0), (0.28, 0), (0.1 - sweep, -span), (-0.12 - sweep, -span)), 1),
        (ellipse(0, 0, 0.8, body), 0),
        (polygon((-0.1, 0.03), (0.28, 0.03), (0.05 - sweep, span), (-0.17 - sweep, span)), 1),
    ]


def ship(rng: np.random.Generator) -> list[Part]:
    """Draw a hull that floats, with round windows."""
    bow, stern = rng.uniform(0.55, 0.7), rng.uniform(0.6, 0.75)
    return [
        (polygon((-0.95, 0.28), (0.97, 0.28), (bow, 0.8), (-stern, 0.8)), 0),
        (polygon((-0.93, 0.3), (0.94, 0.3), (0.88, 0.42), (-0.88, 0.42)), 1),
        *((ellipse(x, 0.55, 0.06, 0.06), 3) for x in (-0.45, -0.15, 0.15, 0.45)),
    ]


def vessel(rng: np.random.Generator) -> list[Part]:
    """Draw a pot or jar with a rim and a band."""
    wide, foot, band = rng.uniform(0.36, 0.46), rng.uniform(0.28, 0.36), rng.uniform(0.25, 0.45)
    return [
        (polygon((-wide, 0), (wide, 0), (foot, 0.95), (-foot, 0.95)), 0),
        (box(-foot, band, foot, band + 0.25), 1),
        (box(-wide - 0.04, -0.04, wide + 0.04, 0.1), 1),
    ]


def cabinet(rng: np.random.Generator) -> list[Part]:
    """Draw a box on two feet, with knobs."""
    top = rng.uniform(-0.6, -0.5)
    return [
        *(
            (polygon((x, 0.5), (x + 0.2, 0.5), (x + 0.14, 0.8), (x + 0.06, 0.8)), 1)
            for x in (-0.75, 0.55)
        ),
        (box(-0.95, top, 0.95, 0.6), 0),
        (box(0.5, top + 0.12, 0.82, 0.48), 1),
        *((ellipse(0.66, y, 0.1, 0.1), 3) for y in (top + 0.3, top + 0.6)),
    ]


def figure(rng: np.random.Generator) -> list[Part]:
    """Draw a trunk with two arms and two legs."""
    left, right, stride = rng.uniform(0.05, 1.2), rng.uniform(0.05, 1.2), rng.uniform(0.02, 0.3)
    return [
        (limb(-0.24, -0.34, 0.6, 0.14, left), 0),
        (limb(0.24, -0.34, 0.6, 0.14, -right), 0),
        (limb(-0.14, 0.18, 0.8, 0.22, stride), 1),
        (limb(0.14, 0.18, 0.8, 0.22, -stride), 1),
        (polygon((-0.32, -0.42), (0.32, -0.42), (0.25, 0.26), (-0.25, 0.26)), 0),
    ]
