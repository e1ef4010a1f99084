"""Compute the tables of a run again from the counts that were kept with it, and compare.

weclip verify runs/voc/val runs/studies
"""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from weclip_lib.commands import Verify
from weclip_lib.evaluation.kept import SUFFIX, Kept, read_counts
from weclip_lib.evaluation.quality import ImageCounts, measures, precision, recall
from weclip_lib.evaluation.report import DECIMALS, KEYS, SCORES, score_tables
from weclip_lib.ops.metrics import scores
from weclip_lib.storage.files import Unusable, reading

AGAIN = "make the run again, or restore the table"
ROUNDING = 0.5 * 10**-DECIMALS + 1e-9  # a printed number is this near to the computed one
Key = tuple[str, ...]
Values = dict[str, object]  # by column


@dataclass(frozen=True)
class Expected:
    """What a table has to hold."""

    path: Path
    keys: Sequence[str]  # columns that say what a row is about
    columns: Sequence[str]  # of values; others may be there, too
    rows: dict[Key, Values]  # every value that the counts give
    required: Collection[Key] = ()  # rows that the table has to have


@dataclass
class Compared:
    """A table beside what the counts give."""

    path: Path
    checked: int = 0  # rows
    uncovered: int = 0  # rows of which no counts were kept
    differences: list[str] = field(default_factory=list)


def _read_table(expected: Expected) -> dict[Key, dict[str, str]]:
    """Read the rows of a table by their keys.

    Raises:
        Unusable: If it is missing or damaged, or two rows have the same keys.
    """
    with reading(expected.path, AGAIN):
        table = pd.read_csv(expected.path, dtype=str, keep_default_na=False)
        missing = [name for name in (*expected.keys, *expected.columns) if name not in table]
        if missing:
            raise ValueError(f"it has no column {missing[0]}")
        rows = table.to_dict("records")
        found = {tuple(row[name] for name in expected.keys): row for row in rows}
        if len(found) < len(rows):
            raise ValueError(f"two rows have the same {', '.join(expected.keys)}")
        return found


def _same(text: str, value: object) -> bool:
    """Whether a cell holds a value, at the table's decimals; an empty one holds NaN."""
    if isinstance(value, str):
        return text == value
    try:
        number = float(text or "nan")
    except ValueError:
        return False
    return bool(np.isclose(number, value, rtol=0, atol=ROUNDING, equal_nan=True))


def _compare(expected: Expected) -> Compared:
    rows, result = _read_table(expected), Compared(expected.path)
    for key, row in rows.items():
        if key not in expected.rows:
            result.uncovered += 1
            continue
        result.checked += 1
        for column, value in expected.rows[key].items():
            if column in row and not _same(row[column], value):
                shown = value if isinstance(value, str | int) else f"{value:.{DECIMALS}f}"
                told = f"{column} is {row[column] or 'empty'}, and the counts give {shown}"
                result.differences.append(f"{_named(expected, key)}: {told}")
    missing = [key for key in expected.required if key not in rows]
    result.differences += [f"{_named(expected, key)}: there is no such row" for key in missing]
    return result


def _named(expected: Expected, key: Key) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(expected.keys, key, strict=True))


def _score_tables(folder: Path, kept: Kept) -> list[Expected]:
    """Expect the tables of `weclip score`."""
    counted = {row.variant: counts for row, counts in kept.rows.items()}
    split = next(iter(kept.rows)).split
    found = []
    for name, table in score_tables(counted, kept.classes, split).items():
        keys, columns = KEYS[name], list(table.columns)
        rows = {tuple(row[key] for key in keys): row for row in table.to_dict("records")}
        found.append(Expected(folder / name, keys, columns, rows, rows))
    return found


def _study_tables(folder: Path, notebook: str, kept: Kept) -> list[Expected]:
    """Expect the tables of a notebook's run: scores, and those of the classes if they are there."""
    values: dict[Key, Values] = {}
    by_class: dict[Key, Values] = {}
    required: list[Key] = []
    for (variant, split, metric, seed), counts in kept.rows.items():
        about = metric.removeprefix("miou")
        for name, value in measures(counts).items():
            key = (variant, split, f"{name}{about}", str(seed))
            values[key] = {"value": value, "n_images": len(counts.names)}
        required.append((variant, split, metric, str(seed)))
        if metric == "miou":
            for name, row in _per_class(counts, kept.classes).items():
                by_class[variant, split, name, str(seed)] = row
    keys = ("variant", "split", "metric", "seed")
    path = folder / f"{notebook}.csv"
    found = [Expected(path, keys, ("value", "n_images"), values, required)]
    path = folder / f"{notebook}_per_class.csv"
    if path.exists():
        keys = ("variant", "split", "class", "seed")
        found.append(Expected(path, keys, ("iou",), by_class))
    return found


def _per_class(counts: ImageCounts, classes: Sequence[str]) -> dict[str, Values]:
    total = counts.total()
    columns = (scores(total).class_iou, precision(total), recall(total))
    rows = zip(*(values.tolist() for values in columns), strict=True)
    names = ("iou", "precision", "recall")
    return {c: dict(zip(names, row, strict=True)) for c, row in zip(classes, rows, strict=True)}


def verify(folder: Path) -> list[Compared]:
    """Compare every table of a folder that has counts beside it.

    Args:
        folder: Of `weclip score`, or of runs of notebooks.

    Raises:
        Unusable: If there is nothing to compare, or a file is missing or damaged.
    """
    if not folder.is_dir():
        raise Unusable(f"{folder} is no folder: give one of `weclip score`, or of a notebook's run")
    found = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        kept, name = read_counts(path), path.name.removesuffix(SUFFIX)
        scored = f"{name}.csv" == SCORES
        tables = _score_tables(folder, kept) if scored else _study_tables(folder, name, kept)
        found += [_compare(table) for table in tables]
    if not found:
        raise Unusable(
            f"{folder} holds no *{SUFFIX}, so nothing can be verified: give a folder of "
            "`weclip score`, or of a notebook's run"
        )
    return found


def run(chosen: Verify) -> None:
    """Run `weclip verify`.

    Raises:
        ValueError: If there is nothing to compare, or a row differs; the message names the first.
    """
    wrong = []
    for folder in chosen.runs:
        for table in verify(folder):
            sys.stdout.write(
                f"{table.path}: {table.checked} rows checked, {table.uncovered} not covered\n"
            )
            sys.stdout.writelines(f"  {line}\n" for line in table.differences)
            wrong += [f"{table.path}: {line}" for line in table.differences]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more}: {AGAIN}")
