"""This module opens images with image-level labels; only scores and full supervision get masks.

`LabelledImages` cannot open a mask; the weakly supervised trainer gets one of these.
`MaskedImages` adds masks.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from weclip_lib.data.agreement import MANY, check_masks
from weclip_lib.data.layouts import data_root, is_own, own_labels, read_listing
from weclip_lib.data.profiles import Profile, get_profile
from weclip_lib.data.settings import with_settings
from weclip_lib.labels import LabelSet
from weclip_lib.storage.pictures import picture_problem, read_image, read_mask, squared
from weclip_lib.world.minivoc import SPLIT_SEEDS, write_voc


class LabelledImages:
    """The pictures of a split with their image-level labels; layouts.py says where they lie.

    The constructor checks lists, and the header and end of every picture, before any long work.

    Args:
        folder: The data set's folder.
        split: The split's name.
        labels: Class names.
        min_size: Smallest side a picture may have, in pixels: one patch.
        limit: Use only the first so many pictures; 0: all.
        square: Show every picture and mask as a square of so many pixels a side
            (`pictures.squared`); 0: as they are.
        skip_broken: Decode every picture at the start, leave out the broken ones, and keep their
            faults in `broken`.

    Raises:
        ValueError: If something is missing, unreadable or too small; the message names the first.
    """

    has_masks = False

    def __init__(
        self,
        folder: Path,
        split: str,
        labels: LabelSet,
        *,
        min_size: int = 1,
        limit: int = 0,
        square: int = 0,
        skip_broken: bool = False,
    ) -> None:
        self.folder, self.split, self.labels, self.square = folder, split, labels, square
        listing = read_listing(folder, split, labels.classes, with_masks=self.has_masks)
        rows = range(len(listing.names))[: limit or None]
        look = partial(picture_problem, min_size=min_size, thorough=skip_broken)
        with ThreadPoolExecutor() as pool:
            paths = [listing.images[row] for row in rows]
            problems = list(pool.map(look, paths))
        self.broken = [problem for problem in problems if problem]
        if self.broken and not skip_broken:
            more = f" (and {len(self.broken) - 1} more)" if len(self.broken) > 1 else ""
            raise ValueError(f"{self.broken[0]}{more}")
        kept = [row for row, problem in zip(rows, problems, strict=True) if not problem]
        self.names = [listing.names[row] for row in kept]
        self.images = [listing.images[row] for row in kept]
        self.tags = [listing.tags[row] for row in kept]
        self._masks = [listing.masks[row] for row in kept] if self.has_masks else []
        columns = {name: column for column, name in enumerate(labels.classes)}
        table = torch.zeros(len(kept), len(columns))
        for position, row in enumerate(kept):
            table[position, [columns[tag] for tag in listing.tags[row]]] = 1
        self.image_labels: Float[Tensor, "image fg"] = table

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """Decode picture `index`."""
        image = read_image(self.images[index])
        return squared(image, self.square) if self.square else image

    @cached_property
    def digests(self) -> dict[str, str]:
        """Return hashes of what training sees: names with tags, and the bytes of the files."""
        lists = "labels.csv" if is_own(self.folder) else f"{self.split}.txt and labels.csv"
        tags = repr((self.names, self.image_labels.tolist(), self.square))
        found = {f"names and tags ({lists})": sha256(tags.encode()).hexdigest()}
        found["pictures"] = _digest(self.images)
        return found | ({"masks": _digest(self._masks)} if self.has_masks else {})

    def digest(self) -> str:
        """Return one hash of all `digests`."""
        return sha256(repr(self.digests).encode()).hexdigest()


def _digest(paths: Sequence[Path]) -> str:
    """Return a hash of the files' bytes, in order."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda path: sha256(path.read_bytes()).hexdigest(), paths)
        bar = tqdm(found, total=len(paths), desc="reading files", disable=len(paths) < MANY)
        return sha256(repr(list(bar)).encode()).hexdigest()


class MaskedImages(LabelledImages):
    """`LabelledImages` with masks, for scores and for the fully supervised trainer.

    The constructor reads every mask, and compares it with its picture's size and tags.

    Raises:
        ValueError: If a mask is missing, unreadable, of another size, or has other classes than
            its picture's tags; the message names the first. If only a few masks of a devkit
            disagree with the tags, they are only reported.
    """

    has_masks = True

    def __init__(self, *place, skip_broken: bool = False, **how) -> None:
        super().__init__(*place, skip_broken=skip_broken, **how)
        found = check_masks(
            self._masks, self.images, self.tags, self.labels.classes, strict=is_own(self.folder)
        )
        if found.problems:
            more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
            raise ValueError(f"{found.problems[0]}{more}")
        for remark in found.remarks:
            tqdm.write(remark, file=sys.stderr)

    def mask(self, index: int) -> UInt8[np.ndarray, "height width"]:
        """Read the class ids of picture `index`; IGNORE_INDEX is void."""
        mask = read_mask(self._masks[index], self.labels.class_count)
        return squared(mask, self.square, nearest=True) if self.square else mask


def normalise(
    images: Sequence[UInt8[np.ndarray, "height width 3"]],
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
) -> Float[Tensor, "batch 3 height width"]:
    """Stack pictures of one size, and scale each channel by its (mean, std) in [0, 1]."""
    return normalise_pixels(torch.from_numpy(np.stack(images)), statistics)


def normalise_pixels(
    pixels: UInt8[Tensor, "batch height width 3"],
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
) -> Float[Tensor, "batch 3 height width"]:
    """Scale stacked pictures as `normalise` does, on their device."""
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in statistics)
    channels = pixels.permute(0, 3, 1, 2).float()
    return ((channels - mean.to(pixels.device)) / std.to(pixels.device)).contiguous()


def batches(order: Sequence[int], size: int) -> Iterator[list[int]]:
    """Cut `order` into lists of `size`; the last may be shorter."""
    for start in range(0, len(order), size):
        yield list(order[start : start + size])


def open_profile(
    name: str, data_dir: str = "", weights: str = "", settings: Mapping = {}
) -> tuple[Profile, Path]:
    """Return a profile and the folder of its pictures; a user's own folder names the classes.

    Args:
        data_dir: Where the pictures are; empty: as in `data_folder`.
        weights: A tag or a file for the backbone; empty: the profile's.
        settings: Changed settings, as in `settings.with_settings`.

    Raises:
        ValueError: If there is no such profile or setting, or its pictures are not there.
    """
    profile = with_settings(get_profile(name), settings)
    if name == "folder" and not data_dir:
        raise ValueError("profile folder needs data_dir: a folder with images/ and labels.csv")
    folder = data_folder(profile, data_dir)
    if is_own(folder):
        profile = replace(profile, labels=own_labels(folder))
    return replace(profile, weights=weights or profile.weights), folder


def data_folder(profile: Profile, data_dir: str = "") -> Path:
    """Return the folder of a profile's pictures; draw MiniVOC there first if necessary.

    Args:
        data_dir: Where the pictures are; empty: data/<profile>, or data/minivoc-<profile>. MiniVOC
            is drawn into an empty folder.

    Raises:
        ValueError: If the folder is not there, or lacks pictures that this library cannot draw.
    """
    if data_dir and not Path(data_dir).is_dir():
        raise ValueError(f"data_dir is {data_dir}: there is no such folder, seen from {Path.cwd()}")
    folder = Path(data_dir) if data_dir else profile.default_folder
    if any(profile.drawn):
        return write_voc(folder, dict(zip(SPLIT_SEEDS, profile.drawn, strict=True)), profile.world)
    folder = data_root(folder)
    if not (is_own(folder) or (folder / "ImageSets").is_dir()):
        raise ValueError(
            f"no {profile.labels.name} at {folder}: see data/README.md, and pass data_dir"
        )
    return folder
