"""Variants on shared features; what is kept is found again; masks reach whom they should."""

import json
from dataclasses import replace

import pytest
import torch

from weclip_lib.data.datasets import data_folder
from weclip_lib.data.profiles import PROFILES
from weclip_lib.studies.study import Study, Variant
from weclip_lib.training.sources import CachedSource

SMOKE = PROFILES["smoke"]
BUDGET = replace(SMOKE.budget, steps=2)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    (folder / "data").mkdir()
    return Study(SMOKE, data_folder(SMOKE, str(folder / "data")), folder)


def test_variants_share_features(study) -> None:
    base = study.cache(Variant("base"))
    assert study.cache(Variant("rule", method={"rfm_layers": 2})) is base
    assert study.cache(Variant("shape", shape={"layers": 0})) is base
    assert study.cache(Variant("words", backgrounds=1)) is not base
    assert len(study.model(Variant("words", backgrounds=1)).background) == 1


def test_trained_scored_and_found_again(study) -> None:
    variant = Variant("two blocks", shape={"blocks": 2, "layers": 0})
    watch = [0, 3]
    trained = {
        (variant.name, seed): study.train_decoder(variant, BUDGET, seed, watched_rows=watch)
        for seed in (0, 1)
    }
    first = trained[variant.name, 0]
    assert first.history[-1]["iteration"] == 2
    assert len(first.model.decoder.projections) == 2 and len(first.model.decoder.blocks) == 0
    again = study.train_decoder(variant, BUDGET, 0, watched_rows=watch)
    assert again.cpu_seconds == first.cpu_seconds and torch.equal(again.watched, first.watched)
    assert again.watched_at == first.watched_at
    unwatched = study.train_decoder(variant, BUDGET, 0)
    assert unwatched.cpu_seconds == first.cpu_seconds and unwatched.watched_at == []
    rows = study.score(trained, ["val", "test"])
    assert [(row["split"], row["seed"]) for row in rows] == [
        ("val", 0),
        ("val", 1),
        ("test", 0),
        ("test", 1),
    ]
    assert all(0 <= row["value"] <= 100 and row["n_images"] == 6 for row in rows)
    curve = study.watched_scores(trained, watch)
    assert [row["iteration"] for row in curve] == 2 * [1, 2]


def test_few_pictures_teach_and_judge(study, tmp_path) -> None:
    few = Study(SMOKE, study.folder, tmp_path, pictures=4)
    trained = {("few", 0): few.train_decoder(Variant("few"), BUDGET, 0)}
    assert len(few.train) == 4
    assert [row["n_images"] for row in few.score(trained, ["val"])] == [4]


def test_watched_labels_are_held_against_their_own_masks(study) -> None:
    run = study.train_decoder(Variant("watched"), BUDGET, 0, watched_rows=[2, 5])
    truth = study.true_labels[[2, 5]]
    perfect = replace(run, watched=truth[None].expand(len(run.watched_at), -1, -1, -1))
    rows = study.watched_scores({("perfect", 0): perfect}, [2, 5])
    assert {row["value"] for row in rows} == {100}


def test_masks_of_some_pictures(study) -> None:
    """A larger part contains a smaller; mirror images belong to their picture."""
    count = len(study.train)
    quarter, half, every = (Variant("m", masks=share) for share in (0.25, 0.5, 1.0))
    parts = [study.masked_rows(variant, 3) for variant in (quarter, half, every)]
    assert [len(part) for part in parts] == [4, 8, 16]
    assert set(parts[0]) < set(parts[1]) < set(parts[2]) == set(range(count))
    assert study.source(quarter, 3).pool == [*parts[0], *(row + count for row in parts[0])]
    assert parts[0] != study.masked_rows(quarter, 4)
    with pytest.raises(ValueError, match="do not fill a batch"):
        study.train_decoder(Variant("m", masks=0.07), BUDGET, 0)


def test_a_part_that_is_no_picture_is_refused(study) -> None:
    """It would be an empty choice, and that was once taken for all."""
    with pytest.raises(ValueError, match=r"masks is 0.002, none of 16 pictures: 0.0625 is one"):
        study.train_decoder(Variant("m", masks=0.002), BUDGET, 0)
    assert len(CachedSource(study.cache(Variant("x")), study.true_labels, [])) == 0


def test_more_maps_than_the_profile_reads_are_really_read(study) -> None:
    every = Variant("all maps", method={"rfm_layers": 12})
    assert len(study.cache(Variant("x")).features_of([0]).attention) == 10
    assert len(study.cache(every).features_of([0]).attention) == 12
    with pytest.raises(ValueError, match="rfm_layers is 13: give a whole number from 1 to 12"):
        study.model(Variant("x", method={"rfm_layers": 13}))
    with pytest.raises(ValueError, match="10 attention maps were kept, the method reads 12"):
        study.model(every).refine_cam(study.cache(Variant("x")).features_of([0]))


def test_another_template_has_features_of_its_own(study) -> None:
    other = Variant("photo", method={"template": "a photo of a {}."})
    assert study.cache(other).key != study.cache(Variant("x")).key


def test_pictures_that_are_augmented(study, tmp_path) -> None:
    """As in profile voc: other sizes, trained on crops, looked at as squares."""
    budget = replace(BUDGET, crop=80)
    setting = replace(
        SMOKE, augment=True, inspected=5, budget=budget, long_side=120, scored_splits=("val",)
    )
    other = Study(setting, study.folder, tmp_path, pictures=12)
    assert (len(other.train), len(other.inspected), len(other.inspected_masked())) == (12, 5, 5)
    cache, static = other.cache(Variant("x")), other.static(Variant("x"))
    assert cache.images.shape == (10, 80, 80, 3) and static.label.shape == (10, 80, 80)
    assert other.true_labels.shape == (10, 80, 80)
    weak, masked = Variant("tags"), Variant("masks", masks=0.5)
    trained = {
        (v.name, 0): other.train_decoder(v, budget, 0, watched_rows=[1]) for v in (weak, masked)
    }
    assert trained["tags", 0].watched.shape == (2, 1, 80, 80)
    again = other.train_decoder(weak, budget, 0, watched_rows=[1])
    assert again.cpu_seconds == trained["tags", 0].cpu_seconds
    assert len(other.source(masked, 0)) == 6
    rows = other.score(trained, setting.scored_splits)
    assert [row["n_images"] for row in rows] == [6, 6]
    assert {row["iteration"] for row in other.watched_scores(trained, [1])} == {1, 2}


def test_masked_and_weak_runs_are_different(study) -> None:
    weak, masked = (
        study.train_decoder(Variant("x", masks=share), BUDGET, 0) for share in (0.0, 1.0)
    )
    assert json.dumps(weak.history) != json.dumps(masked.history)
    assert masked.model.method.rfm_start == 1.0
