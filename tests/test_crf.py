"""Dense CRF: equal to pydensecrf (tests/golden/make_crf.py), and to its definition."""

import tracemalloc

import numpy as np
import pytest

from weclip_lib.config import CRF
from weclip_lib.ops import crf
from weclip_lib.ops.crf import GaussianFilter, dense_crf
from weclip_lib.storage.provenance import ROOT


@pytest.fixture(scope="module")
def figures():
    return np.load(ROOT / "tests" / "golden" / "crf.npz")


@pytest.mark.parametrize("number", range(3))
def test_equals_pydensecrf(figures, number) -> None:
    before = figures[f"probabilities{number}"].astype(np.float32)
    found = dense_crf(before, figures[f"image{number}"])
    label = figures[f"label{number}"]
    assert (before.argmax(0) != label).mean() > 0.02  # there is something to do
    assert (found.argmax(0) == label).all()
    # Half a step of the half precision that the figures are kept in.
    np.testing.assert_allclose(found, figures[f"found{number}"], atol=3e-4, rtol=0)


def test_filter_is_near_an_exact_gaussian() -> None:
    """The lattice approximates; what it must keep are constants, and the shape of the kernel."""
    rng = np.random.default_rng(0)
    features = rng.uniform(0, 4, (300, 2))
    values = rng.uniform(0, 1, (300, 3)).astype(np.float32)
    distance = ((features[:, None] - features) ** 2).sum(-1)
    kernel = np.exp(-distance / 2)
    norm = 1 / np.sqrt(kernel.sum(1, keepdims=True))
    exact = norm * (kernel @ (norm * values))
    found = GaussianFilter(features)(values)
    assert np.abs(found - exact).max() < 0.15 * exact.max()
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.9


def test_far_points_do_not_speak_to_each_other() -> None:
    features = np.array([[0.0, 0.0], [0.0, 0.0], [50.0, 50.0]])
    found = GaussianFilter(features)(np.array([[1.0], [0.0], [5.0]], np.float32))
    np.testing.assert_allclose(found[:, 0], [0.5, 0.5, 5.0], rtol=1e-5)


def test_no_iteration_changes_nothing_and_sizes_must_agree() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (7, 11, 3)).astype(np.uint8)
    odds = rng.uniform(0.1, 1, (2, 7, 11)).astype(np.float32)
    before = odds / odds.sum(0)
    np.testing.assert_allclose(dense_crf(before, image, CRF(iterations=0)), before, rtol=1e-5)
    with pytest.raises(ValueError, match="has 11x7 pixels, the probabilities 7x11"):
        dense_crf(before.swapaxes(1, 2), image)


def test_parts_of_points_and_channels_change_nothing(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    features = rng.uniform(0, 9, (211, 5))
    values = rng.uniform(0, 1, (211, 7)).astype(np.float32)
    whole = GaussianFilter(features)(values)
    monkeypatch.setattr(crf, "POINTS_AT_ONCE", 50)
    monkeypatch.setattr(crf, "VALUES_AT_ONCE", 2000)
    assert (GaussianFilter(features)(values) == whole).all()


def test_memory_of_a_filter_a_point() -> None:
    """380 bytes; 1,100 where the coordinates of all corners are held together."""
    features = np.random.default_rng(0).uniform(0, 9, (100_000, 5))
    tracemalloc.start()
    GaussianFilter(features)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500 * len(features)
