from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from weclip_lib.evaluation.errors import KINDS
from weclip_lib.explore.viewer import TrainingViewer
from weclip_lib.figures.plotting import close
from weclip_lib.studies.study import Variant


@pytest.fixture(scope="module")
def folder(smoke_study) -> Path:
    budget = replace(smoke_study.setting.budget, steps=20)
    return smoke_study.watched_run(Variant("decoder, RFM"), budget, 0, count=6)


@pytest.fixture(scope="module")
def viewer(smoke_study, folder) -> TrainingViewer:
    return TrainingViewer(folder, smoke_study.inspected_masked())


def test_the_worst_picture_comes_first(viewer) -> None:
    assert viewer.message.value == ""
    ranked = viewer.ranked()
    assert [row.name for row in ranked] == viewer.worst and len(ranked) == 6
    assert ranked[0].miou == min(row.miou for row in ranked)
    assert viewer.panels["picture"].text.startswith(ranked[0].name)
    for kind in KINDS:
        viewer.order.value = kind
        shares = {row.name: row.share[kind] for row in viewer.ranked()}
        assert shares[viewer.worst[0]] == max(shares.values())
    viewer.order.value = ""


def test_the_slider_shows_the_step(viewer) -> None:
    first, last = viewer.run.steps[0], viewer.run.steps[-1]
    viewer.step.value = last
    late = viewer.panels["prediction"].picture.value
    viewer.step.value = first
    assert viewer.panels["prediction"].picture.value != late
    assert f"after {first} steps" in viewer.about.value
    viewer.step.value = last


def test_scores_are_those_of_the_watched_pictures(viewer) -> None:
    curve = viewer.curve()
    kept = curve[curve["metric"] == "mIoU of pseudo labels, %"]
    assert kept["iteration"].tolist() == viewer.run.steps
    miou, classes = viewer.scores("pseudo_label", viewer.run.steps[-1])
    assert kept["value"].iloc[-1] == miou
    truth = {i for mask in viewer.masks.values() for i in np.unique(mask) if i != 255}
    assert miou == pytest.approx(np.mean([classes[i] for i in truth]))


def test_static_twins(viewer) -> None:
    for figure, count in ((viewer.figure(), 5), (viewer.failures(3), len(KINDS) * 3)):
        assert sum(bool(axis.images) for axis in figure.axes) == count
        close(figure)


def test_a_data_set_without_the_pictures_is_refused(folder, smoke_study) -> None:
    with pytest.raises(ValueError, match=r"split val has no picture .*: give its split, train"):
        TrainingViewer(folder, smoke_study.inspected_masked("val"))
