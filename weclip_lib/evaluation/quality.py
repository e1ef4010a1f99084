"""Pixels of every picture of a split, counted; and all that a segmentation is judged by.

Counts of pictures are kept, so every score can be computed again without the network.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from weclip_lib.evaluation.regions import CELLS_OF_CLASS, ENTRY, SIZES
from weclip_lib.ops.metrics import scores

MEASURES = (
    "miou",
    "pixel accuracy",
    "boundary miou",
    *(f"miou {size}" for size in SIZES),
)


@dataclass(frozen=True)
class ImageCounts:
    """Pixels of the pictures of a split, by picture, cell of the mask and predicted class.

    Void pixels are not counted. A cell is a true class, a size of its object, and whether an
    outline is near (`regions`).
    """

    names: tuple[str, ...]  # of the pictures
    class_count: int  # with background
    entries: np.ndarray  # of regions.ENTRY; every count is above 0

    @property
    def true(self) -> Integer[np.ndarray, " entry"]:
        return self.entries["cell"] // CELLS_OF_CLASS

    @property
    def size(self) -> Integer[np.ndarray, " entry"]:
        """Number of the size in SIZES, from 1; 0: background."""
        return self.entries["cell"] % CELLS_OF_CLASS // 2

    @property
    def near(self) -> Bool[np.ndarray, " entry"]:
        """Whether an outline of the mask is near."""
        return self.entries["cell"] % 2 == 1

    def total(self) -> Integer[Tensor, "cls cls"]:
        """Return the confusion matrix of all pictures; rows are truth."""
        return self._confusion(np.ones(len(self.entries), bool))

    def boundary(self) -> Integer[Tensor, "cls cls"]:
        """Return the confusion matrix of the pixels near an outline (`regions.near_outline`)."""
        return self._confusion(self.near)

    def picture(self, name: str) -> Integer[Tensor, "cls cls"]:
        """Return the confusion matrix of one picture."""
        return self._confusion(self.entries["picture"] == self.names.index(name))

    def _confusion(self, chosen: Bool[np.ndarray, " entry"]) -> Integer[Tensor, "cls cls"]:
        pairs = self.true[chosen].astype(np.intp) * self.class_count
        pairs += self.entries["predicted"][chosen]
        table = np.zeros(self.class_count**2, np.int64)
        np.add.at(table, pairs, self.entries["pixels"][chosen].astype(np.int64))
        return torch.from_numpy(table.reshape(self.class_count, self.class_count))

    def size_iou(self) -> Float[np.ndarray, "size cls"]:
        """Return the IoU of each class over its objects of each size, in percent.

        For class c and size s, true are the pixels of the objects of c with size s
        (`regions.object_sizes`); c's other objects count as void. A semantic prediction does not
        say to which object a pixel belongs. So the pixels of a picture that are wrongly predicted
        as c are shared among its objects of c by their area. In a picture without c, they count
        for no size. NaN: c has no such object, as background has none.
        Source: Wang et al. 2023 (arXiv 2310.19252), metrics/miouk_metric.py of their code, share
        wrong pixels so. Differs: they average over objects; we add the pixels of all objects of a
        size before we divide, as mIoU does, so that slivers do not weigh as much as objects.
        """
        pixels, predicted = self.entries["pixels"].astype(float), self.entries["predicted"]
        picture, right = self.entries["picture"], self.true == predicted
        area, wrong = np.zeros((2, len(self.names), self.class_count))
        np.add.at(area, (picture, self.true), pixels)
        np.add.at(wrong, (picture[~right], predicted[~right]), pixels[~right])
        per_true = wrong / np.maximum(area, 1)
        found, union = np.zeros((2, 1 + len(SIZES), self.class_count))
        np.add.at(found, (self.size[right], self.true[right]), pixels[right])
        share = pixels * (1 + per_true[picture, self.true])
        np.add.at(union, (self.size, self.true), share)
        iou = np.full(union.shape, np.nan)
        np.divide(100 * found, union, out=iou, where=union > 0)
        return iou[1:]


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Join the entries of pictures, one part a picture; number them."""
    whole = np.concatenate([np.zeros(0, ENTRY), *parts])
    lengths = np.array([len(part) for part in parts], int)
    whole["picture"] = np.repeat(np.arange(len(parts)), lengths)
    return whole


def measures(counts: ImageCounts) -> dict[str, float]:
    """Return what a table says of counts, in percent, by its name in MEASURES.

    "boundary miou" is over the pixels near an outline, "miou small" over the foreground classes
    with small objects (`ImageCounts.size_iou`). What no pixel decides is left out.
    """
    plain, near = scores(counts.total()), scores(counts.boundary())
    means = [iou[~np.isnan(iou)] for iou in counts.size_iou()]
    sizes = [float(iou.mean()) if len(iou) else math.nan for iou in means]
    found = (plain.miou, plain.pixel_accuracy, near.miou, *sizes)
    pairs = zip(MEASURES, found, strict=True)
    return {name: value for name, value in pairs if not math.isnan(value)}


def precision(confusion: Integer[Tensor, "cls cls"]) -> Float[Tensor, " cls"]:
    """Return the share of each class's predicted pixels that are right, in percent.

    NaN: no pixel was predicted so.
    """
    return 100 * confusion.diagonal().double() / confusion.sum(0)


def recall(confusion: Integer[Tensor, "cls cls"]) -> Float[Tensor, " cls"]:
    """Return the share of each class's true pixels that are found, in percent.

    NaN: no pixel is of the class.
    """
    return 100 * confusion.diagonal().double() / confusion.sum(1)


def confused(confusion: Integer[Tensor, "cls cls"]) -> Float[Tensor, "fg fg"]:
    """Return the share of each foreground class's true pixels given to another one, in percent.

    Rows are true, columns predicted; the diagonal is 0. The divisor is all true pixels of a class,
    also those that were found or taken for background. NaN: no pixel is of the class.
    """
    shares = 100 * confusion.double() / confusion.sum(1, keepdim=True)
    return shares.fill_diagonal_(0)[1:, 1:]
