"""The settings of every `weclip` command; tyro makes the help and the options from them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from weclip_lib.config import in_range

SEEDS = 2**32 - 1  # the highest seed that numpy takes
Device = Annotated[str, arg(metavar="NAME")]
Settings = Annotated[  # of the profile: data.settings
    UseAppendAction[tuple[tuple[str, str], ...]], arg(aliases=["-s"], metavar="NAME VALUE")
]


@dataclass(frozen=True)
class Train:
    """Train a decoder in full; a second start continues from the newest checkpoint."""

    profile: str  # voc, coco, folder; mini to try
    out: Path  # folder of checkpoints and curves
    data_dir: str = ""  # folder of the pictures; default data/<profile>; profile folder needs it
    split: str = ""  # split to train on; default the profile's
    pictures: int = 0  # use only the first so many; 0: all
    supervised: bool = False  # learn from masks, not from tags
    skip_broken: bool = False  # leave broken pictures out
    backbone: str = ""  # an open_clip model; default the profile's
    weights: str = ""  # a tag of open_clip, or a file; default the profile's
    steps: int = 0  # 0: the profile's
    batch: int = 0  # pictures of all processes together; 0: the profile's
    crop: int = 0  # pixels a side; 0: the profile's
    accumulate: int = 1  # split each batch of a process into so many parts
    seed: int = 0  # for everything random
    bf16: bool = False  # autocast in bfloat16
    device: Device = "auto"  # cpu, cuda, cuda:1, mps; auto: a GPU if there is one
    s: Settings = ()  # a setting, such as box_threshold 0.3; `weclip settings` lists all
    workers: int = min(4, os.cpu_count() or 1)  # processes that read and augment pictures
    checkpoint_every: int = 1000  # steps
    validate_every: int = 0  # steps; 0: never
    validate_pictures: int = 0  # use only the first so many; 0: all
    val: str = "val"  # split for validation
    watch: int = 0  # save pseudo labels of the first so many pictures, ten times

    def __post_init__(self) -> None:
        for name in ("pictures", "steps", "batch", "validate_every", "validate_pictures", "watch"):
            in_range(name, getattr(self, name), 0, 2**31 - 1)
        for name in ("accumulate", "checkpoint_every"):
            in_range(name, getattr(self, name), 1, 2**31 - 1)
        in_range("crop", self.crop, 0, 4096)
        in_range("workers", self.workers, 0, 256)
        in_range("seed", self.seed, 0, SEEDS)


@dataclass(frozen=True)
class Score:
    """Compute the mIoU of a split: at one scale, with scales and flips, with CRF."""

    decoder: Path  # a trained.safetensors
    out: Path  # folder
    profile: str = ""  # of the data; default the decoder's
    data_dir: str = ""  # folder of the data; default data/<profile>; profile folder needs it
    split: str = "val"  # of the data
    pictures: int = 0  # use only the first so many; 0: all
    weights: str = ""  # of the backbone, if they moved
    s: Settings = ()  # a setting of inference, such as crf_iterations 5
    device: Device = "auto"  # cpu, cuda, cuda:1, mps; auto: a GPU if there is one

    def __post_init__(self) -> None:
        in_range("pictures", self.pictures, 0, 2**31 - 1)


@dataclass(frozen=True)
class Verify:
    """Compute the scores of runs again from the counts kept with them, and compare the tables."""

    runs: Positional[tuple[Path, ...]]  # folders of `weclip score`, or of runs of notebooks

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run is given: name folders of `weclip score` or of notebooks")


@dataclass(frozen=True)
class Predict:
    """Write masks of pictures as indexed PNG files with VOC's palette."""

    images: Positional[tuple[Path, ...]]  # files, or folders of them
    decoder: Path  # a trained.safetensors
    out: Path  # folder
    names: Path | None = None  # file with a list of names, as in ImageSets; only those
    crf: bool = False  # apply dense CRF after the network
    overlays: bool = False  # also write the pictures with the classes on them
    voc_server: bool = False  # use the folders that VOC's server expects
    batch: int = 1  # pictures of one size at a time
    weights: str = ""  # of the backbone, if they moved
    s: Settings = ()  # a setting of inference, such as crf_iterations 5
    device: Device = "auto"  # cpu, cuda, cuda:1, mps; auto: a GPU if there is one

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("no pictures are given: name files, or folders of them")
        in_range("batch", self.batch, 1, 2**31 - 1)


@dataclass(frozen=True)
class Doctor:
    """Check a folder of pictures and report every problem."""

    folder: Positional[Path]  # your own, or one of VOC or COCO
    profile: str = "voc"  # its classes are used, unless your own folder has its own


@dataclass(frozen=True)
class Download:
    """Download a data set, prepare it, and report what is there."""

    dataset: Positional[Literal["voc", "sbd", "coco"]]  # sbd adds train_aug to voc
    to: Path | None = None  # folder; default data/voc or data/coco
    # An archive you already have, or the folder with its unpacked files; repeatable.
    archive: UseAppendAction[tuple[Path, ...]] = ()
    labels: Literal["xml", "masks"] = "xml"  # where the tags of VOC come from


@dataclass(frozen=True)
class Prepare:
    """Prepare an unpacked data set, and report what is there."""

    dataset: Positional[Literal["voc", "sbd", "coco"]]  # sbd adds train_aug to voc
    folder: Positional[Path]  # of the data set
    voc: Path | None = None  # SBD is added to this folder of VOC; default data/voc
    labels: Literal["xml", "masks"] = "xml"  # where the tags of VOC come from


@dataclass(frozen=True)
class Run:
    """Run all notebooks of a preset without a browser, or those of one number."""

    preset: Positional[Literal["run", "studies"]] = "run"  # run: one seed, short; studies: 3, full
    notebook: str = ""  # only those whose name starts with this, such as 02, or 2
    profile: str = ""  # replaces the preset's
    out: Path | None = None  # folder; default runs/<profile or preset>, and what is given by -p, -s
    processes: int = 1  # notebooks at a time
    # a parameter of the notebooks, by name and value
    p: Annotated[
        UseAppendAction[tuple[tuple[str, str], ...]], arg(aliases=["-p"], metavar="NAME VALUE")
    ] = ()
    s: Settings = ()  # a setting, such as box_threshold 0.3; `weclip settings` lists all

    def __post_init__(self) -> None:
        in_range("processes", self.processes, 1)


@dataclass(frozen=True)
class ListSettings:
    """List all settings of a profile with their values, for -s and `settings`."""

    profile: Positional[str] = "mini"


@dataclass(frozen=True)
class Sweep:
    """Run a grid, list all jobs or only those to do (waiting), run one, or collect the results."""

    action: Positional[Literal["run", "list", "waiting", "job", "collect"]]
    grid: Positional[Path]  # a YAML file
    name: Positional[str] = ""  # of a job that `list` names; for `job` alone
    out: Path | None = None  # folder; default runs/sweeps/<grid>
    processes: int = 1  # runs at a time

    def __post_init__(self) -> None:
        in_range("processes", self.processes, 1)


@dataclass(frozen=True)
class Runs:
    """List runs, the newest last: what was set, when and by which code; also unfinished ones."""

    folders: Positional[tuple[Path, ...]] = ()  # default the repository's runs/ and results/
    notebook: str = ""  # only those whose name starts with this, such as 02, or 2, train or score


@dataclass(frozen=True)
class Compare:
    """Compare runs of one notebook: which settings differ, and which scores, paired by seed."""

    runs: Positional[tuple[Path, ...]]  # folders, or a table in each; the first is the reference
    notebook: str = ""  # which of several in the folders, such as 02
    out: Path | None = None  # a CSV file for the comparison of scores

    def __post_init__(self) -> None:
        if len(self.runs) < 2:
            raise ValueError(f"{len(self.runs)} run(s) given: give two or more, see `weclip runs`")


@dataclass(frozen=True)
class Publish:
    """Copy the results of a complete `weclip run studies` to results/, and make the tables."""

    source: Path | None = None  # default runs/studies
    profile: str = "mini"  # of the runs


@dataclass(frozen=True)
class Bench:
    """Measure the cost of each part of a step, print it, and write results/bench/<machine>.csv."""

    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1  # of the CPU
    repeats: int = 5  # of the published step; others: 2
    scaling: bool = False  # also measure other batches, crops and classes
    profile: bool = False  # only print how the time of a step is spent

    def __post_init__(self) -> None:
        for name in ("threads", "repeats"):
            in_range(name, getattr(self, name), 1)


@dataclass(frozen=True)
class Pretrain:
    """Draw pictures of MiniVOC, train MiniCLIP on them, score it, and write data/miniclip-v2."""

    work: Path = Path("runs/pretrain")  # folder of the saved state
    out: Path | None = None  # folder of weights and card; default data/miniclip-v2
    processes: int = 2  # for drawing
    compile: bool = False  # faster; needs a C++ compiler

    def __post_init__(self) -> None:
        in_range("processes", self.processes, 1)


@dataclass(frozen=True)
class Site:
    """Make web pages from all executed notebooks, for reading offline."""

    out: Path | None = None  # default runs/site
    # Folders of runs with executed notebooks; default results/mini and runs/mini.
    source: tuple[Path, ...] = ()
