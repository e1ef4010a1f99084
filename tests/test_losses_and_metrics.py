import math

import pytest
import torch

from weclip_lib.labels import IGNORE_INDEX
from weclip_lib.ops import metrics
from weclip_lib.ops.losses import affinity_loss, segmentation_loss
from weclip_lib.ops.metrics import confusion_matrix, scores


def test_segmentation_loss_by_hand() -> None:
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 1, 0, 3] = 2.0
    label = torch.tensor([[[0, 0, IGNORE_INDEX, 1]]])
    loss, counts = segmentation_loss(logits, label)
    foreground = math.log(1 + math.exp(-2))
    assert loss.item() == pytest.approx((math.log(2) + foreground) / 2)
    assert counts.tolist() == [2, 1]


@pytest.mark.parametrize("only", [0, 1, IGNORE_INDEX])
def test_segmentation_loss_is_finite_without_one_side(only) -> None:
    logits = torch.randn(2, 3, 5, 7, requires_grad=True)
    loss, _ = segmentation_loss(logits, torch.full((2, 5, 7), only))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_affinity_loss_by_hand() -> None:
    affinity = torch.tensor([[[0.9, 0.4], [0.4, 0.9]]])
    target = torch.tensor([[[1, 0], [0, IGNORE_INDEX]]])
    loss, counts = affinity_loss(affinity, target)
    assert counts.tolist() == [1, 2]
    assert loss.item() == pytest.approx((0.1 / 2 + 0.8 / 3) / 2)


def test_scores_by_hand() -> None:
    truth = torch.tensor([[0, 0, 1, IGNORE_INDEX]])
    prediction = torch.tensor([[0, 2, 1, 1]])
    table = confusion_matrix(prediction, truth, 4)
    assert table.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0] * 4, [0] * 4]
    result = scores(table)
    assert result.miou == pytest.approx((50 + 100) / 2)  # class 2 is not in the truth
    assert result.pixel_accuracy == pytest.approx(200 / 3)
    assert math.isnan(result.class_iou[3])


def test_confusion_refuses_unknown_ids() -> None:
    with pytest.raises(ValueError, match="prediction holds class ids 0 to 7, outside 0 to 3"):
        confusion_matrix(torch.tensor([[0, 7]]), torch.tensor([[0, 1]]), 4)


def test_pixels_are_counted_in_parts(monkeypatch) -> None:
    torch.manual_seed(0)
    prediction, truth = torch.randint(0, 3, (2, 2, 5, 7)).unbind()
    whole = confusion_matrix(prediction, truth, 3)
    monkeypatch.setattr(metrics, "PIXELS_AT_ONCE", 11)
    assert torch.equal(confusion_matrix(prediction, truth, 3), whole) and whole.sum() == 70
