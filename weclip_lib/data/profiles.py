"""A profile names a data set, a backbone and a budget; all profiles use the same method."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

from weclip_lib.config import (
    CRF,
    OFFICIAL_SWITCHES,
    STATISTICS,
    Budget,
    DecoderShape,
    Method,
    in_range,
    one_of,
)
from weclip_lib.labels import COCO, MINIVOC, MINIVOC_1, VOC, LabelSet
from weclip_lib.storage.provenance import ROOT
from weclip_lib.world.settings import WORLD_1, World

DATA = ROOT / "data"
DRAWN_LABELS = {1: MINIVOC_1, 2: MINIVOC}  # by version of MiniVOC
DRAWN_PROFILES = {1: "mini-1", 2: "mini"}


def check_scales(scales: Sequence[float]) -> None:
    """Refuse wrong scales of inference.

    Raises:
        ValueError: If the first is not 1, the single scale, or one is not from 0.05 to 20.
    """
    if not scales or scales[0] != 1:
        raise ValueError(f"scales are {scales}: the first has to be 1, the single scale")
    for scale in scales:
        in_range("a scale", scale, 0.05, 20.0)


@dataclass(frozen=True)
class Profile:
    """One scale of the same pipeline."""

    name: str
    labels: LabelSet
    backbone: str  # open_clip model name
    weights: str  # open_clip tag, or a file
    statistics: Literal["imagenet", "own"] = "imagenet"  # of pixels; official; own: CLIP's
    method: Method = field(default_factory=Method)
    decoder: DecoderShape = field(default_factory=DecoderShape)
    budget: Budget = field(default_factory=Budget)
    crf: CRF = field(default_factory=CRF)
    scales: tuple[float, ...] = (1.0, 0.75)  # of inference; official
    long_side: int = 0  # pixels of a picture's longer side at inference; 0: as it is; official: 512
    train_split: str = "train"
    scored_splits: tuple[str, ...] = ("val", "test")  # with masks, for the scores of decoders
    inspected: int = 0  # training pictures whose pseudo labels are scored and shown; 0: all
    augment: bool = False  # rescale and crop anew in every step; else keep features
    # MiniVOC only: pictures drawn for (train, val, test), and how
    drawn: tuple[int, int, int] = (0, 0, 0)
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        one_of("statistics", self.statistics, STATISTICS)
        check_scales(self.scales)
        in_range("long_side", self.long_side, 0, 100_000)
        in_range("inspected", self.inspected, 0)
        if len(set(self.scored_splits)) != len(self.scored_splits):
            raise ValueError(f"scored_splits are {self.scored_splits}: give every split once")
        if len(self.drawn) != 3 or (any(self.drawn) and min(self.drawn) < 1):
            raise ValueError(f"drawn is {self.drawn}: give numbers for train, val and test")
        version = self.world.version
        if any(self.drawn) and self.labels.classes != DRAWN_LABELS[version].classes:
            raise ValueError(
                f"version is {version}, which has not the classes of profile {self.name}: "
                f"use profile {DRAWN_PROFILES[version]}"
            )

    @property
    def default_folder(self) -> Path:
        """Where its pictures lie if no folder is given; another world has another folder."""
        if not any(self.drawn):
            return DATA / self.name
        usual = PROFILES.get(self.name)
        if usual and (self.drawn, self.world) == (usual.drawn, usual.world):
            return DATA / f"minivoc-{self.name}"
        about = repr((self.drawn, asdict(self.world)))
        return DATA / f"minivoc-{self.name}-{sha256(about.encode()).hexdigest()[:8]}"


_MINI = Profile(
    name="mini",
    labels=MINIVOC,
    backbone="MiniCLIP",
    weights="miniclip-v2",
    statistics="own",
    method=Method(rfm_layers=10),  # as for COCO; the last 6 of MiniCLIP's maps make worse labels
    decoder=DecoderShape(dim=64, heads=4),  # as good on val as 128 channels, at half the cost
    budget=Budget(steps=600, learning_rate=4e-3, crop=160),
    drawn=(1000, 250, 250),
)
PROFILES = {
    "smoke": replace(
        _MINI,
        name="smoke",
        decoder=DecoderShape(dim=32, layers=1),
        budget=Budget(steps=4, batch=4, warmup=2, crop=160),
        drawn=(16, 6, 6),
    ),
    "mini": _MINI,
    "mini-1": replace(  # the first world, with a MiniCLIP whose patches were trained
        _MINI,
        name="mini-1",
        labels=MINIVOC_1,
        weights="miniclip-v1",
        decoder=DecoderShape(dim=128),
        budget=Budget(steps=160, learning_rate=1e-3, crop=160),
        world=WORLD_1,
    ),
    "voc": Profile(
        "voc",
        VOC,
        "ViT-B-16-quickgelu",
        "openai",
        long_side=512,
        train_split="train_aug",
        scored_splits=("val",),
        inspected=200,
        augment=True,
    ),
    "folder": Profile(  # a user's own: data_dir says where; its files name the classes
        "folder",
        LabelSet("folder", (), ()),
        "ViT-B-16-quickgelu",
        "openai",
        long_side=512,
        scored_splits=("masked",),
        inspected=200,
        augment=True,
    ),
    "coco": Profile(
        "coco",
        COCO,
        "ViT-B-16-quickgelu",
        "openai",
        long_side=512,
        scored_splits=("val",),
        inspected=200,
        augment=True,
        method=Method(box_threshold=0.7, rfm_layers=10),
        budget=Budget(steps=80_000),
    ),
}


def get_profile(name: str) -> Profile:
    """Return the profile of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


def official(profile: Profile) -> Profile:
    """Give a profile the published method and image statistics; keep data, backbone, budget."""
    switches = dict(OFFICIAL_SWITCHES)
    if profile.labels is COCO:
        switches["rfm_start"] = 0.5  # the official counter for COCO counts training steps alone
    return replace(profile, method=replace(profile.method, **switches), statistics="imagenet")
