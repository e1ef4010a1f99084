"""The part of each class of MiniVOC's version 2 that tells it: a head, a front, a mast, a screen.

It is small, about a quarter of the object, and lies over the shared parts, which never hide it.
Parts are polygons in the unit square, y down; later ones lie over earlier ones.
"""

import numpy as np

from weclip_lib.world.outlines import CIRCLE, Part, bar, box, ellipse, polygon, ring
from weclip_lib.world.shared_parts import wheel


def _eye(x: float, y: float, radius: float = 0.05) -> list[Part]:
    return [(ellipse(x, y, radius, radius * 1.2), 2), (ellipse(x, y, radius / 2, radius / 2), 3)]


def cat(rng: np.random.Generator) -> list[Part]:
    """Draw a round face with pointed ears, slit pupils and whiskers."""
    x, y = 0.48 + rng.uniform(-0.05, 0.05), -0.22 + rng.uniform(-0.06, 0.06)
    ears, whiskers = [], []
    for side in (-1, 1):
        tip = x + side * rng.uniform(0.22, 0.32)
        ears.append((polygon((x + side * 0.3, y), (tip, y - 0.56), (x + side * 0.02, y - 0.2)), 0))
        inner = polygon((x + side * 0.25, y - 0.14), (tip, y - 0.44), (x + side * 0.1, y - 0.2))
        ears.append((inner, 1))
        for drop in (0.06, 0.16):
            whisker = bar((x + side * 0.1, y + 0.1), (x + side * 0.42, y + drop), 0.025)
            whiskers.append((whisker, 2))
    eyes = (ellipse(x + side * 0.13, y - 0.04, 0.08, 0.07) for side in (-1, 1))
    pupils = (ellipse(x + side * 0.13, y - 0.04, 0.03, 0.07) for side in (-1, 1))
    nose = polygon((x - 0.06, y + 0.06), (x + 0.06, y + 0.06), (x, y + 0.14))
    face = (ellipse(x, y, 0.32, 0.27), 0)
    return [*ears, face, *((e, 3) for e in eyes), *((p, 2) for p in pupils), (nose, 2), *whiskers]


def dog(rng: np.random.Generator) -> list[Part]:
    """Draw a head with a snout, a hanging ear and a collar."""
    snout, ear = rng.uniform(0.2, 0.27), rng.uniform(0.24, 0.32)
    return [
        (polygon((0.16, 0.0), (0.36, -0.36), (0.62, -0.16), (0.42, 0.2)), 0),
        (polygon((0.22, -0.1), (0.3, -0.2), (0.56, 0.0), (0.48, 0.1)), 3),
        (ellipse(0.5, -0.36, 0.26, 0.23), 0),
        (ellipse(0.62 + snout / 2, -0.28, snout, 0.13), 0),
        (ellipse(0.66 + snout, -0.13, 0.06, 0.1), 3),
        (ellipse(0.64 + snout * 1.4, -0.35, 0.08, 0.07), 2),
        (bar((0.6, -0.2), (0.6 + snout * 1.3, -0.2), 0.03), 2),
        (ellipse(0.34, -0.3, 0.11, ear, rng.uniform(0.0, 0.4)), 2),
        *_eye(0.58, -0.43),
    ]


def cow(rng: np.random.Generator) -> list[Part]:
    """Draw a head with horns and a broad muzzle."""
    x, y = 0.48, -0.22 + rng.uniform(-0.06, 0.06)
    horn, sides = rng.uniform(0.3, 0.42), (-1, 1)
    horns = [
        polygon(
            (x + side * 0.08, y - 0.24),
            (x + side * 0.28, y - 0.3),
            (x + side * 0.26, y - 0.3 - horn),
            (x + side * 0.42, y - 0.2 - horn / 2),
            (x + side * 0.34, y - 0.16),
            (x + side * 0.12, y - 0.12),
        )
        for side in sides
    ]
    return [
        *((horn, 3) for horn in horns),
        *((ellipse(x + side * 0.3, y - 0.04, 0.16, 0.07, side * 0.4), 1) for side in sides),
        (ellipse(x, y, 0.22, 0.3), 0),
        (ellipse(x, y - 0.12, 0.07, 0.14), 1),
        (ellipse(x, y + 0.24, 0.25, 0.16), 3),
        *((ellipse(x + side * 0.1, y + 0.24, 0.045, 0.05), 2) for side in sides),
        *(part for side in sides for part in _eye(x + side * 0.13, y - 0.08)),
    ]


def horse(rng: np.random.Generator) -> list[Part]:
    """Draw a long neck with a dark crest, and a long head."""
    nod = rng.uniform(-0.08, 0.1)
    return [
        (polygon((0.05, -0.02), (0.36, 0.26), (0.68, -0.42), (0.5, -0.72), (0.36, -0.6)), 0),
        (
            polygon(
                (0.42, -0.78),
                (0.6, -0.78),
                (0.98, -0.36 + nod),
                (0.92, -0.2 + nod),
                (0.78, -0.2 + nod),
                (0.5, -0.48),
            ),
            0,
        ),
        (polygon((0.42, -0.74), (0.46, -0.98), (0.58, -0.76)), 0),
        (polygon((0.4, -0.86), (0.54, -0.76), (0.42, -0.5), (0.28, -0.1), (-0.08, 0.0)), 2),
        *_eye(0.62, -0.62),
        (ellipse(0.9, -0.28 + nod, 0.035, 0.03), 2),
    ]


def sheep(rng: np.random.Generator) -> list[Part]:
    """Draw a woolly head with a dark face."""
    x, y, turn = 0.46, -0.2, rng.uniform(0, 1)
    angles = turn + 2 * np.pi * np.arange(8) / 8
    wool = [
        (ellipse(x + 0.24 * np.cos(a), y + 0.22 * np.sin(a), 0.13, 0.13), int(n % 2))
        for n, a in enumerate(angles)
    ]
    return [
        *wool,
        (ellipse(x, y, 0.26, 0.24), 0),
        (ellipse(x - 0.16, y + 0.02, 0.14, 0.06, -0.5), 2),
        (ellipse(x + 0.28, y + 0.02, 0.14, 0.06, 0.5), 2),
        (ellipse(x + 0.06, y + 0.1, 0.16, 0.23), 2),
        *((ellipse(x + 0.06 + side * 0.07, y + 0.04, 0.04, 0.05), 3) for side in (-1, 1)),
    ]


def car(rng: np.random.Generator) -> list[Part]:
    """Draw a windscreen and a bonnet with a headlight, over a front wheel."""
    bonnet = rng.uniform(0.0, 0.1)
    return [
        (
            polygon(
                (0.43, -0.42),
                (0.52, -0.42),
                (0.74, bonnet - 0.06),
                (1.02, bonnet),
                (1.04, 0.4),
                (0.43, 0.4),
            ),
            0,
        ),
        (polygon((0.48, -0.34), (0.53, -0.34), (0.69, bonnet - 0.06), (0.48, bonnet - 0.06)), 3),
        (box(0.86, 0.28, 1.08, 0.4), 2),
        (ellipse(0.94, 0.14, 0.09, 0.09), 2),
        (ellipse(0.94, 0.14, 0.06, 0.06), 3),
        *wheel(0.74, 0.42, 0.2),
    ]


def bus(rng: np.random.Generator) -> list[Part]:
    """Draw a flat front with a large window, a mirror and a destination box."""
    top = rng.uniform(-0.62, -0.54)
    return [
        (box(0.43, top, 0.93, 0.42), 0),
        (box(0.4, top - 0.16, 0.95, top + 0.06), 2),
        (box(0.45, top - 0.11, 0.9, top + 0.01), 3),
        (box(0.5, top + 0.14, 0.93, 0.1), 2),
        (box(0.54, top + 0.18, 0.93, 0.06), 3),
        (box(0.93, top + 0.1, 1.02, top + 0.14), 2),
        (box(0.98, top + 0.1, 1.06, top + 0.36), 2),
        (ellipse(0.82, 0.24, 0.07, 0.07), 3),
        (box(0.43, 0.34, 0.98, 0.44), 2),
    ]


def train(rng: np.random.Generator) -> list[Part]:
    """Draw a boiler with a smoking funnel, a buffer and a cowcatcher."""
    stack, puff = rng.uniform(-0.64, -0.52), rng.uniform(0.1, 0.15)
    return [
        (ellipse(0.58, stack - 0.18, puff, puff * 0.8), 3),
        (ellipse(0.38, stack - 0.26, puff * 0.9, puff * 0.7), 3),
        (
            polygon(
                (0.56, -0.1),
                (0.62, stack + 0.14),
                (0.53, stack),
                (0.85, stack),
                (0.76, stack + 0.14),
                (0.8, -0.1),
            ),
            2,
        ),
        (box(0.43, -0.14, 0.86, 0.4), 0),
        (ellipse(0.86, 0.13, 0.12, 0.28), 1),
        (ellipse(0.88, 0.13, 0.06, 0.14), 3),
        (box(0.96, 0.22, 1.04, 0.42), 2),
        (polygon((0.62, 0.4), (0.94, 0.4), (1.08, 0.64), (0.62, 0.64)), 2),
    ]


def bicycle(rng: np.random.Generator) -> list[Part]:
    """Draw a frame of bars, a handlebar and pedals."""
    rise = rng.uniform(-0.62, -0.52)
    joints = (
        ((-0.2, -0.14), (0.4, -0.16)),
        ((0.4, -0.16), (-0.12, 0.42)),
        ((-0.2, -0.14), (-0.57, 0.42)),
    )
    return [
        *((bar(start, end, 0.09), 0) for start, end in joints),
        (bar((0.36, -0.3), (0.29, rise), 0.07), 0),
        (bar((0.14, rise), (0.5, rise + 0.04), 0.08), 2),
        (bar((0.5, rise + 0.02), (0.46, rise + 0.2), 0.08), 2),
        (ring(-0.12, 0.42, 0.15, 0.08), 3),
        (bar((-0.12, 0.42), (0.02, 0.64), 0.05), 2),
        (box(-0.06, 0.62, 0.12, 0.68), 2),
    ]


def motorbike(rng: np.random.Generator) -> list[Part]:
    """Draw a tank, an engine, an exhaust and a headlamp."""
    tank = rng.uniform(0.13, 0.17)
    return [
        (bar((-0.05, 0.4), (-0.92, 0.3), 0.1), 3),
        (box(-0.2, 0.02, 0.24, 0.42), 2),
        *((box(-0.22, y, 0.26, y + 0.05), 3) for y in (0.08, 0.19, 0.3)),
        (polygon((-0.66, -0.3), (-0.1, -0.24), (-0.1, -0.06), (-0.5, -0.16)), 2),
        (ellipse(0.1, -0.16, 0.32, tank), 0),
        (bar((0.4, -0.26), (0.22, -0.6), 0.07), 2),
        (ellipse(0.5, -0.34, 0.15, 0.16), 2),
        (ellipse(0.54, -0.34, 0.1, 0.12), 3),
    ]


def chair(rng: np.random.Generator) -> list[Part]:
    """Draw a back of rails."""
    top = rng.uniform(-0.95, -0.75)
    rails = np.linspace(top + 0.05, -0.22, rng.integers(3, 5))
    return [
        *((box(-0.6, y, 0.6, y + 0.07), 2) for y in rails),
        *((box(x, top - 0.03, x + 0.11, 0.03), 0) for x in (-0.65, 0.54)),
    ]


def sofa(rng: np.random.Generator) -> list[Part]:
    """Draw a low back, two cushions and armrests."""
    top = rng.uniform(-0.38, -0.3)
    return [
        (box(-0.62, top, 0.62, 0.0), 0),
        *((box(x, top + 0.06, x + 0.5, 0.02), 3) for x in (-0.52, 0.02)),
        *((box(x, -0.12, x + 0.14, 0.24), 2) for x in (-0.8, 0.66)),
        *((ellipse(x, -0.12, 0.11, 0.1), 2) for x in (-0.73, 0.73)),
    ]


def table(rng: np.random.Generator) -> list[Part]:
    """Draw an overhanging top with a vase and a cup on it."""
    vase, cup = rng.uniform(-0.45, -0.2), rng.uniform(0.3, 0.5)
    flowers = ((vase - 0.13, -0.5), (vase + 0.02, -0.62), (vase + 0.15, -0.48))
    return [
        *((bar((vase, -0.2), at, 0.03), 2) for at in flowers),
        *((ellipse(*at, 0.08, 0.08), 3) for at in flowers),
        (
            polygon(
                (vase - 0.07, -0.32),
                (vase + 0.07, -0.32),
                (vase + 0.12, -0.06),
                (vase - 0.12, -0.06),
            ),
            2,
        ),
        (ring(cup + 0.2, -0.16, 0.09, 0.05), 2),
        (box(cup, -0.28, cup + 0.2, -0.06), 2),
        (box(-0.97, -0.08, 0.97, 0.05), 1),
    ]


def aeroplane(rng: np.random.Generator) -> list[Part]:
    """Draw a tail fin, windows and two engines."""
    fin = rng.uniform(0.5, 0.65)
    return [
        (polygon((-0.74, -0.02), (-1.0, -fin), (-0.78, -fin), (-0.42, -0.08)), 2),
        (polygon((-0.72, 0.02), (-0.98, 0.24), (-0.82, 0.26), (-0.48, 0.06)), 2),
        (polygon((0.52, -0.13), (0.64, -0.11), (0.76, -0.01), (0.54, -0.01)), 3),
        *((ellipse(x, -0.04, 0.045, 0.05), 3) for x in (-0.35, -0.2, -0.05, 0.1, 0.25, 0.4)),
        *((ellipse(x, y, 0.15, 0.06), 2) for x, y in ((0.08, 0.3), (0.04, 0.46))),
    ]


def bird(rng: np.random.Generator) -> list[Part]:
    """Draw a head with a crest, an eye and a beak."""
    x, y = 0.76, -0.14 + rng.uniform(-0.06, 0.03)
    beak = rng.uniform(1.12, 1.25)
    return [
        *(
            (polygon((x - 0.1, y - 0.1), (x - 0.32, y - lift), (x, y - 0.16)), 2)
            for lift in (0.22, 0.36)
        ),
        (polygon((x + 0.16, y - 0.14), (beak, y + 0.04), (x + 0.16, y + 0.15)), 3),
        (ellipse(x, y, 0.28, 0.25), 0),
        (ellipse(x + 0.08, y - 0.05, 0.08, 0.08), 3),
        (ellipse(x + 0.09, y - 0.05, 0.04, 0.05), 2),
    ]


def boat(rng: np.random.Generator) -> list[Part]:
    """Draw a mast with two sails and a flag."""
    x, mast, sail = rng.uniform(-0.2, 0.05), rng.uniform(-0.9, -0.75), rng.uniform(0.5, 0.62)
    return [
        (polygon((x + 0.07, mast + 0.08), (x + 0.07, 0.18), (x + sail, 0.18)), 3),
        (polygon((x - 0.05, mast + 0.3), (x - 0.05, 0.18), (x - sail * 0.55, 0.18)), 3),
        (box(x - 0.04, mast, x + 0.04, 0.3), 2),
        (polygon((x, mast - 0.1), (x - 0.24, mast - 0.02), (x, mast + 0.06)), 2),
    ]


def bottle(rng: np.random.Generator) -> list[Part]:
    """Draw shoulders, a neck and a cap."""
    neck, shoulder = rng.uniform(0.1, 0.14), rng.uniform(-0.42, -0.3)
    return [
        (
            polygon(
                (-0.4, 0.02),
                (-0.4, -0.1),
                (-neck, shoulder),
                (neck, shoulder),
                (0.4, -0.1),
                (0.4, 0.02),
            ),
            0,
        ),
        (box(-neck, -0.84, neck, shoulder + 0.02), 0),
        (box(-neck * 1.5, -1.0, neck * 1.5, -0.78), 2),
        (box(-neck * 1.3, -0.72, neck * 1.3, -0.66), 3),
    ]


def plant(rng: np.random.Generator) -> list[Part]:
    """Draw a fan of leaves."""
    leaves = []
    for number, angle in enumerate(np.pi * np.linspace(0.1, 0.9, rng.integers(5, 7))):
        turned, length = angle + rng.uniform(-0.1, 0.1), rng.uniform(0.35, 0.45)
        x, y = length * np.cos(turned), -0.06 - length * np.sin(turned)
        leaves.append((ellipse(x, y, length, 0.1, -turned), 2 + number % 2))
    return leaves


def tv(rng: np.random.Generator) -> list[Part]:
    """Draw a screen with glare, and an aerial."""
    glare, lean = rng.uniform(-0.6, -0.36), rng.uniform(0.1, 0.4)
    return [
        (bar((-0.15, -0.55), (-0.2 - lean, -0.98), 0.05), 2),
        (bar((-0.05, -0.55), (lean, -0.98), 0.05), 2),
        (box(-0.8, -0.4, 0.28, 0.42), 2),
        (box(-0.72, -0.32, 0.2, 0.34), 3),
        (
            polygon(
                (glare, -0.32), (glare + 0.24, -0.32), (glare + 0.04, 0.34), (glare - 0.12, 0.34)
            ),
            2,
        ),
    ]


def person(rng: np.random.Generator) -> list[Part]:
    """Draw a head with hair and a face."""
    hair = CIRCLE[10:] * (0.28, 0.27 + rng.uniform(0, 0.06)) + (0, -0.74)
    return [
        (box(-0.08, -0.55, 0.08, -0.38), 3),
        (ellipse(0, -0.7, 0.26, 0.28), 3),
        (np.concatenate([hair, [(0.28, -0.6), (0.16, -0.82), (-0.16, -0.82), (-0.28, -0.6)]]), 2),
        *((ellipse(x, -0.7, 0.035, 0.04), 2) for x in (-0.09, 0.09)),
        (bar((-0.08, -0.57), (0.08, -0.57), 0.035), 2),
    ]
