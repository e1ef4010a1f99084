"""Settings: frozen dataclasses, one field a line with value, unit and source."""

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """How MiniVOC draws: each difficulty of weak supervision is a dial."""

    size: int = 160  # pixels a side: 20x20 patches of 8, as 320/16 in the paper
    object_counts: tuple[float, float, float] = (0.4, 0.4, 0.2)  # chance of 1, 2, 3 objects
    object_radius: tuple[float, float] = (0.2, 0.44)  # half the size, of the picture's side
    co_occurrence: float = 0.35  # chance that the background is the first object's usual one
    clutter: float = 0.5  # chance of one to three shapes of no class behind the objects
    occlusion: float = 0.25  # chance, per object, of clutter in front of it
    min_visible: float = 0.35  # of its area; an object more hidden is void and not a label
