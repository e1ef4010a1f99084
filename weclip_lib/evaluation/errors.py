"""Compare label maps with masks, picture by picture: mIoU and kinds of errors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Integer
from scipy.ndimage import grey_dilation, grey_erosion

from weclip_lib.labels import IGNORE_INDEX
from weclip_lib.ops.metrics import confusion_matrix, scores

BORDER = 3  # pixels; an error this near a true outline is a boundary error
KINDS = {
    "missed": "an object taken for background",
    "confused": "an object taken for another class",
    "co-occurrence": "background taken for an object",
    "boundary": f"wrong within {BORDER} pixels of a true outline",
}
Label = Integer[np.ndarray, "_ _"]


def outline(mask: Label, width: int = BORDER) -> Bool[np.ndarray, "height width"]:
    """Find pixels within `width` pixels, on both axes, of another class (not IGNORE_INDEX)."""
    size = (2 * width + 1,) * 2
    void, ids = mask == IGNORE_INDEX, mask.astype(np.int16)
    highest = grey_dilation(np.where(void, -1, ids), size)
    lowest = grey_erosion(ids, size)
    return highest > lowest


def errors(found: Label, mask: Label) -> dict[str, Bool[np.ndarray, "height width"]]:
    """Sort wrong pixels by `KINDS`; each has one kind. IGNORE_INDEX in the mask has none."""
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
    """One picture compared with its mask."""

    name: str
    miou: float  # percent, over the classes of its mask, background included
    share: dict[str, float]  # percent of the known pixels that are wrong, by kind


def picture_errors(
    found: Sequence[Label], masks: Sequence[Label], names: Sequence[str], class_count: int
) -> list[PictureErrors]:
    """Compare every picture; the lowest mIoU is first."""
    rows = []
    for name, label, mask in zip(names, found, masks, strict=True):
        known = max(1, int((mask != IGNORE_INDEX).sum()))
        wrong = errors(label, mask)
        shares = {kind: 100 * float(where.sum()) / known for kind, where in wrong.items()}
        table = confusion_matrix(torch.from_numpy(label), torch.from_numpy(mask), class_count)
        rows.append(PictureErrors(name, scores(table).miou, shares))
    return sorted(rows, key=lambda row: row.miou)
