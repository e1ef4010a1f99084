"""Hold label maps against masks, picture by picture: how good, and what kind of wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Integer
from scipy.ndimage import grey_dilation, grey_erosion

from weclip_lib.labels import IGNORE_INDEX
from weclip_lib.ops.metrics import confusion_matrix, scores

BORDER = 3  # pixels from a true outline within which an error is one of outline
KINDS = {
    "missed": "an object taken for background",
    "confused": "an object taken for another class",
    "co-occurrence": "background taken for an object",
    "boundary": f"wrong within {BORDER} pixels of a true outline",
}
Label = Integer[np.ndarray, "_ _"]


def outline(mask: Label, width: int = BORDER) -> Bool[np.ndarray, "height width"]:
    """Pixels with another class, not IGNORE_INDEX, at most `width` pixels away along both axes."""
    size = (2 * width + 1,) * 2
    void, ids = mask == IGNORE_INDEX, mask.astype(np.int16)
    highest = grey_dilation(np.where(void, -1, ids), size)
    lowest = grey_erosion(ids, size)
    return highest > lowest


def errors(found: Label, mask: Label) -> dict[str, Bool[np.ndarray, "height width"]]:
    """Wrong pixels by kind (`KINDS`); every wrong pixel is of one kind, void ones of none."""
    wrong = (found != mask) & (mask != IGNORE_INDEX)
    near = outline(mask)
    far = wrong & ~near
    return {
        "missed": far & (mask > 0) & (found == 0),
        "confused": far & (mask > 0) & (found > 0),
        "co-occurrence": far & (mask == 0),
        "boundary": wrong & near,
    }


@dataclass(frozen=True)
class PictureErrors:
    """One picture held against its mask."""

    name: str
    miou: float  # percent, over the classes of its mask, background included
    share: dict[str, float]  # percent of the known pixels that are wrong, by kind


def picture_errors(
    found: Sequence[Label], masks: Sequence[Label], names: Sequence[str], class_count: int
) -> list[PictureErrors]:
    """Every picture, the worst first."""
    rows = []
    for name, label, mask in zip(names, found, masks, strict=True):
        known = max(1, int((mask != IGNORE_INDEX).sum()))
        wrong = errors(label, mask)
        shares = {kind: 100 * float(where.sum()) / known for kind, where in wrong.items()}
        table = confusion_matrix(torch.from_numpy(label), torch.from_numpy(mask), class_count)
        rows.append(PictureErrors(name, scores(table).miou, shares))
    return sorted(rows, key=lambda row: row.miou)
