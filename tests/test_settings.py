"""Settings by name: each has one name and one check, wherever it is given."""

import json
from dataclasses import fields, replace

import pandas as pd
import pytest

from weclip_lib.config import Budget, DecoderShape, Method
from weclip_lib.data.datasets import data_folder, open_profile
from weclip_lib.data.profiles import PROFILES, get_profile
from weclip_lib.data.settings import as_text, effective, read_pairs, read_value, with_settings
from weclip_lib.studies import experiment, parameters
from weclip_lib.world.settings import World

MINI, VOC = get_profile("mini"), get_profile("voc")


def test_every_field_has_a_name_of_its_own() -> None:
    names = [f.name for kind in (Method, DecoderShape, Budget, World) for f in fields(kind)]
    assert len(names) == len(set(names)) and set(names) < set(effective(MINI))
    assert len(effective(MINI)) == len(names) + 6 + 9  # the CRF's, and the profile's own


@pytest.mark.parametrize("name", PROFILES)
def test_what_is_given_back_changes_nothing(name) -> None:
    """Also as JSON, which has no tuples, except for settings that a profile refuses."""
    profile = PROFILES[name]
    world = () if any(profile.drawn) else (*(f.name for f in fields(World)), "drawn")
    refused = {*world, *(() if profile.augment else ("crop",))}
    told = json.loads(json.dumps(effective(profile)))
    assert with_settings(profile, {n: v for n, v in told.items() if n not in refused}) == profile


def test_a_setting_reaches_its_place() -> None:
    given = {"box_threshold": 0, "dim": 64, "batch": 8, "scales": [1, 0.5], "crf_iterations": 3}
    found = with_settings(VOC, given)
    assert found.method == replace(VOC.method, box_threshold=0.0)
    assert found.decoder.dim == 64 and found.budget.batch == 8 and found.scales == (1.0, 0.5)
    assert found.crf.iterations == 3 and found.method.rfm_layers == VOC.method.rfm_layers
    assert with_settings(MINI, {"learning_rate": "2e-3"}).budget.learning_rate == 2e-3
    assert as_text(given) == "batch=8, box_threshold=0, crf_iterations=3, dim=64, scales=1/0.5"


@pytest.mark.parametrize(
    ("profile", "given", "message"),
    [
        (MINI, {"box_treshold": 0.3}, "no setting 'box_treshold': did you mean box_threshold?"),
        (MINI, {"zzz": 1}, "no setting 'zzz': choose of affinity_radius, affinity_weight"),
        (MINI, {3: 1}, "no setting 3"),
        (MINI, {"dim": "x"}, "dim is 'x': give a whole number, such as 64"),
        (MINI, {"dim": 1.5}, "dim is 1.5: give a whole number"),
        (MINI, {"dim": True}, "dim is True: give a whole number"),
        (MINI, {"scored_splits": ["val", "val"]}, "scored_splits are .*: give every split once"),
        (MINI, {"crf_bilateral_weight": 1e300}, "crf_bilateral_weight is 1e.300: give a number"),
        (MINI, {"steps": 10**20}, "steps is 1.*: give a whole number from 1 to 1000000000"),
        (MINI, {"dim": 102}, "dim is 102: give a multiple of the 4 heads"),
        (MINI, {"rfm_select": 1}, "rfm_select is 1: give true or false"),
        (MINI, {"learning_rate": float("nan")}, "learning_rate is nan: give a number"),
        (MINI, {"box_threshold": 7}, "box_threshold is 7.0: give a number from -1.0 to 1.0"),
        (MINI, {"rfm_rule": 1}, "rfm_rule is 1: give text, such as 'absolute'"),
        (MINI, {"template": ""}, "template is '': give text"),
        (MINI, {"scales": 1}, "scales is 1: give a list, such as"),
        (MINI, {"scales": [1, "x"]}, r"scales\[1\] is 'x': give a number"),
        (MINI, {"scales": [0.5]}, "the first has to be 1"),
        (MINI, {"crf_iterations": -1}, "crf_iterations is -1: give a whole number from 0 to 10000"),
        (MINI, {"object_counts": [0.5, 0.5, 0.5]}, "object_counts is .*: give three with the sum"),
        (MINI, {"clutter": 2}, "clutter is 2.0: give a number from 0.0 to 1.0"),
        (MINI, {"drawn": [10, 0, 5]}, "drawn is .*: give numbers for train, val and test"),
        (MINI, {"crop": 64}, "crop has no effect in profile mini.*: set augment: true"),
        (VOC, {"clutter": 0.5}, "clutter is of MiniVOC's drawing: profile voc has real pictures"),
        (VOC, {"drawn": [1, 1, 1]}, "drawn is of MiniVOC's drawing"),
    ],
)
def test_bad_settings_are_named(profile, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        with_settings(profile, given)


def test_text_becomes_a_value_of_the_right_kind() -> None:
    pairs = [("box_threshold", "3e-1"), ("dim", "064"), ("scales", "[1, 0.5]")]
    pairs += [("rfm_select", "false"), ("template", "010")]
    assert read_pairs(MINI, pairs) == {
        "box_threshold": 0.3,
        "dim": 64,
        "scales": [1, 0.5],
        "rfm_select": False,
        "template": "010",
    }
    assert read_value("n", "1:30", "int") == "1:30"  # YAML would read 90
    for pairs, message in (
        ([("dim", "1"), ("dim", "2")], "setting dim comes a second time"),
        ([("dims", "1")], "did you mean dim"),
        ([("scales", "[1")], r"scales has '\[1', which is no value"),
    ):
        with pytest.raises(ValueError, match=message):
            read_pairs(MINI, pairs)


def test_another_world_has_another_folder(tmp_path) -> None:
    small = {"drawn": [2, 1, 1], "size": 48}
    one, other = (with_settings(MINI, small | {"clutter": c}) for c in (0.0, 1.0))
    places = {MINI.default_folder, one.default_folder, other.default_folder}
    assert len(places) == 3
    (tmp_path / "a").mkdir()
    data_folder(one, str(tmp_path / "a"))
    assert json.loads((tmp_path / "a" / "minivoc.json").read_text())["world"]["clutter"] == 0
    with pytest.raises(ValueError, match="holds something else than this MiniVOC"):
        data_folder(other, str(tmp_path / "a"))


def test_a_folder_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"data_dir is .*x: there is no such folder"):
        open_profile("smoke", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def kernel(tmp_path, **given) -> dict:
    """Return what a kernel holds after papermill has set these parameters."""
    cell = "# Parameters\n" + "".join(f"{n} = {v!r}\n" for n, v in given.items())
    return {"In": ["", "import time", cell], "out_dir": str(tmp_path / "out"), **given}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"box_threshold": 0.3}, "box_threshold is a setting: give it in `settings`, or by -s"),
        ({"stepz": 12}, "no parameter 'stepz': did you mean steps?"),
        ({"steps": "twelve"}, "steps of .* is 'twelve': give a whole number"),
        ({"steps": 12.5}, "steps of .* is 12.5: give a whole number"),
        ({"settings": 3}, "settings of .* is 3: give names with values"),
        ({"settings": {"box_t": 1}}, "no setting 'box_t': did you mean"),
        ({"settings": {"steps": 3}, "steps": 4}, "steps of .* is given twice"),
        ({"data_dir": "no/such"}, "data_dir of .* is 'no/such': nothing is there"),
        ({"device": "gpu"}, "device is 'gpu': give auto"),
        ({"profile": "maxi"}, "unknown profile 'maxi'"),
    ],
)
def test_plain_papermill_stops_in_the_first_cell(tmp_path, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        experiment.begin("03_rfm_ablation", kernel(tmp_path, **{"profile": "smoke", **given}))
    assert not (tmp_path / "out").exists()


def test_what_was_set_stands_in_table_and_provenance(tmp_path, smoke_study, capsys) -> None:
    given = {"profile": "smoke", "data_dir": str(smoke_study.folder), "device": "cpu"}
    begun = experiment.begin(
        "03_rfm_ablation", kernel(tmp_path, settings={"box_threshold": 0.3}, steps=2, **given)
    )
    assert begun.setting.method.box_threshold == 0.3 and begun.budget.steps == 2
    assert "smoke, with box_threshold=0.3, on cpu" in capsys.readouterr().out
    row = {"variant": "RFM", "split": "val", "metric": "miou", "value": 50.0, "unit": "percent"}
    table = begun.write_table([row | {"n_images": 1, "seed": 0, "profile": "smoke"}])
    assert table["variant"].tolist() == ["RFM"]  # cells look variants up by their plain names
    kept = pd.read_csv(tmp_path / "out" / "03_rfm_ablation.csv")
    assert kept["variant"].tolist() == ["RFM [box_threshold=0.3]"]
    begun.finish(["RFM"])
    about = json.loads((tmp_path / "out" / "03_rfm_ablation.json").read_text())
    assert about["parameters"]["settings"] == {"box_threshold": 0.3}
    assert about["effective"]["box_threshold"] == 0.3 and about["effective"]["steps"] == 2
    assert about["device"] == "cpu"
    assert (
        f"results are in {experiment.os.path.relpath(tmp_path / 'out')}" in capsys.readouterr().out
    )


def test_names_that_papermill_set_are_found() -> None:
    cells = ["x = 1", "# Parameters\nseed = 1\nsettings = {'a': 2}\n", "y = 3"]
    assert parameters.injected(cells) == {"seed", "settings"}
