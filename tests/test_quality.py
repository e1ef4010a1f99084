"""Regions of masks, counts of pictures, and the measures made of them; most values are by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import label

from weclip_lib.data.datasets import MaskedImages
from weclip_lib.evaluation import regions
from weclip_lib.evaluation.quality import (
    ImageCounts,
    confused,
    joined,
    measures,
    precision,
    recall,
)
from weclip_lib.evaluation.regions import near_outline, object_sizes, regions_of
from weclip_lib.evaluation.report import score_tables
from weclip_lib.evaluation.scores import count_labels, score_labels
from weclip_lib.labels import IGNORE_INDEX
from weclip_lib.ops.metrics import confusion_matrix, scores


def counted(pairs, class_count: int) -> ImageCounts:
    """Counts of some (mask, prediction), called a, b, c, ..."""
    parts = [regions_of(mask, class_count).count(found) for mask, found in pairs]
    return ImageCounts(tuple("abcdefgh"[: len(parts)]), class_count, joined(parts))


def random_pairs(count: int, class_count: int, seed: int = 0):
    """Blocks of random classes, some void, and predictions that are right in two of three."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        blocks = rng.integers(0, class_count + 1, (5, 7)).astype(np.uint8)
        blocks[blocks == class_count] = IGNORE_INDEX
        mask = np.kron(blocks, np.ones((3, 2), np.uint8))
        found = rng.integers(0, class_count, mask.shape).astype(np.uint8)
        right = (rng.random(mask.shape) < 2 / 3) & (mask != IGNORE_INDEX)
        pairs.append((mask, np.where(right, mask, found)))
    return pairs


# --- regions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [1, IGNORE_INDEX])
def test_the_band_around_an_outline_by_hand(other) -> None:
    """Two pixels on both axes, corners too; void is an outline, the edge of a picture is none."""
    mask = np.zeros((8, 11), np.uint8)
    assert not near_outline(mask).any()
    mask[3, 5] = other
    expected = np.zeros((8, 11), bool)
    expected[1:6, 3:8] = True
    assert (near_outline(mask) == expected).all()
    mask = np.zeros((3, 11), np.uint8)
    mask[:, :4] = other
    assert (near_outline(mask) == [[False, False] + 4 * [True] + 5 * [False]]).all()
    assert (near_outline(mask.T) == near_outline(mask).T).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 3), (7, 11)])
def test_the_band_is_what_a_search_around_every_pixel_finds(shape) -> None:
    mask = np.random.default_rng(1).choice([0, 0, 0, 0, 0, 0, 0, 0, 3, 255], shape).astype(np.uint8)
    for width in (1, 2, 3):
        for (row, column), near in np.ndenumerate(near_outline(mask, width)):
            around = mask[max(0, row - width) : row + width + 1]
            around = around[:, max(0, column - width) : column + width + 1]
            assert near == (around != mask[row, column]).any()


def test_sizes_of_objects_by_hand() -> None:
    """A picture of 15x20 pixels: small is below 1 pixel, large from 9 on."""
    mask = np.zeros((15, 20), np.uint8)
    mask[1, 1] = 2
    mask[4:6, 4:8] = 2  # 8 pixels
    mask[10:13, 10:13] = 2  # 9 pixels
    mask[10:13, 13:15] = 1  # 6 pixels of another class beside them
    mask[13:, :3] = IGNORE_INDEX
    expected = np.zeros((15, 20), np.uint8)
    expected[1, 1], expected[4:6, 4:8], expected[10:13, 10:13], expected[10:13, 13:15] = 2, 2, 3, 2
    assert (object_sizes(mask) == expected).all()
    large = np.ones((3, 3), np.uint8)
    assert (object_sizes(np.kron(mask, large)) == np.kron(expected, large)).all()


def test_sizes_in_a_picture_of_coco() -> None:
    """There, the limits are COCO's own: 32² and 96² pixels."""
    mask = np.zeros((480, 640), np.uint8)
    mask[:32, :32], mask[100:132, :31], mask[200:296, :96], mask[300:396, 200:295] = 1, 1, 1, 1
    sizes = object_sizes(mask)
    assert [sizes[at] for at in ((0, 0), (100, 0), (200, 0), (300, 200))] == [2, 1, 3, 2]


def test_what_is_one_object() -> None:
    """Corners connect; void and other classes part. Of 300 pixels, 9 are large."""
    mask = np.zeros((15, 20), np.uint8)
    for at in range(9):
        mask[at, at] = 1
    assert set(object_sizes(mask)[mask == 1]) == {3}
    mask[4, 4] = IGNORE_INDEX
    assert set(object_sizes(mask)[mask == 1]) == {2}
    mask[4, 4] = 2
    assert set(object_sizes(mask)[mask > 0]) == {2}


def test_a_mask_without_objects_or_known_pixels() -> None:
    for mask in (np.zeros((4, 5), np.uint8), np.full((4, 5), IGNORE_INDEX, np.uint8)):
        assert not object_sizes(mask).any()
        entries = regions_of(mask, 3).count(np.full((4, 5), 2, np.uint8))
        assert entries["pixels"].tolist() == ([20] if mask[0, 0] == 0 else [])


def test_ids_that_no_class_has() -> None:
    mask = np.array([[0, 1, IGNORE_INDEX]], np.uint8)
    with pytest.raises(ValueError, match="truth holds class ids 0 to 1, outside 0 to 0"):
        regions_of(mask, 1)
    found = np.array([[0, 7, 1]])
    with pytest.raises(ValueError, match="prediction holds class ids 0 to 7, outside 0 to 2"):
        regions_of(mask, 3).count(found)
    with pytest.raises(ValueError, match="prediction holds class ids -1 to 0"):
        regions_of(mask, 3).count(found - 7 * (found == 7) - (found == 0))
    assert regions_of(mask, 3).count(np.array([[0, 1, 99]]))["pixels"].sum() == 2  # void: any id


# --- counts --------------------------------------------------------------------------------------


def test_counts_add_up_to_confusion_matrices(monkeypatch) -> None:
    pairs = random_pairs(5, 4)
    counts = counted(pairs, 4)
    tables = [confusion_matrix(torch.tensor(f), torch.tensor(m), 4) for m, f in pairs]
    assert torch.equal(counts.total(), sum(tables)) and counts.total().dtype == torch.int64
    assert torch.equal(counts.picture("c"), tables[2])
    bands = [np.where(near_outline(mask), mask, IGNORE_INDEX) for mask, _ in pairs]
    near = [
        confusion_matrix(torch.tensor(f), torch.tensor(band), 4)
        for band, (_, f) in zip(bands, pairs, strict=True)
    ]
    assert torch.equal(counts.boundary(), sum(near)) and counts.boundary().sum() > 0
    monkeypatch.setattr(regions, "PIXELS_AT_ONCE", 11)
    assert (counted(pairs, 4).entries == counts.entries).all()


def test_many_classes_and_pixels_do_not_overflow() -> None:
    mask = np.full((700, 100), 253, np.uint8)
    mask[0] = 0
    counts = counted([(mask, np.full(mask.shape, 253, np.uint8))], 254)
    assert counts.total()[253, 253] == 69_900 and counts.total()[0, 253] == 100


def test_measures_by_hand() -> None:
    """A row of 12 pixels: 4 of class 1, 2 of void, 6 of background."""
    mask = np.array([[1, 1, 1, 1, 255, 255, 0, 0, 0, 0, 0, 0]], np.uint8)
    found = np.array([[0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 2]], np.uint8)
    counts = counted([(mask, found)], 3)
    assert counts.total().tolist() == [[4, 1, 1], [2, 2, 0], [0, 0, 0]]
    # within two pixels of void: places 2, 3, 6 and 7
    assert counts.boundary().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    found = measures(counts)
    assert found == pytest.approx(
        {
            "miou": 100 * (4 / 8 + 2 / 5) / 2,
            "pixel accuracy": 60,
            "boundary miou": 100 / 3,
            "miou large": 100 * 2 / 5,  # 4 of 12 pixels
        }
    )


def test_precision_recall_and_confusion_by_hand() -> None:
    table = torch.tensor([[50, 3, 0, 0], [4, 12, 4, 0], [0, 5, 15, 0], [0, 0, 0, 0]])
    assert precision(table)[:3].tolist() == pytest.approx([100 * 50 / 54, 60, 100 * 15 / 19])
    assert recall(table)[:3].tolist() == pytest.approx([100 * 50 / 53, 60, 75])
    assert precision(table)[3].isnan() and recall(table)[3].isnan()
    shares = confused(table)
    assert shares[:2].tolist() == [[0, 20, 0], [25, 0, 0]]  # background is not among them
    assert shares[2, :2].isnan().all()
    assert table[0, 0] == 50  # nothing is changed


# --- by size -------------------------------------------------------------------------------------


def sized_scene():
    """40x48 pixels: small is below 6.4, large from 57.6 on.

    Class 1 has an object of 4 pixels and one of 16, class 2 one of 8.
    """
    mask = np.zeros((40, 48), np.uint8)
    mask[2:4, 2:4] = 1
    mask[10:14, 10:14] = 1
    mask[20:22, 20:24] = 2
    found = np.zeros_like(mask)
    found[2, 2:4] = 1  # 2 of the small one
    found[10:13, 10:14] = 1  # 12 of the medium one
    found[30, :5] = 1  # 5 of the background
    found[20:22, 20:24] = 2
    found[20, 20:23] = 1  # 3 of class 2
    return mask, found


def test_size_iou_by_hand() -> None:
    second = np.zeros((40, 48), np.uint8)
    second[:2, :5] = 1  # 10 pixels, found
    third, wrong = np.zeros((40, 48), np.uint8), np.zeros((40, 48), np.uint8)
    wrong[:7, :1] = 1  # 7 wrong pixels where class 1 is not
    counts = counted([sized_scene(), (second, second), (third, wrong)], 4)
    # Of the 8 wrong pixels of the first picture, 8 * 4 / 20 count for the small object.
    small, medium = 100 * 2 / (4 + 1.6), 100 * (12 + 10) / (16 + 10 + 6.4)
    iou = counts.size_iou()
    assert iou.shape == (3, 4) and np.isnan(iou).sum() == 9
    assert iou[0, 1] == pytest.approx(small)
    assert iou[1, 1] == pytest.approx(medium) and iou[1, 2] == pytest.approx(100 * 5 / 8)
    found = measures(counts)
    assert found["miou small"] == pytest.approx(small)
    assert found["miou medium"] == pytest.approx((medium + 62.5) / 2)
    assert "miou large" not in found


def test_an_object_that_is_missed_has_an_iou_of_0() -> None:
    mask, _ = sized_scene()
    iou = counted([(mask, np.zeros_like(mask))], 4).size_iou()
    assert [iou[0, 1], iou[1, 1], iou[1, 2]] == [0, 0, 0]


def test_objects_of_one_size_have_the_plain_iou() -> None:
    """If every picture has the class, and all its objects have one size."""
    masks = [np.zeros((40, 48), np.uint8) for _ in range(3)]
    for at, mask in enumerate(masks):
        mask[at : at + 5, 3 : 7 + at] = 1  # 20 to 30 pixels: medium
    shifted = [np.roll(mask, 2, axis=1) for mask in masks]
    counts = counted(zip(masks, shifted, strict=True), 2)
    assert counts.size_iou()[1, 1] == pytest.approx(scores(counts.total()).class_iou[1].item())


def test_size_iou_object_by_object(monkeypatch) -> None:
    """A slow version, which goes through the objects and divides the wrong pixels by area."""
    monkeypatch.setattr(regions, "SIZE_FRAME", 2100)  # pictures of 15x14: limits of 7 and 13 pixels
    monkeypatch.setattr(regions, "SIZE_LIMITS", (70, 130))
    pairs = random_pairs(7, 4, seed=3)
    right, union = np.zeros((2, 3, 4))
    for mask, found in pairs:
        for class_id in (1, 2, 3):
            objects, number = label(mask == class_id, np.ones((3, 3)))
            wrong = (found == class_id) & (mask != class_id) & (mask != IGNORE_INDEX)
            for one in range(1, number + 1):
                inside = objects == one
                size = sum(inside.sum() >= limit for limit in (7, 13))
                right[size, class_id] += (found[inside] == class_id).sum()
                part = inside.sum() / (mask == class_id).sum()
                union[size, class_id] += inside.sum() + part * wrong.sum()
    iou = counted(pairs, 4).size_iou()
    assert np.isnan(iou[:, 0]).all()
    assert iou[:, 1:] == pytest.approx(100 * right[:, 1:] / union[:, 1:])


# --- of data sets --------------------------------------------------------------------------------


class Masks(MaskedImages):
    """As much of it as is read."""

    def __init__(self, masks) -> None:
        self.masks, self.names = masks, [f"p{n}" for n in range(len(masks))]
        self.labels = SimpleNamespace(class_count=4)

    def __len__(self) -> int:
        return len(self.masks)

    def mask(self, row: int) -> np.ndarray:
        return self.masks[row]


def test_labels_of_chosen_pictures() -> None:
    pairs = random_pairs(5, 4)
    dataset, found = Masks([mask for mask, _ in pairs]), np.stack([found for _, found in pairs])

    def stages(rows):
        return {"one": torch.from_numpy(found[rows]), "two": torch.from_numpy(found[rows]).long()}

    counts = count_labels(stages, dataset, rows=[4, 1, 2], batch=2)
    expected = counted([pairs[4], pairs[1], pairs[2]], 4)
    for part in counts.values():
        assert part.names == ("p4", "p1", "p2") and (part.entries == expected.entries).all()
    assert torch.equal(score_labels(stages, dataset, rows=[4, 1, 2])["two"], expected.total())
    everything = score_labels(stages, dataset)["one"]
    assert torch.equal(everything, counted(pairs, 4).total())
    empty = count_labels(stages, dataset, rows=[])
    assert empty == {} and len(joined([])) == 0


# --- tables --------------------------------------------------------------------------------------


def test_tables_of_scores() -> None:
    mask = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]], np.uint8)
    better = np.array([[0, 0, 0, 1, 1, 1, 2, 2, 2, 0]], np.uint8)
    worse = np.array([[0, 0, 0, 1, 1, 2, 2, 1, 2, 0]], np.uint8)
    kinds = {"single scale": counted([(mask, worse)], 4), "with CRF": counted([(mask, better)], 4)}
    tables = score_tables(kinds, ("background", "boat", "cat", "dog"), "val")
    scored = tables["scores.csv"].set_index("prediction")
    assert scored["miou"].tolist() == pytest.approx(
        [100 * (3 / 4 + 2 / 5 + 1 / 5) / 3, 100 * (3 / 4 + 3 / 4 + 2 / 4) / 3]
    )
    assert scored["miou small"].isna().all() and (scored["pictures"] == 1).all()
    assert list(scored.columns) == [
        "miou",
        "pixel accuracy",
        "boundary miou",
        "miou small",
        "miou medium",
        "miou large",
        "split",
        "pictures",
    ]
    per_class = tables["per_class.csv"].set_index("class")
    assert per_class.loc["boat"].tolist() == pytest.approx([40, 75, 200 / 3, 100, 50, 75])
    assert per_class.loc["dog"].isna().all()
    rows = tables["confused.csv"].values.tolist()
    assert rows[0] == ["boat", "cat", 50, 25]
    assert rows[1][:2] == ["cat", "boat"] and rows[1][2:] == pytest.approx([100 / 3, 0])
    assert len(rows) == 2


def test_a_split_without_known_pixels() -> None:
    mask = np.full((3, 4), IGNORE_INDEX, np.uint8)
    counts = counted([(mask, np.zeros((3, 4), np.uint8))], 2)
    assert measures(counts) == {} and math.isnan(scores(counts.total()).miou)
    assert len(score_tables({"single scale": counts}, ("background", "cat"), "x")) == 3
