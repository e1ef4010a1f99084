"""The confusion matrix and its scores. Its rows are truth, its columns are predictions."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from weclip_lib.labels import IGNORE_INDEX

PIXELS_AT_ONCE = 2**20  # pixels counted together: some 40 MB


@dataclass(frozen=True)
class Scores:
    """Scores in percent. A class in neither truth nor predictions has IoU NaN."""

    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    class_iou: Float[Tensor, " cls"]


def confusion_matrix(
    prediction: Integer[Tensor, "*batch height width"],
    truth: Integer[Tensor, "*batch height width"],
    class_count: int,
) -> Integer[Tensor, "cls cls"]:
    """Count pixels by (truth, prediction), without pixels whose truth is IGNORE_INDEX.

    Args:
        class_count: Number of classes with background.

    Raises:
        ValueError: If a truth or a prediction is outside 0 to class_count - 1.
    """
    assert prediction.shape == truth.shape
    total = truth.new_zeros(class_count**2, dtype=torch.long)
    predicted, true = (ids.flatten().split(PIXELS_AT_ONCE) for ids in (prediction, truth))
    for some_predicted, some_true in zip(predicted, true, strict=True):
        counted = some_true != IGNORE_INDEX
        rows, columns = some_true[counted].long(), some_predicted[counted].long()
        check_ids("truth", rows, class_count)
        check_ids("prediction", columns, class_count)
        total += torch.bincount(rows * class_count + columns, minlength=class_count**2)
    return total.view(class_count, class_count)


def check_ids(name: str, ids: Tensor | np.ndarray, class_count: int) -> None:
    """Raise a ValueError if one of the class ids is outside 0 to class_count - 1."""
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < class_count:
        raise ValueError(
            f"{name} holds class ids {int(ids.min())} to {int(ids.max())}, "
            f"outside 0 to {class_count - 1}: check the class list and the masks"
        )


def scores(confusion: Integer[Tensor, "cls cls"]) -> Scores:
    """Compute mIoU over the classes in the truth, and accuracies.

    A wrong prediction of a class outside the truth counts only in the union of the true class.
    Source: official utils/evaluate.py; REFERENCE 43.
    """
    table = confusion.double()
    right, truth, predicted = table.diagonal(), table.sum(1), table.sum(0)
    present = truth > 0
    iou = 100 * right / (truth + predicted - right)
    return Scores(
        miou=iou[present].mean().item(),
        pixel_accuracy=(100 * right.sum() / table.sum()).item(),
        mean_accuracy=(100 * right / truth)[present].mean().item(),
        class_iou=iou,
    )
