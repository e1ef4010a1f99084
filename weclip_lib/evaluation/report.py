"""The tables of `weclip score`, made of counts of pictures."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from weclip_lib.evaluation.quality import (
    MEASURES,
    ImageCounts,
    confused,
    measures,
    precision,
    recall,
)
from weclip_lib.ops.metrics import scores

KINDS = ("single scale", "scales and flips", "with CRF")
SCORES = "scores.csv"
KEYS = {  # of every table, the columns that say what a row is about
    SCORES: ["prediction"],
    "per_class.csv": ["class"],
    "confused.csv": ["class", "taken for"],
}
DECIMALS = 2  # of percent


def score_tables(
    counted: Mapping[str, ImageCounts], classes: Sequence[str], split: str
) -> dict[str, pd.DataFrame]:
    """Make the tables by the names of their files; all numbers are in percent.

    Args:
        counted: By kind of prediction (KINDS).
        classes: Names, background first.
    """
    totals = {kind: counts.total() for kind, counts in counted.items()}
    rows = [
        {"prediction": kind, **measures(counts), "split": split, "pictures": len(counts.names)}
        for kind, counts in counted.items()
    ]
    per_class = {kind: scores(total).class_iou for kind, total in totals.items()}
    for name, measure in (("precision", precision), ("recall", recall)):
        per_class |= {f"{kind} {name}": measure(total) for kind, total in totals.items()}
    return {
        SCORES: pd.DataFrame(rows, columns=["prediction", *MEASURES, "split", "pictures"]),
        "per_class.csv": pd.DataFrame(
            {"class": classes, **{name: values.tolist() for name, values in per_class.items()}}
        ),
        "confused.csv": _confused(
            {kind: confused(total).numpy() for kind, total in totals.items()}, classes[1:]
        ),
    }


def _confused(shares: Mapping[str, np.ndarray], classes: Sequence[str]) -> pd.DataFrame:
    """List pairs of classes that are confused, by the highest share of a kind; most comes first."""
    highest = np.nan_to_num(np.stack(list(shares.values()))).max(axis=0)
    order = np.argsort(-highest, axis=None, kind="stable")
    kept = order[highest.ravel()[order].round(DECIMALS) > 0]
    true, taken = np.unravel_index(kept, highest.shape)
    pairs = {"class": [classes[row] for row in true], "taken for": [classes[at] for at in taken]}
    return pd.DataFrame(pairs | {kind: table[true, taken] for kind, table in shares.items()})
