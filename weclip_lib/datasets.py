"""Images with image-level labels, in VOC layout; masks only for evaluation and full supervision.

`LabelledImages` cannot open a mask: the weakly supervised trainer is given one of these.
`MaskedImages` adds masks.
"""

import csv
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from weclip_lib.config import Profile
from weclip_lib.labels import IGNORE_INDEX, LabelSet
from weclip_lib.minivoc import SPLIT_SEEDS, write_voc

DATA = Path(__file__).resolve().parents[1] / "data"


def read_image(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    """Decode an RGB picture.

    Raises:
        ValueError: If the file cannot be decoded or is not RGB.
    """
    try:
        with Image.open(path) as image:
            if image.mode != "RGB":
                raise ValueError(
                    f"{path} is a picture of mode {image.mode}: convert it to RGB, "
                    "for example with Image.open(path).convert('RGB').save(path)"
                )
            return np.array(image)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read ({error}): replace or remove it") from error


def read_labels(path: Path, classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read `name,labels` rows; labels are separated by `;` and may be empty.

    Raises:
        ValueError: If the header is not that, a name comes twice, or a class does not exist.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing: write one row `name,labels` for each picture")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != ["name", "labels"]:
            raise ValueError(f"{path} has the header {reader.fieldnames}: it must be name,labels")
        labels: dict[str, tuple[str, ...]] = {}
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if row["labels"] is None:
                raise ValueError(f"{where}: no comma; write `name,` for a picture of no class")
            tags = tuple(tag.strip() for tag in row["labels"].split(";") if tag.strip())
            unknown = [tag for tag in tags if tag not in classes]
            if unknown:
                raise ValueError(
                    f"{where}: class {unknown[0]!r} does not exist: use {', '.join(classes)}"
                )
            if row["name"] in labels:
                raise ValueError(f"{where}: {row['name']!r} comes a second time")
            labels[row["name"]] = tags
    return labels


class LabelledImages:
    """A split of a folder in VOC layout: JPEGImages, ImageSets/Segmentation, labels.csv.

    Everything is checked when it is made, before any long work.

    Args:
        folder: Of the data set.
        split: Name of the list in ImageSets/Segmentation.
        labels: Class names.
        min_size: Smallest side a picture may have, in pixels: one patch.
        limit: Only the first so many pictures; 0: all.

    Raises:
        ValueError: Naming the first thing that is missing, unreadable, not RGB or too small.
    """

    def __init__(
        self, folder: Path, split: str, labels: LabelSet, *, min_size: int = 1, limit: int = 0
    ) -> None:
        self.folder, self.split, self.labels = folder, split, labels
        listing = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not listing.exists():
            found = sorted(path.stem for path in listing.parent.glob("*.txt"))
            raise ValueError(f"{listing} is missing: splits here are {', '.join(found) or 'none'}")
        self.names = listing.read_text().split()[: limit or None]
        tags = read_labels(folder / "labels.csv", labels.classes)
        table = torch.zeros(len(self.names), len(labels.classes))
        for row, name in enumerate(self.names):
            if name not in tags:
                raise ValueError(f"{folder / 'labels.csv'} has no row for {name!r}: add `{name},…`")
            table[row, [labels.classes.index(tag) for tag in tags[name]]] = 1
        absent = sorted(set(tags) - {path.stem for path in (folder / "JPEGImages").iterdir()})
        if absent:
            raise ValueError(
                f"labels.csv names {absent[0]!r} but {folder}/JPEGImages/{absent[0]}.jpg "
                f"is not there ({len(absent)} such rows): add the pictures or remove the rows"
            )
        self.image_labels: Float[Tensor, "image fg"] = table
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: self._check(name, min_size), self.names))

    def _check(self, name: str, min_size: int) -> None:
        height, width, _ = read_image(self._image_path(name)).shape
        if min(height, width) < min_size:
            raise ValueError(
                f"{self._image_path(name)} is {width}x{height} pixels, smaller than one patch "
                f"of {min_size}: enlarge or remove it"
            )

    def _image_path(self, name: str) -> Path:
        return self.folder / "JPEGImages" / f"{name}.jpg"

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """Decode picture `index`."""
        return read_image(self._image_path(self.names[index]))

    def digest(self) -> str:
        """Hash of names, labels and picture files: changes when any of them does."""
        total = sha256(repr((self.names, self.image_labels.tolist())).encode())
        for name in self.names:
            total.update(self._image_path(name).read_bytes())
        return total.hexdigest()


class MaskedImages(LabelledImages):
    """The same with masks, for scores and for the fully supervised trainer."""

    def mask(self, index: int) -> UInt8[np.ndarray, "height width"]:
        """Class ids of picture `index`, IGNORE_INDEX where void.

        Raises:
            ValueError: If the mask is missing, or holds an id of no class.
        """
        path = self.folder / "SegmentationClass" / f"{self.names[index]}.png"
        if not path.exists():
            raise ValueError(f"{path} is missing: scores and full supervision need every mask")
        with Image.open(path) as image:
            mask = np.array(image)
        wrong = (mask >= self.labels.class_count) & (mask != IGNORE_INDEX)
        if wrong.any():
            raise ValueError(f"{path} holds class id {mask[wrong][0]}: there is no such class")
        return mask


def normalise(
    images: Sequence[UInt8[np.ndarray, "height width 3"]],
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
) -> Float[Tensor, "batch 3 height width"]:
    """Stack pictures of one size and scale them by per-channel (mean, std) in [0, 1]."""
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in statistics)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return ((stacked.float() - mean) / std).contiguous()


def batches(order: Sequence[int], size: int) -> Iterator[list[int]]:
    """Cut `order` into lists of `size`; the last may be shorter."""
    for start in range(0, len(order), size):
        yield list(order[start : start + size])


def data_folder(profile: Profile, data_dir: str = "") -> Path:
    """The folder of a profile's pictures; MiniVOC is drawn there first if need be.

    Args:
        data_dir: Where the user keeps the data set; default data/<profile>.

    Raises:
        ValueError: If pictures that cannot be drawn are not there.
    """
    if any(profile.drawn):
        folder = Path(data_dir) if data_dir else DATA / f"minivoc-{profile.name}"
        return write_voc(folder, dict(zip(SPLIT_SEEDS, profile.drawn, strict=True)))
    folder = Path(data_dir) if data_dir else DATA / profile.name
    if not (folder / "JPEGImages").is_dir():
        raise ValueError(
            f"no {profile.labels.name} at {folder}: see data/README.md, and pass data_dir"
        )
    return folder
