"""Keep the counts of every picture beside a table, and read them again.

`<name>_images.npz` holds `about`, a JSON text in UTF-8, and four columns of numbers with an entry
for every picture, cell of its mask and predicted class that occur together (`regions.ENTRY`). The
entries of a row of the table follow each other; `about` says how many there are.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from weclip_lib.evaluation.quality import ImageCounts
from weclip_lib.evaluation.regions import BAND, CELLS_OF_CLASS, ENTRY, SIZE_FRAME, SIZE_LIMITS
from weclip_lib.storage.files import reading, whole

SUFFIX = "_images.npz"
FORMAT = 1
REMEDY = "it is damaged or of another kind: make the run again"


class Row(NamedTuple):
    """What a row of a score table is about; its metric begins with `miou`."""

    variant: str
    split: str
    metric: str
    seed: int


@dataclass(frozen=True)
class Kept:
    """The counts behind the rows of a table."""

    classes: tuple[str, ...]  # background first
    rows: dict[Row, ImageCounts]


def write_counts(path: Path, rows: Mapping[Row, ImageCounts], classes: Sequence[str]) -> None:
    """Write counts of pictures, whole. The same counts give the same bytes.

    Args:
        rows: Counts behind every row of the table, all with the same classes.
        classes: Names of the classes, background first.

    Raises:
        ValueError: If a metric does not begin with `miou`, or the classes do not fit.
    """
    pictures: dict[tuple[str, ...], int] = {}
    listed = []
    for row, counts in rows.items():
        if not row.metric.startswith("miou"):
            raise ValueError(f"the metric of {row} has to begin with miou: rename it")
        if counts.class_count != len(classes):
            raise ValueError(f"{row} counts {counts.class_count} classes, not {len(classes)}")
        number = pictures.setdefault(counts.names, len(pictures))
        listed.append([*row, number, len(counts.entries)])
    about = {
        "format": FORMAT,
        "classes": list(classes),
        "band": BAND,
        "size limits": list(SIZE_LIMITS),
        "size frame": SIZE_FRAME,
        "pictures": [list(names) for names in pictures],
        "rows": listed,
    }
    entries = np.concatenate([np.zeros(0, ENTRY), *(counts.entries for counts in rows.values())])
    columns = {name: entries[name] for name in ENTRY.names}
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with whole(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, about=text, **columns)


def read_counts(path: Path) -> Kept:
    """Read what `write_counts` wrote.

    Raises:
        Unusable: If the file is missing or damaged, or no such file.
    """
    with reading(path, REMEDY):
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {about['format']!r}, not {FORMAT}")
            entries = np.zeros(len(file["pixels"]), ENTRY)
            for name in ENTRY.names:
                if file[name].dtype != ENTRY[name] or file[name].shape != entries.shape:
                    raise ValueError(f"its column {name} does not fit")
                entries[name] = file[name]
        classes = tuple(about["classes"])
        pictures = [tuple(names) for names in about["pictures"]]
        rows, start = {}, 0
        for variant, split, metric, seed, number, length in about["rows"]:
            part = entries[start : start + length]
            counts = ImageCounts(pictures[number], len(classes), part)
            _check(counts)
            rows[Row(variant, split, metric, seed)] = counts
            start += length
        if not rows or start != len(entries) or len(rows) != len(about["rows"]):
            raise ValueError("its rows are not those of its entries")
        return Kept(classes, rows)


def _check(counts: ImageCounts) -> None:
    """Refuse numbers that no picture can have."""
    entries, background = counts.entries, counts.true == 0
    fits = (
        (entries["picture"] < len(counts.names))
        & (entries["cell"] < counts.class_count * CELLS_OF_CLASS)
        & (entries["predicted"] < counts.class_count)
        & ((counts.size == 0) == background)
        & (entries["pixels"] > 0)
    )
    if not fits.all():
        raise ValueError(f"entry {int(np.argmin(fits))} of a row is none of a picture")
