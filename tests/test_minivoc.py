import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from weclip_lib.labels import IGNORE_INDEX, MINIVOC_BACKGROUNDS, MINIVOC_CLASSES
from weclip_lib.world.minivoc import (
    SHAPES,
    SPLIT_SEEDS,
    USUAL_BACKGROUND,
    draw,
    draw_many,
    write_voc,
)
from weclip_lib.world.settings import MINICLIP_ROUNDS, World


def test_same_picture_whatever_the_process_count() -> None:
    alone = [draw(5, index) for index in range(20)]
    shared = list(draw_many(5, range(20), processes=2))
    for one, other in zip(alone, shared, strict=True):
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(one.mask, other.mask)
        assert one.caption == other.caption


def test_streams_are_disjoint() -> None:
    seeds = [*SPLIT_SEEDS.values(), *(recipe.seed for recipe in MINICLIP_ROUNDS)]
    assert len(set(seeds)) == len(seeds)
    assert not np.array_equal(draw(seeds[0], 0).image, draw(seeds[1], 0).image)


def test_labels_are_the_classes_of_the_mask() -> None:
    assert set(SHAPES) == set(MINIVOC_CLASSES) == set(USUAL_BACKGROUND)
    for index in range(60):
        scene = draw(6, index)
        assert scene.image.shape == (160, 160, 3)
        inside = np.unique(scene.mask[scene.mask != IGNORE_INDEX])
        # A labelled object keeps pixels after its border is cut off, save in rare slivers.
        found = {MINIVOC_CLASSES[i - 1] for i in inside if i}
        assert found <= set(scene.classes)
        assert scene.background in MINIVOC_BACKGROUNDS
        for name in scene.classes:
            assert name in scene.caption


def test_border_is_thin_and_around_objects() -> None:
    scene = next(s for s in (draw(7, i) for i in range(50)) if len(s.classes) == 1)
    void = scene.mask == IGNORE_INDEX
    assert 0 < void.mean() < 0.15
    solid = scene.mask > 0
    assert not (solid[1:] != solid[:-1])[~(void[1:] | void[:-1])].any()


def test_co_occurrence_is_a_dial() -> None:
    usual = []
    for value in (0.0, 1.0):
        world = World(co_occurrence=value, object_counts=(1.0, 0.0, 0.0), occlusion=0.0)
        scenes = [draw(8, index, world) for index in range(150)]
        hits = [USUAL_BACKGROUND[s.classes[0]] == s.background for s in scenes if s.classes]
        usual.append(np.mean(hits))
    assert usual[1] == 1.0
    assert usual[0] < 0.3  # one in eight by chance


def test_no_class_is_told_by_its_colour() -> None:
    """A classifier on the colour histograms of objects stays within 3 standard errors of chance."""
    world, histograms, classes = World(co_occurrence=0.0), [], []
    for scene in draw_many(77, range(1600), world, processes=2):
        for name in scene.classes:
            pixels = scene.image[scene.mask == MINIVOC_CLASSES.index(name) + 1]
            if len(pixels) >= 20:
                bins = (pixels // 64 * (16, 4, 1)).sum(1)
                histograms.append(np.bincount(bins, minlength=64) / len(pixels))
                classes.append(MINIVOC_CLASSES.index(name))
    x, y = np.array(histograms), np.array(classes)
    half = len(y) // 2
    found = LogisticRegression(max_iter=500).fit(x[:half], y[:half]).predict(x[half:])
    recalls = np.array([(found[y[half:] == c] == c).mean() for c in range(len(MINIVOC_CLASSES))])
    sizes = np.bincount(y[half:], minlength=len(MINIVOC_CLASSES))
    chance = 1 / len(MINIVOC_CLASSES)
    error = np.sqrt((chance * (1 - chance) / sizes).sum()) / len(MINIVOC_CLASSES)
    assert abs(recalls.mean() - chance) <= 3 * error


def test_voc_layout(tmp_path) -> None:
    counts = {"train": 3, "val": 2, "test": 1}
    folder = write_voc(tmp_path / "world", counts)
    names = (folder / "ImageSets/Segmentation/train.txt").read_text().split()
    assert names == ["train_00000", "train_00001", "train_00002"]
    rows = (folder / "labels.csv").read_text().splitlines()
    assert rows[0] == "name,labels" and len(rows) == 7
    scene = draw(SPLIT_SEEDS["train"], 1)
    assert rows[2] == f"train_00001,{';'.join(scene.classes)}"
    with Image.open(folder / "SegmentationClass/train_00001.png") as mask:
        assert mask.mode == "P"
        assert np.array_equal(np.array(mask), scene.mask)
    before = (folder / "labels.csv").stat().st_mtime_ns
    assert write_voc(folder, counts) == folder  # drawn once
    assert (folder / "labels.csv").stat().st_mtime_ns == before


def test_another_world_does_not_overwrite(tmp_path) -> None:
    folder = write_voc(tmp_path / "world", {"train": 1})
    with pytest.raises(ValueError, match="something else"):
        write_voc(folder, {"train": 2})
    assert (folder / "JPEGImages/train_00000.jpg").exists()
