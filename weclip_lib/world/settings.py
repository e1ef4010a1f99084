"""Settings of MiniVOC's drawing and MiniCLIP's training: one field a line, with value and unit."""

from dataclasses import dataclass, replace
from typing import Literal

from weclip_lib.config import in_range, one_of

VERSIONS = (1, 2)  # of MiniVOC
DIALS = ("headless", "companions", "camouflage", "shading", "cut", "overlap")  # of version 2 alone
CHANCES = ("co_occurrence", "clutter", "occlusion", "min_visible", *DIALS)  # from 0 to 1


@dataclass(frozen=True)
class World:
    """Settings of MiniVOC's drawing; they set how difficult weak supervision is.

    Version 1 draws each class with shapes of its own. Version 2 draws objects of parts, of which
    one tells the class and the others are shared between classes. The dials from `headless` on
    change nothing in version 1.
    """

    version: int = 2  # 1: twelve classes; 2: twenty
    size: int = 160  # pixels a side: 20x20 patches of 8, as 320/16 in the paper
    object_counts: tuple[float, float, float] = (
        0.6,
        0.3,
        0.1,
    )  # of 1, 2, 3 objects; mostly one, as in VOC
    object_radius: tuple[float, float] = (0.3, 0.48)  # half the size, of the picture's side
    co_occurrence: float = 0.35  # chance that the first object has its usual background
    clutter: float = 0.5  # chance of one to three shapes of no class behind the objects
    occlusion: float = 0.25  # chance, per object, of clutter in front of it
    min_visible: float = 0.35  # part of its area; an object with less is ignored and gives no label
    headless: float = 0.3  # chance that clutter is an object without its telling part
    companions: float = 0.35  # chance that the second object is the first's usual companion
    camouflage: float = 0.15  # chance, per object, of the ground's colour and texture on its body
    shading: float = 0.5  # strength of light and texture: colours alone draw no outline; 0: flat
    cut: float = 0.15  # chance, per object, that the border cuts it: not every object is whole
    overlap: float = 0.7  # least distance of objects, of the sum of radii; 1: apart; 0: anywhere

    def __post_init__(self) -> None:
        one_of("version", self.version, VERSIONS)
        in_range("size", self.size, 16, 4096)
        for name in CHANCES:
            in_range(name, getattr(self, name), 0.0, 1.0)
        if len(self.object_counts) != 3 or abs(sum(self.object_counts) - 1) > 1e-9:
            raise ValueError(f"object_counts is {self.object_counts}: give three with the sum 1")
        if len(self.object_radius) != 2 or self.object_radius[0] > self.object_radius[1]:
            raise ValueError(f"object_radius is {self.object_radius}: give least and most")
        for name, top in (("object_counts", 1.0), ("object_radius", 0.5)):
            for value in getattr(self, name):
                in_range(name, value, 0.0 if top == 1 else 0.05, top)


WORLD_1 = World(
    version=1,
    object_counts=(0.4, 0.4, 0.2),
    object_radius=(0.2, 0.44),
    headless=0.5,
    camouflage=0.3,
)
# What MiniCLIP learns from: more and smaller objects, and more difficulties, than in a data set.
WIDE = World(
    object_counts=(0.4, 0.4, 0.2), object_radius=(0.15, 0.46), headless=0.5, camouflage=0.3
)


# Large single objects in plain view: what MiniCLIP sees first. It learns shapes from them in a
# tenth of the steps that it needs among clutter.
EASY = replace(
    WIDE,
    object_counts=(1.0, 0.0, 0.0),
    object_radius=(0.3, 0.46),
    clutter=0.0,
    occlusion=0.0,
    camouflage=0.0,
    cut=0.0,
)


@dataclass(frozen=True)
class Phase:
    """One part of the pre-training."""

    until: int  # step at which it ends
    stride: int  # 2: every second block runs; the others join later with outputs of zero
    size: int  # pixels a side
    kept: int  # patches of a picture that go through the blocks, chosen at random
    batch: int  # pictures
    pooling: Literal["token", "mean"] = "token"  # what embeds a picture: class token, mean patch


@dataclass(frozen=True)
class Pretraining:
    """Settings of a round of MiniCLIP's training; data/miniclip-v2/MiniCLIP.json sets the model."""

    phases: tuple[Phase, ...]
    seed: int  # for the pictures and everything random; no split uses it
    world: World = WIDE
    pictures: int = 60_000  # drawn once, then sampled without replacement in each epoch
    shard: int = 1_000  # pictures a file
    warmup: int = 100  # steps
    decay: int = 1  # last steps, in which the learning rates fall to zero
    lr_matrices: float = 6e-3  # Muon
    lr_others: float = 1.5e-3  # AdamW
    weight_decay: float = 0.01
    hold_attention: bool = False  # whether queries and keys stay as they are
    info_nce: float = 0.3  # weight of pictures against captions
    phrases: float = 1.0  # weight of pictures against phrases
    checkpoint_every: int = 500  # steps

    @property
    def steps(self) -> int:
        return self.phases[-1].until


MINICLIP_ROUNDS = (
    Pretraining(
        seed=1100,
        world=EASY,
        pictures=20_000,
        phases=(Phase(until=1500, stride=2, size=80, kept=75, batch=64, pooling="mean"),),
    ),
    Pretraining(
        seed=1100,
        world=EASY,
        pictures=20_000,
        phases=(
            Phase(until=1000, stride=2, size=80, kept=75, batch=64, pooling="mean"),
            Phase(until=2000, stride=2, size=80, kept=75, batch=64),
        ),
    ),
    Pretraining(
        seed=1000,
        phases=(Phase(until=7500, stride=2, size=112, kept=130, batch=64),),
        decay=2000,
    ),
    Pretraining(
        seed=1001,
        phases=(Phase(until=3000, stride=1, size=112, kept=98, batch=64),),
        decay=2900,
        lr_matrices=3e-3,
        lr_others=8e-4,
        hold_attention=True,  # if it learns, twelve blocks attend worse to objects than six
    ),
)
