"""The two training losses of WeCLIP. Each also returns the counts of its own batch.

Source: official scripts/dist_clip_voc.py get_seg_loss, utils/losses.py; REFERENCE 35, 36.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from weclip_lib.labels import IGNORE_INDEX


def segmentation_loss(
    logits: Float[Tensor, "batch cls height width"],
    label: Integer[Tensor, "batch height width"],
    totals: Float[Tensor, "2"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "2"]]:
    """Average two mean cross-entropies: one over background pixels, one over foreground pixels.

    Differs: if a batch has no background or no foreground pixel, the official loss is NaN.
    Here that term is 0, and the other keeps its weight of one half.

    Args:
        totals: The numbers of (background, foreground) pixels of a larger batch, if this batch is a
            part of it. The loss divides by them, so the losses of all parts add up.

    Returns:
        The loss and this batch's numbers of (background, foreground) pixels.
    """
    losses = F.cross_entropy(logits, label, ignore_index=IGNORE_INDEX, reduction="none")
    background = label == 0
    foreground = ~background & (label != IGNORE_INDEX)
    counts = torch.stack([background.sum(), foreground.sum()]).to(losses.dtype)
    sums = torch.stack([(losses * background).sum(), (losses * foreground).sum()])
    divisors = counts if totals is None else totals
    return (sums / divisors.clamp(min=1)).sum() / 2, counts


def affinity_loss(
    affinity: Float[Tensor, "batch patch patch"],
    target: Integer[Tensor, "batch patch patch"],
    totals: Float[Tensor, "2"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "2"]]:
    """Pull the affinity of equal patches to 1 and that of different ones to 0.

    Args:
        affinity: In [0, 1].
        target: 1, 0 or IGNORE_INDEX (`affinity.affinity_labels`).
        totals: The numbers of (equal, different) pairs of all parts of a larger batch.

    Returns:
        The loss (half of each sum, divided by its number plus one), and this batch's numbers.
    """
    equal, different = target == 1, target == 0
    counts = torch.stack([equal.sum(), different.sum()]).to(affinity.dtype)
    sums = torch.stack([((1 - affinity) * equal).sum(), (affinity * different).sum()])
    divisors = counts if totals is None else totals
    return (sums / (divisors + 1)).sum() / 2, counts
