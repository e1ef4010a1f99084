"""Where pictures, tags and masks lie: in VOC's layout (COCO's too, once prepared), or one's own.

A folder with `images/` and `labels.csv` is one's own; any other is in VOC's layout.
"""

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from weclip_lib.labels import VOC_BACKGROUNDS, LabelSet

MASKED = "masked"  # split of one's own folder: all pictures that have a mask
VOC_PLACES = (".", "VOCdevkit/VOC2012", "VOC2012", "TrainVal/VOCdevkit/VOC2012")
SBD_PLACES = (".", "dataset", "benchmark_RELEASE/dataset")
VOC_HEADER = ("name", "labels")
OWN_HEADER = ("file", "tags")
Report = Callable[[str], None]


@dataclass(frozen=True)
class Listing:
    """The pictures of a split, in order."""

    names: list[str]
    images: list[Path]
    tags: list[tuple[str, ...]]
    masks: list[Path]  # where a mask belongs; not all have to be there


def find_place(folder: Path, places: Sequence[str], sign: str) -> Path:
    """Where in a folder an archive was unpacked, by something that has to be there.

    Raises:
        ValueError: If it is nowhere.
    """
    for place in places:
        if (folder / place / sign).exists():
            return folder / place
    raise ValueError(f"{folder} has no {sign}, nor has one of {', '.join(places[1:])} in it")


def data_root(folder: Path) -> Path:
    """The devkit in a folder that VOC's archive was unpacked to; any other folder as it is."""
    found = [place for place in VOC_PLACES if (folder / place / "JPEGImages").is_dir()]
    return folder / found[0] if found else folder


def is_own(folder: Path) -> bool:
    """Whether the folder is one's own and not in VOC's layout."""
    return (folder / "images").is_dir() and not (folder / "ImageSets").is_dir()


def refuse(problem: str) -> None:
    """Stop at the first problem; a doctor collects them instead."""
    raise ValueError(problem)


def _rows(
    path: Path, needed: Sequence[str], allowed: Sequence[str] = (), report: Report = refuse
) -> Iterator[dict]:
    """Rows of a CSV file, with file and line as `where`; what cannot be a row is reported."""
    if not path.exists():
        report(f"{path} is missing: write one row `{','.join(needed)}` for each picture")
        return
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            if not set(needed) <= set(header) <= {*needed, *allowed}:
                extra = f" (and may have {', '.join(allowed)})" if allowed else ""
                report(f"{path} has the header {header}: it must be {','.join(needed)}{extra}")
                return
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                missing = [name for name in header if row[name] is None]
                if missing == [needed[-1]]:
                    report(f"{where}: no comma; write `{row[needed[0]]},` where there is nothing")
                elif missing:
                    report(f"{where}: no field {missing[0]}")
                elif None in row:
                    report(f"{where}: more fields than the header: separate tags by `;`")
                else:
                    yield {**row, "where": where}
    except UnicodeDecodeError as error:
        report(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}): save it so")


def _tagged(
    rows: Iterable[dict], key: str, field: str, classes: Sequence[str] | None, report: Report
) -> dict[str, tuple[str, ...]]:
    """Tags by name; names that come twice and unknown tags are reported."""
    known = None if classes is None else set(classes)
    found: dict[str, tuple[str, ...]] = {}
    for row in rows:
        tags = tuple(tag.strip() for tag in row[field].split(";") if tag.strip())
        for tag in tags if known is not None else ():
            if tag not in known:
                use = ", ".join(classes or ())
                report(f"{row['where']}: class {tag!r} does not exist: use {use}")
        if row[key] in found:
            report(f"{row['where']}: {row[key]!r} comes a second time")
        found[row[key]] = tuple(tag for tag in tags if known is None or tag in known)
    return found


def _files(folder: Path) -> set[str]:
    """Relative paths of all files below a folder."""
    found = set()
    for where, _, names in os.walk(folder):
        below = Path(where).relative_to(folder).as_posix()
        found |= {name if below == "." else f"{below}/{name}" for name in names}
    return found


def _present(files: Iterable[str], folder: Path, table: Path, report: Report) -> set[str]:
    """Those of the files that are there; the others are reported."""
    there = _files(folder)
    absent = [file for file in files if file not in there]
    if absent:
        report(
            f"{table.name} names {absent[0]!r} but {folder}/{absent[0]} "
            f"is not there ({len(absent)} such rows): add the pictures or remove the rows"
        )
    return there


def _voc(folder: Path, split: str, classes: Sequence[str], report: Report) -> Listing:
    """VOC's layout: pictures in JPEGImages, or in the folder itself as COCO has them."""
    listing = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listing.exists():
        found = sorted(path.stem for path in listing.parent.glob("*.txt"))
        raise ValueError(f"{listing} is missing: splits here are {', '.join(found) or 'none'}")
    names, table = listing.read_text().split(), folder / "labels.csv"
    tags = _tagged(_rows(table, VOC_HEADER, report=report), *VOC_HEADER, classes, report)
    bare = [name for name in names if name not in tags]
    if bare and tags:
        more = f" and {len(bare) - 1} more of {split}" if len(bare) > 1 else ""
        report(
            f"{table} has no row for {bare[0]!r}{more}: add `{bare[0]},…` to train or score by it"
        )
    root = folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else folder
    there = _present(
        (f"{name}.jpg" for name in {**dict.fromkeys(names), **tags}), root, table, report
    )
    names = [name for name in names if f"{name}.jpg" in there and name in tags]
    devkit, augmented = (folder / name for name in ("SegmentationClass", "SegmentationClassAug"))
    added = _files(augmented) - _files(devkit)  # where both have a mask, the devkit's own counts
    return Listing(
        names,
        [root / f"{name}.jpg" for name in names],
        [tags[name] for name in names],
        [(augmented if f"{n}.png" in added else devkit) / f"{n}.png" for n in names],
    )


def _own(folder: Path, split: str, classes: Sequence[str] | None, report: Report) -> Listing:
    """One's own: images/, labels.csv with file, tags and perhaps split; masks/ if there are any."""
    table, pictures = folder / "labels.csv", folder / "images"
    rows = list(_rows(table, OWN_HEADER, ("split",), report))
    tags = _tagged(rows, *OWN_HEADER, classes, report)
    there = _present(tags, pictures, table, report)
    splits = {row["file"]: row.get("split") or "train" for row in rows}
    by_name: dict[str, str] = {}
    for file in tags:
        name = file.rpartition(".")[0]
        if name in by_name:
            report(
                f"{pictures} has {by_name[name]!r} and {file!r}, which differ in their ending "
                "alone: rename one, since masks are found by that name"
            )
        by_name[name] = file
    masks = _files(folder / "masks")
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
        [pictures / file for file in chosen.values()],
        [tags[file] for file in chosen.values()],
        [folder / "masks" / f"{name}.png" for name in chosen],
    )


def read_listing(
    folder: Path, split: str, classes: Sequence[str], report: Report = refuse
) -> Listing:
    """The pictures of a split; of those that are reported, what can be used.

    Args:
        report: Called with every problem of the lists; by default, the first one is raised.

    Raises:
        ValueError: Naming the first problem, or if there is no such split.
    """
    return (_own if is_own(folder) else _voc)(folder, split, classes, report)


def splits_of(folder: Path) -> list[str]:
    """The splits that a folder's lists name."""
    if not is_own(folder):
        return sorted(path.stem for path in (folder / "ImageSets" / "Segmentation").glob("*.txt"))
    rows = _rows(folder / "labels.csv", OWN_HEADER, ("split",), lambda _: None)
    named = {row.get("split") or "train" for row in rows}
    return sorted(named) + [MASKED] * (folder / "masks").is_dir()


def own_labels(folder: Path) -> LabelSet:
    """Classes of one's own folder, and what they are prompted by.

    `classes.csv` (class, prompt; the prompt may be empty) names them in order; without it, they
    are all tags of labels.csv in the order of the alphabet. Background prompts are VOC's, without
    those that are a class, or the lines of `backgrounds.txt`.

    Raises:
        ValueError: If a class comes twice, or there is none.
    """
    table = folder / "classes.csv"
    prompts: dict[str, str] = {}
    if table.exists():
        for row in _rows(table, ("class", "prompt")):
            name = row["class"].strip()
            if not name or name in prompts:
                problem = f"class {name!r} comes a second time" if name else "a class without name"
                raise ValueError(f"{row['where']}: {problem}")
            prompts[name] = row["prompt"].strip()
    else:
        rows = _rows(folder / "labels.csv", OWN_HEADER, ("split",))
        tags = _tagged(rows, *OWN_HEADER, None, refuse).values()
        prompts = dict.fromkeys(sorted({tag for found in tags for tag in found}), "")
    if not 0 < len(prompts) < 255:
        raise ValueError(f"{folder} has {len(prompts)} classes: give 1 to 254")
    listed = folder / "backgrounds.txt"
    backgrounds = listed.read_text("utf-8").splitlines() if listed.exists() else VOC_BACKGROUNDS
    named = {n for name, prompt in prompts.items() for n in (name, prompt)}
    return LabelSet(
        folder.resolve().name,
        tuple(prompts),
        tuple(name for name in backgrounds if name.strip() and name not in named),
        {name: prompt for name, prompt in prompts.items() if prompt},
    )
