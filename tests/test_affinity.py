import numpy as np
import pytest
import torch
from scipy import ndimage

from weclip_lib.labels import IGNORE_INDEX
from weclip_lib.ops.affinity import (
    affinity_labels,
    box_mask,
    connected_parts,
    min_max,
    propagate_cam,
    radius_mask,
    transition_matrix,
)


def slow_boxes(cam: np.ndarray, threshold: float, *, keep_last: bool) -> np.ndarray:
    """Boxes by scipy's connected components, map by map."""
    mask = np.zeros(cam.shape, bool)
    for place in np.ndindex(cam.shape[:-2]):
        levels = np.floor(cam[place] * np.float32(255))
        parts, _ = ndimage.label(levels > int(threshold * levels.max()), np.ones((3, 3)))
        for rows, columns in ndimage.find_objects(parts):
            bottom, right = rows.stop, columns.stop
            if not keep_last:
                bottom, right = min(bottom, cam.shape[-2] - 1), min(right, cam.shape[-1] - 1)
            mask[place][rows.start : bottom, columns.start : right] = True
    return mask


@pytest.mark.parametrize("keep_last", [True, False])
@pytest.mark.parametrize("threshold", [0.4, 0.7, 0.95])
def test_boxes_are_those_of_connected_components(keep_last, threshold) -> None:
    rng = np.random.default_rng(0)
    cam = ndimage.gaussian_filter(rng.random((3, 5, 11, 7)), (0, 0, 0.8, 0.8))
    cam = min_max(torch.from_numpy(cam).float())
    expected = slow_boxes(cam.numpy(), threshold, keep_last=keep_last)
    assert np.array_equal(box_mask(cam, threshold, keep_last=keep_last), expected)


def winding(size: int) -> torch.Tensor:
    """One path, as long as the grid allows: rows joined at alternating ends."""
    path = torch.zeros(size, size, dtype=torch.bool)
    path[::2] = True
    path[1::4, -1] = True
    path[3::4, 0] = True
    return path[: size - size % 2]


@pytest.mark.parametrize("size", [7, 20, 33, 64])
def test_connected_parts_settle_and_are_scipys(size) -> None:
    rng = np.random.default_rng(size)
    maps = [torch.from_numpy(rng.random((size, size)) < p) for p in (0.0, 0.3, 0.4, 0.5, 1.0)]
    for path in (winding(size), winding(size).T, winding(size).flip(0), winding(size).flip(1)):
        canvas = torch.zeros(size, size, dtype=torch.bool)
        canvas[: path.shape[0], : path.shape[1]] = path
        maps.append(canvas)
    found = connected_parts(torch.stack(maps))[:, :-1].view(-1, size, size)
    for above, first in zip(maps, found, strict=True):
        parts, count = ndimage.label(above, np.ones((3, 3)))
        assert first[~above].eq(size * size).all()
        for part in range(1, count + 1):
            assert set(first[parts == part].tolist()) == {int(np.flatnonzero(parts == part)[0])}


def test_transition_is_symmetric_and_non_negative() -> None:
    matrix = transition_matrix(torch.rand(2, 15, 15).softmax(-1))
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix, matrix.transpose(1, 2))
    assert (matrix.sum(-1) - 1).abs().max() < 0.05


def test_propagation_by_hand() -> None:
    cam = torch.tensor([[[[1.0, 0.5]]]])
    step = torch.tensor([[[0.75, 0.25], [0.25, 0.75]]])
    mask = torch.tensor([[[[True, False]]]])
    assert propagate_cam(cam, step, mask, steps=1).flatten().tolist() == [0.75, 0.25]
    assert propagate_cam(cam, step, mask).flatten().tolist() == [0.625, 0.375]


def test_propagation_names_a_wrong_grid() -> None:
    with pytest.raises(ValueError, match=r"3x5 CAM has 15 cells but .* 14 patches"):
        propagate_cam(torch.rand(2, 7, 3, 5), torch.rand(2, 14, 14), torch.rand(2, 7, 3, 5) > 0)


def test_affinity_labels_by_hand() -> None:
    label = torch.tensor([[[1, 1, 0, IGNORE_INDEX]]])
    found = affinity_labels(label, (1, 4), radius=2)[0]
    skip = IGNORE_INDEX
    expected = [[1, 1, 0, skip], [1, 1, 0, skip], [0, 0, 1, skip], [skip] * 4]
    assert found.tolist() == expected
    near = affinity_labels(label, (1, 4), radius=1)[0]
    assert near[0, 2] == near[2, 0] == skip


def test_radius_is_chebyshev() -> None:
    near = radius_mask(3, 5, 1)
    assert near[0, 6] and not near[0, 2] and not near[0, 10]


def test_min_max_of_a_constant_is_zero() -> None:
    assert min_max(torch.full((2, 3, 5), 0.7)).eq(0).all()
