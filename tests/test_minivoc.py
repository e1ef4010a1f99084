import json
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from weclip_lib.data.profiles import PROFILES
from weclip_lib.data.settings import with_settings
from weclip_lib.labels import (
    IGNORE_INDEX,
    MINIVOC_1_CLASSES,
    MINIVOC_BACKGROUNDS,
    MINIVOC_CLASSES,
)
from weclip_lib.world import composition, composition_1, shapes_1
from weclip_lib.world.composition import USUAL_BACKGROUND
from weclip_lib.world.minivoc import (
    SPLIT_SEEDS,
    draw,
    draw_many,
    write_voc,
)
from weclip_lib.world.settings import CHANCES, MINICLIP_ROUNDS, WIDE, WORLD_1, World
from weclip_lib.world.shapes import SHAPES

WORLDS = {"version 1": (WORLD_1, MINIVOC_1_CLASSES), "version 2": (World(), MINIVOC_CLASSES)}
LONE = replace(WIDE, object_counts=(1.0, 0.0, 0.0), clutter=0.0, occlusion=0.0, cut=0.0)
FAMILIES = (
    ("cat", "cow", "dog", "horse", "sheep"),
    ("bus", "car", "train"),
    ("bicycle", "motorbike"),
    ("chair", "sofa", "table"),
    ("aeroplane", "bird"),
    ("bottle", "plant"),
)


def test_version_1_keeps_its_bytes() -> None:
    digest = sha256()
    for index in range(20):
        scene = draw(5, index, WORLD_1)
        told = (";".join(scene.classes).encode(), scene.caption.encode())
        for part in (scene.image.tobytes(), scene.mask.tobytes(), *told):
            digest.update(part)
    known = "052092e3bb771ea229c776c5096f43cdb75ce2a329f9114503d6c778b3ab0692"
    assert digest.hexdigest() == known
    assert scene.telling is None


def test_same_picture_whatever_the_process_count() -> None:
    alone = [draw(5, index, World()) for index in range(20)]
    shared = list(draw_many(5, range(20), World(), processes=2))
    for one, other in zip(alone, shared, strict=True):
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(one.mask, other.mask)
        assert one.caption == other.caption


def test_streams_are_disjoint() -> None:
    seeds = [*SPLIT_SEEDS.values(), *{recipe.seed for recipe in MINICLIP_ROUNDS}]
    assert len(set(seeds)) == len(seeds)
    assert not np.array_equal(draw(seeds[0], 0).image, draw(seeds[1], 0).image)


def test_every_class_has_a_shape_and_a_place() -> None:
    assert set(shapes_1.SHAPES) == set(MINIVOC_1_CLASSES) == set(composition_1.USUAL_BACKGROUND)
    assert set(SHAPES) == set(MINIVOC_CLASSES) == set(USUAL_BACKGROUND)
    assert set(composition.COMPANIONS) == set(MINIVOC_CLASSES)
    companions = {name for names in composition.COMPANIONS.values() for name in names}
    assert companions <= set(MINIVOC_CLASSES)


@pytest.mark.parametrize("version", WORLDS)
def test_labels_are_the_classes_of_the_mask(version) -> None:
    world, classes = WORLDS[version]
    for index in range(60):
        scene = draw(6, index, world)
        assert scene.image.shape == (160, 160, 3)
        inside = np.unique(scene.mask[scene.mask != IGNORE_INDEX])
        # A labelled object keeps pixels after its border is cut off, save in rare slivers.
        found = {classes[i - 1] for i in inside if i}
        assert found <= set(scene.classes)
        assert scene.background in MINIVOC_BACKGROUNDS
        words = scene.caption.strip(".").split()
        assert set(scene.classes) == set(words) & set(classes)
        if version == "version 2":
            assert not scene.telling[scene.mask == 0].any()


def test_border_is_thin_and_around_objects() -> None:
    scene = next(s for s in (draw(7, i, World()) for i in range(50)) if len(s.classes) == 1)
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


@pytest.mark.parametrize("version", WORLDS)
def test_no_class_is_told_by_its_colour(version) -> None:
    """A classifier on the colour histograms of objects stays within 3 standard errors of chance."""
    world, names = WORLDS[version]
    world, histograms, classes = replace(world, co_occurrence=0.0), [], []
    for scene in draw_many(77, range(1600), world, processes=2):
        for name in scene.classes:
            pixels = scene.image[scene.mask == names.index(name) + 1]
            if len(pixels) >= 20:
                bins = (pixels // 64 * (16, 4, 1)).sum(1)
                histograms.append(np.bincount(bins, minlength=64) / len(pixels))
                classes.append(names.index(name))
    x, y = np.array(histograms), np.array(classes)
    half = len(y) // 2
    found = LogisticRegression(max_iter=500).fit(x[:half], y[:half]).predict(x[half:])
    recalls = np.array([(found[y[half:] == c] == c).mean() for c in range(len(names))])
    sizes = np.bincount(y[half:], minlength=len(names))
    chance = 1 / len(names)
    error = np.sqrt((chance * (1 - chance) / sizes).sum()) / len(names)
    assert abs(recalls.mean() - chance) <= 3 * error


def test_families_differ_in_the_telling_part_only() -> None:
    for family in FAMILIES:
        assert len({SHAPES[name].shared for name in family}) == 1
        assert len({SHAPES[name].telling for name in family}) == len(family)


def test_the_telling_part_is_small() -> None:
    shares = {name: [] for name in MINIVOC_CLASSES}
    for scene in (draw(11, index, LONE) for index in range(250)):
        for name in scene.classes:
            shares[name].append(scene.telling.sum() / (scene.mask > 0).sum())
    for name, found in shares.items():
        assert 0.15 < np.mean(found) < 0.4, name


def test_shared_parts_do_not_tell(monkeypatch) -> None:
    """The rear half of an animal, away from its head, does not say which animal it is."""
    features, classes = [], []
    for index in range(400):
        name = FAMILIES[0][index % 5]
        monkeypatch.setattr(composition, "_names", lambda *_, name=name: [name])
        scene = draw(12, index, replace(LONE, co_occurrence=0.0))
        body = (scene.mask > 0) & ~scene.telling
        columns = np.flatnonzero(body.any(0))
        rear, front = columns[0], (columns[0] + columns[-1]) // 2
        if np.nonzero(scene.telling)[1].mean() < columns.mean():
            rear, front = front, columns[-1]
        rows = np.flatnonzero(body[:, rear:front].any(1))
        crop = Image.fromarray(scene.image).crop((rear, rows[0], front, rows[-1] + 1))
        features.append(np.asarray(crop.convert("L").resize((8, 8)), float).ravel())
        classes.append(index % 5)
    half = len(classes) // 2
    model = NearestCentroid().fit(features[:half], classes[:half])
    right = np.mean(model.predict(features[half:]) == classes[half:])
    assert right < 0.2 + 3 * np.sqrt(0.2 * 0.8 / half)


def test_an_object_without_its_telling_part_is_no_object() -> None:
    world = replace(LONE, clutter=1.0, headless=1.0)
    for index in range(40):
        rng = np.random.default_rng(index)
        parts, headless = composition._clutter(rng, world)
        assert headless and len(parts) > 2
        scene = draw(13, index, world)
        inside = np.setdiff1d(scene.mask, [0, IGNORE_INDEX])
        assert [MINIVOC_CLASSES[i - 1] for i in inside] == list(scene.classes)
        assert len(scene.classes) <= 1  # one object, and one to three without telling parts


def test_a_hidden_telling_part_gives_no_label(monkeypatch) -> None:
    world = replace(LONE, co_occurrence=0.0)
    assert all(len(draw(14, index, world).classes) == 1 for index in range(20))
    above = lambda rng, at, radius: (np.array([0.5, -0.8 * radius]), 0)  # noqa: E731
    monkeypatch.setattr(composition, "_across_border", above)
    monkeypatch.setattr(composition, "_names", lambda *_: ["person"])
    world = replace(world, cut=1.0, min_visible=0.1, object_radius=(0.45, 0.46))
    for scene in (draw(14, index, world) for index in range(10)):
        assert scene.classes == () and set(np.unique(scene.mask)) == {0, IGNORE_INDEX}
        assert "person" not in scene.caption and not scene.telling.any()


def test_the_border_cuts_no_telling_part_away() -> None:
    scenes = [draw(17, index, replace(LONE, cut=1.0)) for index in range(60)]
    edges = [s.mask[[0, -1]].any() or s.mask[:, [0, -1]].any() for s in scenes]
    assert np.mean(edges) > 0.9
    assert np.mean([len(s.classes) for s in scenes]) > 0.9


@pytest.mark.parametrize("size", [16, 48, 200])
def test_pictures_of_any_size_are_drawn(size) -> None:
    for index in range(5):
        assert draw(18, index, World(size=size)).image.shape == (size, size, 3)


def test_companions_are_a_dial() -> None:
    rng, hits = np.random.default_rng(0), []
    for value in (0.0, 1.0):
        pairs = [composition._names(rng, 2, World(companions=value)) for _ in range(200)]
        hits.append(np.mean([second in composition.COMPANIONS[first] for first, second in pairs]))
    assert hits[0] < 0.2 and hits[1] == 1.0


def test_camouflage_hides_bodies() -> None:
    contrast = []
    for value in (0.0, 1.0):
        scenes = [draw(15, index, replace(LONE, camouflage=value)) for index in range(40)]
        body = [s.image[(s.mask > 0) & ~s.telling].mean(0) for s in scenes]
        ground = [s.image[s.mask == 0].mean(0) for s in scenes]
        contrast.append(np.abs(np.subtract(body, ground)).mean())
    assert contrast[1] < contrast[0] / 2


@pytest.mark.parametrize("name", CHANCES)
def test_every_dial_draws_at_both_ends(name) -> None:
    ends = [[draw(16, i, World(**{name: value})) for i in range(8)] for value in (0.0, 1.0)]
    assert any(
        not np.array_equal(a.mask, b.mask) or not np.array_equal(a.image, b.image)
        for a, b in zip(*ends, strict=True)
    )
    for scene in (*ends[0], *ends[1]):
        assert scene.image.shape == (160, 160, 3) and scene.telling.shape == (160, 160)


def test_dials_of_version_2_change_nothing_in_version_1() -> None:
    other = replace(WORLD_1, headless=1.0, companions=1.0, camouflage=1.0, shading=1.0, cut=1.0)
    one, two = draw(5, 3, WORLD_1), draw(5, 3, replace(other, overlap=0.0))
    assert np.array_equal(one.image, two.image)


def test_a_version_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="version is 3: choose one of 1, 2"):
        World(version=3)
    for profile, version, right in (("mini", 1, "mini-1"), ("mini-1", 2, "mini")):
        with pytest.raises(ValueError, match=f"version is {version}, .*: use profile {right}$"):
            with_settings(PROFILES[profile], {"version": version})


def test_dials_of_the_second_world_have_no_effect_in_the_first() -> None:
    with pytest.raises(ValueError, match="headless has no effect in version 1: use profile mini"):
        with_settings(PROFILES["mini-1"], {"headless": 0.9})
    assert with_settings(PROFILES["mini"], {"headless": 0.9}).world.headless == 0.9


def test_voc_layout(tmp_path) -> None:
    counts = {"train": 3, "val": 2, "test": 1}
    folder = write_voc(tmp_path / "world", counts, World())
    names = (folder / "ImageSets/Segmentation/train.txt").read_text().split()
    assert names == ["train_00000", "train_00001", "train_00002"]
    rows = (folder / "labels.csv").read_text().splitlines()
    assert rows[0] == "name,labels" and len(rows) == 7
    scene = draw(SPLIT_SEEDS["train"], 1, World())
    assert rows[2] == f"train_00001,{';'.join(scene.classes)}"
    with Image.open(folder / "SegmentationClass/train_00001.png") as mask:
        assert mask.mode == "P"
        assert np.array_equal(np.array(mask), scene.mask)
    before = (folder / "labels.csv").stat().st_mtime_ns
    assert write_voc(folder, counts, World()) == folder  # drawn once
    assert (folder / "labels.csv").stat().st_mtime_ns == before


def test_another_world_does_not_overwrite(tmp_path) -> None:
    folder = write_voc(tmp_path / "world", {"train": 1})
    with pytest.raises(ValueError, match="something else"):
        write_voc(folder, {"train": 2})
    assert (folder / "JPEGImages/train_00000.jpg").exists()


def test_a_folder_from_before_version_2_is_named(tmp_path) -> None:
    """Its record has no version. A world of version 1 still opens it."""
    folder = write_voc(tmp_path / "world", {"train": 1}, WORLD_1)
    record = json.loads((folder / "minivoc.json").read_text())
    old = ("size", "object_counts", "object_radius", "co_occurrence", "clutter", "occlusion")
    record["world"] = {name: record["world"][name] for name in (*old, "min_visible")}
    (folder / "minivoc.json").write_text(json.dumps(record))
    assert write_voc(folder, {"train": 1}, WORLD_1) == folder
    with pytest.raises(ValueError, match=r"version is 1 there and 2 here.*: move or delete it"):
        write_voc(folder, {"train": 1}, World())
    (folder / "minivoc.json").write_text("{")
    with pytest.raises(ValueError, match=r"its minivoc.json is damaged"):
        write_voc(folder, {"train": 1}, WORLD_1)
