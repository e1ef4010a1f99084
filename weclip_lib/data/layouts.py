"""This module finds pictures, tags and masks, in VOC's layout or in a user's own folder.

A folder with `images/` and without `ImageSets/` is a user's own. Any other is in VOC's layout, as
prepared COCO is. Masks are looked for only on request, or for the split `masked`.
"""

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from weclip_lib.labels import VOC_BACKGROUNDS, LabelSet
from weclip_lib.storage.files import Unusable, files_below
from weclip_lib.storage.lists import (
    Report,
    alike_problem,
    class_problem,
    key_of,
    known_name,
    read_lines,
    read_names,
    read_rows,
    refuse,
    without_repeats,
)
from weclip_lib.storage.pictures import SUFFIXES, pictures_below

MASKED = "masked"  # split of a user's own folder: all pictures with a mask
VOC_PLACES = (".", "VOCdevkit/VOC2012", "VOC2012", "TrainVal/VOCdevkit/VOC2012")
SBD_PLACES = (".", "dataset", "benchmark_RELEASE/dataset")
VOC_HEADER = ("name", "labels")
OWN_HEADER = ("file", "tags")
NOTES = (".csv", ".txt", ".md", ".json")  # they may lie beside masks


@dataclass(frozen=True)
class Listing:
    """The pictures of a split, in order."""

    names: list[str]
    images: list[Path]
    tags: list[tuple[str, ...]]
    masks: list[Path]  # where masks belong; some may be missing


def find_place(folder: Path, places: Sequence[str], sign: str) -> Path:
    """Return the place in a folder where an archive was unpacked; `sign` has to lie in it.

    Raises:
        ValueError: If no place has it.
    """
    if not folder.exists():
        raise ValueError(f"{folder} is not there: give the folder of the data set")
    for place in places:
        if (folder / place / sign).exists():
            return folder / place
    raise ValueError(f"{folder} has no {sign}, nor has one of {', '.join(places[1:])} in it")


def data_root(folder: Path) -> Path:
    """Return the devkit in a folder with VOC's unpacked archive; any other folder as it is."""
    found = [place for place in VOC_PLACES if (folder / place / "JPEGImages").is_dir()]
    return folder / found[0] if found else folder


def is_own(folder: Path) -> bool:
    """Return whether the folder is a user's own and not in VOC's layout."""
    return (folder / "images").is_dir() and not (folder / "ImageSets").is_dir()


def _unknown_class(tag: str, classes: Sequence[str]) -> str:
    alike = [name for name in classes if key_of(name) == key_of(tag)]
    close = alike or difflib.get_close_matches(tag, classes, 1)
    use = f"did you mean {close[0]!r}?" if close else f"use {', '.join(classes)}"
    return class_problem(tag) or f"class {tag!r} does not exist: {use}"


def _tagged(
    rows: Iterable[dict], key: str, field: str, classes: Sequence[str] | None, report: Report
) -> dict[str, tuple[str, ...]]:
    """Return tags by name; report names that come twice, and tags that are no class.

    Args:
        classes: All classes; None: every tag that can be a class is one.
    """
    known = None if classes is None else set(classes)
    found: dict[str, tuple[str, ...]] = {}
    others: dict[str, str] = {}
    for row in rows:
        tags = tuple(dict.fromkeys(t.strip() for t in row[field].split(";") if t.strip()))
        usable = []
        for tag in tags:
            if known is None:
                problem = class_problem(tag) or alike_problem(tag, others)
            else:
                problem = None if tag in known else _unknown_class(tag, classes or ())
            if problem:
                report(f"{row['where']}: {problem}")
            else:
                usable.append(tag)
        name = unicodedata.normalize("NFC", row[key])
        if name in found:
            report(f"{row['where']}: {name!r} comes a second time")
        found[name] = tuple(usable)
    return found


def _absent(
    names: Sequence[str], there: Collection[str], folder: Path, table: Path, report: Report
) -> None:
    """Report the pictures of a table that are missing."""
    if names:
        meant = names[0].replace("\\", "/")
        ends = {PurePosixPath(meant).name.casefold(), PurePosixPath(meant).stem.casefold()}
        alike = [
            file for file in there if {file.casefold(), PurePosixPath(file).stem.casefold()} & ends
        ]
        remedy = f"did you mean {alike[0]!r}?" if alike else "add the pictures or remove the rows"
        slashes = "; write `/` between folders" if "\\" in names[0] else ""
        report(
            f"{table.name} names {names[0]!r} but {folder}/{names[0]} is not there "
            f"({len(names)} such rows): {remedy}{slashes}"
        )


def _voc(
    folder: Path, split: str, classes: Sequence[str], report: Report, with_masks: bool
) -> Listing:
    """List VOC's layout: pictures lie in JPEGImages, or in train2014/ and val2014/ for COCO."""
    listing = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listing.exists():
        found = sorted(path.stem for path in listing.parent.glob("[!.]*.txt"))
        raise ValueError(f"{listing} is missing: splits here are {', '.join(found) or 'none'}")
    table, root = folder / "labels.csv", folder / "JPEGImages"
    tags = _tagged(read_rows(table, VOC_HEADER, report=report), *VOC_HEADER, classes, report)
    if root.is_dir():
        there = files_below(root)
    else:  # COCO has train2014/ and val2014/
        root, places = folder, {PurePosixPath(name).parts[0] for name in tags if "/" in name}
        there = {
            f"{place}/{name}": path
            for place in sorted(places)
            if (folder / place).is_dir()
            for name, path in files_below(folder / place).items()
        }
    images: dict[str, Path] = {}
    for file, path in there.items():
        name = str(PurePosixPath(file).with_suffix(""))
        if path.suffix.lower() in SUFFIXES and images.setdefault(name, path) != path:
            report(f"{images[name]} and {path} differ in their ending alone: remove one")
    tags = {known_name(name, images) or name: found for name, found in tags.items()}
    names = read_names(listing, {*tags, *images}, report)
    bare = [name for name in names if name not in tags]
    if bare and tags:
        more = f" and {len(bare) - 1} more of {split}" if len(bare) > 1 else ""
        report(
            f"{table} has no row for {bare[0]!r}{more}: add `{bare[0]},…` to train or score by it"
        )
    _absent([f"{name}.jpg" for name in tags if name not in images], there, root, table, report)
    names = [name for name in names if name in images and name in tags]
    masks = []
    if with_masks:
        devkit, augmented = (folder / n for n in ("SegmentationClass", "SegmentationClassAug"))
        own, added = (set(files_below(place)) for place in (devkit, augmented))
        added -= own  # if both have a mask, the devkit's counts
        masks = [(augmented if f"{n}.png" in added else devkit) / f"{n}.png" for n in names]
    return Listing(names, [images[name] for name in names], [tags[name] for name in names], masks)


def _own(
    folder: Path, split: str, classes: Sequence[str] | None, report: Report, with_masks: bool
) -> Listing:
    """List a user's own folder: images/, labels.csv (file, tags, perhaps split), perhaps masks/."""
    table, pictures = folder / "labels.csv", folder / "images"
    rows = list(read_rows(table, OWN_HEADER, ("split",), report))
    tags = _tagged(rows, *OWN_HEADER, classes, report)
    there = files_below(pictures)
    absent = [file for file in tags if file not in there]
    _absent(absent, there, pictures, table, report)
    splits = {unicodedata.normalize("NFC", r["file"]): r.get("split") or "train" for r in rows}
    if MASKED in splits.values():
        report(
            f"{table} has a split {MASKED!r}, which means all that have a mask: name it otherwise"
        )
    by_name: dict[str, str] = {}
    for file in tags:
        name = str(PurePosixPath(file).with_suffix(""))
        if name in by_name:
            report(
                f"{pictures} has {by_name[name]!r} and {file!r}, which differ in their ending "
                "alone: rename one, since masks are found by that name"
            )
        by_name[name] = file
    masks = files_below(folder / "masks") if with_masks or split == MASKED else {}
    strays = [mask for mask in masks
              if PurePosixPath(mask).suffix.lower() not in NOTES
              and not (mask.endswith(".png") and mask.removesuffix(".png") in by_name)]  # fmt: skip
    if strays and not absent:
        example = next(iter(by_name), "NAME")
        report(
            f"{folder / 'masks' / strays[0]} belongs to no picture of labels.csv ({len(strays)} "
            f"such files): masks are called as their picture, masks/{example}.png; rename or "
            "remove it"
        )
    chosen = {
        name: file
        for name, file in by_name.items()
        if file in there and (f"{name}.png" in masks if split == MASKED else splits[file] == split)
    }
    if not chosen:
        known = ", ".join(sorted(set(splits.values()))) or "none"
        report(
            f"{table} has no picture of split {split!r}: splits here are {known}, "
            f"and {MASKED} for all that have a mask"
        )
    return Listing(
        list(chosen),
        [there[file] for file in chosen.values()],
        [tags[file] for file in chosen.values()],
        [folder / "masks" / f"{name}.png" for name in chosen],
    )


def read_listing(
    folder: Path,
    split: str,
    classes: Sequence[str],
    report: Report = refuse,
    *,
    with_masks: bool = False,
) -> Listing:
    """List the pictures of a split; leave out what cannot be used and is reported.

    Args:
        report: Gets every problem of the lists; by default, it raises the first one.
        with_masks: Whether masks are looked for.

    Raises:
        ValueError: If there is a problem, or no such split; the message names the first problem.
    """
    return (_own if is_own(folder) else _voc)(folder, split, classes, report, with_masks)


def without_row(folder: Path) -> list[str]:
    """Say which files in images/ of a user's own folder are not used."""
    images, left_out = pictures_below(folder / "images")
    rows = read_rows(folder / "labels.csv", OWN_HEADER, ("split",), lambda _: None)
    bare = sorted(set(images) - {unicodedata.normalize("NFC", row["file"]) for row in rows})
    about = f"{len(bare)} pictures are without a row in labels.csv ({bare[0]})" if bare else ""
    return [words for words in (about, left_out) if words]


def splits_of(folder: Path) -> list[str]:
    """Return the splits that a folder's lists name, and `masked` if there is masks/."""
    if not is_own(folder):
        lists = folder / "ImageSets" / "Segmentation"
        return sorted(path.stem for path in lists.glob("[!.]*.txt"))
    rows = read_rows(folder / "labels.csv", OWN_HEADER, ("split",), lambda _: None)
    named = {row.get("split") or "train" for row in rows}
    return sorted(named) + [MASKED] * (folder / "masks").is_dir()


def own_labels(folder: Path, report: Report = refuse) -> LabelSet:
    """Return the classes of a user's own folder, and their prompts.

    `classes.csv` (class, prompt; the prompt may be empty) names them in order. Without it, they
    are all tags of labels.csv, sorted. Background prompts are VOC's or the lines of
    `backgrounds.txt`, without those that are a class.

    Args:
        report: Gets every problem; by default, it raises the first one.

    Raises:
        ValueError: If a word cannot be a class, or there are no classes or background prompts.
    """
    table = folder / "classes.csv"
    prompts: dict[str, str] = {}
    if table.exists():
        names: dict[str, str] = {}
        words: dict[str, str] = {}
        for row in read_rows(table, ("class", "prompt"), report=report):
            name, prompt = row["class"], row["prompt"]
            problem = class_problem(name)
            if not problem and name in prompts:
                problem = f"class {name!r} comes a second time"
            problem = problem or alike_problem(name, names)
            if not problem and key_of(prompt or name) in words:
                other = words[key_of(prompt or name)]
                problem = f"{name!r} and {other!r} have one prompt: give each its own"
            if problem:
                report(f"{row['where']}: {problem}")
            else:
                prompts[name] = prompt
                words[key_of(prompt or name)] = name
    else:
        rows = read_rows(folder / "labels.csv", OWN_HEADER, ("split",), report)
        tags = _tagged(rows, *OWN_HEADER, None, report).values()
        prompts = dict.fromkeys(sorted({tag for found in tags for tag in found}), "")
    if not 0 < len(prompts) < 255:
        source = table if table.exists() else folder / "labels.csv"
        raise Unusable(f"{source} names {len(prompts)} classes: write 1 to 254")
    for name in prompts:
        parts = re.split(r"\s*(?:[/&+\\]|\band\b)\s*", name)
        if len(parts) > 1 and set(parts) <= set(prompts):
            report(f"class {name!r} is made of {', '.join(parts)}: separate classes by `;`")
    named = {key_of(word) for name, prompt in prompts.items() for word in (name, prompt)}
    listed, backgrounds = folder / "backgrounds.txt", VOC_BACKGROUNDS
    if listed.exists():
        lines = read_lines(listed, "one prompt")
        places = [(f"{listed}, line {number}", key_of(text)) for number, text in lines]
        for number, text in lines:
            if text.startswith("#") or "," in text or ";" in text:
                report(f"{listed}, line {number}: {text!r} is no prompt: write one a line, no more")
        kept = {where for where, _ in without_repeats(places, report)}
        backgrounds = [
            text for (_, text), (where, _) in zip(lines, places, strict=True) if where in kept
        ]
    backgrounds = tuple(name for name in backgrounds if key_of(name) not in named)
    if not backgrounds:
        raise Unusable(f"{listed} names classes alone: write what is often there and no class")
    return LabelSet(
        folder.resolve().name,
        tuple(prompts),
        backgrounds,
        {name: prompt for name, prompt in prompts.items() if prompt},
    )
