"""Decide what predict reads and writes, before it does either.

Predict replaces only files that it wrote. A list in --out holds their hashes.
"""

import csv
import io
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from tqdm import tqdm

from weclip_lib.data.layouts import data_root, is_own
from weclip_lib.storage.files import Unusable, files_below, reading, whole
from weclip_lib.storage.lists import read_names, read_text
from weclip_lib.storage.pictures import SUFFIXES, pictures_below

LIST = "predicted.csv"  # in --out; names all files that predict wrote there
HEADER = "file,sha256"
LEGEND = "classes.csv"
OVERLAYS = "overlays"
VOC_SERVER = "results/VOC2012/Segmentation/comp6_test_cls"  # comp6 allows outside data
DEVKIT_MASKS = ("SegmentationClass", "SegmentationClassAug", "SegmentationObject")
ELSEWHERE = "choose another --out"


def _say(words: str) -> None:
    tqdm.write(words, file=sys.stderr)


def find_images(
    places: Sequence[Path], *, names: Path | None = None, out: Path | None = None
) -> dict[str, Path]:
    """Find pictures by name without suffix: the given files, and those below the given folders.

    In a folder of one's own, only `images/` counts; in a devkit, only `JPEGImages/`. Masks of a
    devkit, files that predict wrote and all below `out` are left out, with a message.

    Args:
        names: A list; only these count.
        out: Folder of the masks.

    Raises:
        ValueError: If a place or a name is missing, there is no picture, or two have one name.
    """
    found: list[tuple[str, Path]] = []
    for place in places:
        if place.is_dir():
            found += _inside(place, out)
        elif place.exists():
            found.append((normalize("NFC", place.name), place))
        else:
            raise Unusable(f"{place} is not there: give pictures, or folders of them")
    if not found:
        raise Unusable(f"no picture in {', '.join(map(str, places))}: looked for {SUFFIXES}")
    if names:
        known = defaultdict(dict)
        for file, path in found:
            known[file][path] = known[_stem(file)][path] = file
        chosen = [known[name] for name in read_names(names, known.keys())]
        found = [(file, path) for some in chosen for path, file in some.items()]
    images: dict[str, Path] = {}
    for file, path in found:
        other = images.setdefault(_stem(file), path)
        if os.path.realpath(other) != os.path.realpath(path):
            raise Unusable(f"{other} and {path} would write the same mask: rename one")
    return images


def _stem(file: str) -> str:
    return str(PurePosixPath(file).with_suffix(""))


def _inside(place: Path, out: Path | None) -> list[tuple[str, Path]]:
    """Find a folder's pictures, by their path in it; say what is left out."""
    folder = place / "images" if is_own(place) else data_root(place)
    folder = folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else folder
    if folder != place:
        _say(f"of {place}, only the pictures in {folder} are meant")
    pictures, others = pictures_below(folder)
    masks = _masks_below(folder, pictures, out)
    if masks:
        _say(f"left out in {folder}: {len(masks)} files that are masks, or predict's ({masks[0]})")
    if others:
        _say(others)
    for name in masks:
        del pictures[name]
    return list(pictures.items())


def _masks_below(folder: Path, pictures: dict[str, Path], out: Path | None) -> list[str]:
    """Find pictures not to label: files that predict wrote, and masks of a devkit."""
    written = _written(folder)
    devkit = [f"{name}/" for name in DEVKIT_MASKS if (folder / "ImageSets").is_dir()]
    real, target = folder.resolve(), out.resolve() if out else Path()
    inside = target != real and target.is_relative_to(real)
    found = []
    for name, path in pictures.items():
        place = path.parent.resolve() / path.name
        below = inside and place.is_relative_to(target)
        if below or place in written or name.startswith(tuple(devkit)):
            found.append(name)
    return found


def _written(folder: Path) -> set[Path]:
    """Find all files that predict wrote into a folder, with any --out."""
    lists = [path for path in files_below(folder).values() if path.name == LIST]
    lists += [parent / LIST for parent in folder.resolve().parents]
    found = set()
    for path in lists:
        with suppress(Unusable):  # someone else's file of that name
            found |= {path.parent.resolve() / name for name in _read_list(path)}
    return found


def _read_list(path: Path) -> dict[str, set[str]]:
    """Read the hashes of each file in a list.

    Raises:
        Unusable: If predict did not write the list.
    """
    header, *lines = read_text(path).split("\n")
    if header.rstrip("\r") != HEADER:
        raise Unusable(f"{path} is no list of predict's: {ELSEWHERE}")
    found = defaultdict(set)
    for line in lines:  # one by one: a run that was killed may have left half a line
        cells = next(csv.reader([line.rstrip("\r")]), [])
        if len(cells) == 2:
            found[cells[0]].add(cells[1])
    return found


def _digest(path: Path) -> str:
    with reading(path, ELSEWHERE):
        return sha256(path.read_bytes()).hexdigest()


class Written:
    """The files that predict wrote into a folder, and their hashes.

    Raises:
        Unusable: If predict did not write the list there.
    """

    def __init__(self, out: Path) -> None:
        self.out, self._list = out, out / LIST
        self._hashes = _read_list(self._list) if os.path.lexists(self._list) else defaultdict(set)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()

    def check(self, path: Path) -> None:
        """Refuse to replace a file that predict did not write.

        Raises:
            Unusable: If another or a changed file or a folder is there, or a file is where its
                folder has to be.
        """
        for folder in path.parents[: len(path.relative_to(self.out).parts) - 1]:
            if os.path.lexists(folder) and not folder.is_dir():
                raise Unusable(f"{folder} has to be a folder, for {path}: {ELSEWHERE}")
        if not os.path.lexists(path):
            return
        if not path.is_file() or _digest(path) not in self._hashes[self._name(path)]:
            raise Unusable(
                f"{path} is there, but not as this command left it, or not by it: {ELSEWHERE}"
            )

    @contextmanager
    def whole(self, path: Path) -> Iterator[Path]:
        """Write as `files.whole` does; record the hash before the file has its name.

        Raises:
            Unusable: If another file has appeared there.
        """
        with whole(path) as partial:
            yield partial
            self.check(path)
            self._keep(self._name(path), _digest(partial))

    def _keep(self, name: str, digest: str) -> None:
        if digest in self._hashes[name]:
            return
        if not self._list.exists():
            with whole(self._list) as partial:
                partial.write_text(f"{HEADER}\n", encoding="utf-8", newline="")
        row = io.StringIO()
        csv.writer(row, lineterminator="\n").writerow((name, digest))
        with self._list.open("ab+") as file:
            file.seek(-1, os.SEEK_END)
            half = file.read() != b"\n"  # a killed run left it
            file.write(b"\n" * half + row.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
        self._hashes[name].add(digest)


@dataclass(frozen=True)
class Plan:
    """Where the masks of pictures go, and the overlays if wanted."""

    images: dict[str, Path]  # by name
    out: Path
    masks: Path  # folder
    overlays: Path | None  # folder

    def targets(self, name: str) -> list[Path]:
        """Paths of the mask of a picture, and of its overlay."""
        folders = [self.masks, self.overlays] if self.overlays else [self.masks]
        return [folder / f"{name}.png" for folder in folders]


def plan_outputs(
    images: dict[str, Path], out: Path, *, overlays: bool = False, voc_server: bool = False
) -> Plan:
    """Plan all outputs, and check that nothing is in the way. Nothing is written.

    Raises:
        ValueError: If something is in the way, or two pictures would write one file.
    """
    refuse_data_set(out)
    plan = Plan(
        images,
        out,
        out / VOC_SERVER if voc_server else out,
        out / OVERLAYS if overlays else None,
    )
    written = Written(out)
    written.check(out / LEGEND)
    pictures = {os.path.realpath(path) for path in images.values()}
    makers: dict[Path, Path] = {}
    for name, image in images.items():
        for target in plan.targets(name):
            other = makers.setdefault(target, image)
            if other is not image:
                raise Unusable(f"{other} and {image} would both write {target}: rename one")
    files = {out / LEGEND, out / LIST, *makers}
    for target, image in makers.items():
        _check_name(target, image)
        inner = files.intersection(target.parents)
        if inner:
            raise Unusable(f"{image} would write below {inner.pop()}, a file: rename its folder")
        if os.path.realpath(target) in pictures:
            raise Unusable(f"{target} is one of the pictures: {ELSEWHERE}")
        written.check(target)
    return plan


def _check_name(target: Path, image: Path) -> None:
    """Refuse a name that the list cannot hold."""
    try:
        str(target).encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"{str(image)!a} has a name that is not in UTF-8: rename it") from error
    if "\n" in str(target) or "\r" in str(target):
        raise Unusable(f"{str(image)!r} has a line break in its name: rename it")


def refuse_data_set(out: Path) -> None:
    """Refuse to write where files would count as part of a data set.

    Raises:
        Unusable: If `out` is a data set, or below its masks.
    """
    real = out.resolve()
    if is_own(real) or (real / "ImageSets").is_dir():
        raise Unusable(f"{out} is a data set, and what is written would be part of it: {ELSEWHERE}")
    for folder in (real, *real.parents):
        own = folder.name == "masks" and is_own(folder.parent)
        devkit = folder.name in DEVKIT_MASKS and (folder.parent / "ImageSets").is_dir()
        if own or devkit:
            raise Unusable(f"{out} is for masks that somebody drew, and true: {ELSEWHERE}")
