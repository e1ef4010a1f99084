"""Comparisons with figures of the official code; each is counted, and pytest prints the count."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
COUNT: Counter[str] = Counter()


def load_golden(name: str) -> dict[str, Tensor]:
    arrays = np.load(GOLDEN / f"{name}.npz")
    return {k: torch.from_numpy(arrays[k]) for k in arrays.files if arrays[k].dtype.kind in "fiub"}


def close(ours: Tensor, theirs: Tensor, tolerance: float, *, relative: float = 0) -> None:
    """Within the absolute or the relative tolerance, whichever is larger; NaN where theirs is."""
    COUNT["comparisons"] += 1
    assert ours.shape == theirs.shape
    ours = ours.detach().to(theirs.dtype)
    bound = (relative * theirs.abs()).clamp(min=tolerance)
    same = ((ours - theirs).abs() <= bound) | (ours.isnan() & theirs.isnan())
    assert same.all(), f"differs by up to {(ours - theirs).abs().max()}"


def equal(ours: Tensor, theirs: Tensor) -> None:
    COUNT["comparisons"] += 1
    assert torch.equal(ours, theirs.to(ours.dtype))


def same_labels(ours: Tensor, theirs: Tensor) -> None:
    """At most 0.2 % of the pixels may differ."""
    COUNT["comparisons"] += 1
    assert ours.shape == theirs.shape
    assert (ours != theirs).double().mean() <= 0.002
