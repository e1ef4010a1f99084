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


@dataclass(frozen=True)
class Pretraining:
    """MiniCLIP's recipe; the model is data/miniclip/MiniCLIP.json."""

    seed: int = 1000  # of the pictures and of everything random; apart from all splits
    pictures: int = 60_000  # drawn once, then sampled without replacement each epoch
    shard: int = 1_000  # pictures a file
    batch: int = 128
    warmup: int = 100  # steps
    decay: float = 0.5  # last part of the steps, over which the rates fall to zero
    lr_matrices: float = 6e-3  # Muon
    lr_others: float = 1.5e-3  # AdamW
    weight_decay: float = 0.01
    info_nce: float = 0.3  # weight; the phrase loss has weight 1
    phases: tuple[tuple[int, int, int, int], ...] = (
        # until this step, run every so many-th block, on pixels a side, with so many patches kept
        (2300, 2, 112, 98),
        (3100, 1, 112, 98),
        (3350, 1, 160, 200),
    )
    checkpoint_every: int = 200  # steps

    @property
    def steps(self) -> int:
        return self.phases[-1][0]
