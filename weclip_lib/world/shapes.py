"""Shapes of the twenty classes: parts that classes share, and a part that tells the class.

The classes of a family have the same shared parts, drawn from the same distribution. So a body, a
hull or a wheel tells the family, and only the head, the front or the frame tells the class.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from weclip_lib.world import shared_parts as shared
from weclip_lib.world import telling_parts as telling
from weclip_lib.world.outlines import Part

Builder = Callable[[np.random.Generator], list[Part]]


@dataclass(frozen=True)
class Shape:
    """How a class is drawn: its telling parts over its shared ones."""

    shared: Builder
    telling: Builder


SHAPES = {
    "aeroplane": Shape(shared.flyer, telling.aeroplane),
    "bicycle": Shape(shared.wheels, telling.bicycle),
    "bird": Shape(shared.flyer, telling.bird),
    "boat": Shape(shared.ship, telling.boat),
    "bottle": Shape(shared.vessel, telling.bottle),
    "bus": Shape(shared.hull, telling.bus),
    "car": Shape(shared.hull, telling.car),
    "cat": Shape(shared.animal, telling.cat),
    "chair": Shape(shared.furniture, telling.chair),
    "cow": Shape(shared.animal, telling.cow),
    "table": Shape(shared.furniture, telling.table),
    "dog": Shape(shared.animal, telling.dog),
    "horse": Shape(shared.animal, telling.horse),
    "motorbike": Shape(shared.wheels, telling.motorbike),
    "person": Shape(shared.figure, telling.person),
    "plant": Shape(shared.vessel, telling.plant),
    "sheep": Shape(shared.animal, telling.sheep),
    "sofa": Shape(shared.furniture, telling.sofa),
    "train": Shape(shared.hull, telling.train),
    "tv": Shape(shared.cabinet, telling.tv),
}
