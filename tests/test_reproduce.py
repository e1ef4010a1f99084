"""Notebook 09: its parts, and a rehearsal from end to end with a ViT-B/16 of random weights."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from weclip_lib.__main__ import main as weclip
from weclip_lib.data import download
from weclip_lib.data.profiles import get_profile, official
from weclip_lib.data.settings import with_settings
from weclip_lib.labels import MINIVOC_CLASSES
from weclip_lib.storage.pictures import write_mask
from weclip_lib.storage.provenance import ROOT
from weclip_lib.studies import reproduce, runner
from weclip_lib.studies.study import Variant
from weclip_lib.world.minivoc import draw

NOTEBOOK = ROOT / "notebooks" / "09_reproduce_the_paper.ipynb"
NAMES = {"plant": "pottedplant", "tv": "tvmonitor"}  # other words of VOC
SIZES = {"train": 4, "val": 2, "test": 1}


def data_set(folder: Path, profile: str) -> None:
    """Draw a small folder of VOC's or COCO's layout, with words that both know."""
    classes = get_profile(profile).labels.classes
    known = {
        w: classes.index(NAMES.get(w, w)) for w in MINIVOC_CLASSES if NAMES.get(w, w) in classes
    }
    lists, rows, number = folder / "ImageSets" / "Segmentation", ["name,labels\n"], 0
    lists.mkdir(parents=True)
    for split, count in SIZES.items():
        place = "JPEGImages" if profile == "voc" else f"{'val' if split == 'val' else 'train'}2014"
        names = []
        while len(names) < count:
            scene, number = draw(5, number), number + 1
            if not set(scene.classes) <= set(known):
                continue
            name = f"p{number}" if profile == "voc" else f"{place}/p{number}"
            mask = scene.mask.copy()
            for index, word in enumerate(MINIVOC_CLASSES, 1):
                mask[scene.mask == index] = 1 + known.get(word, 0)
            (folder / place).mkdir(exist_ok=True)
            Image.fromarray(scene.image).save(folder / place / f"p{number}.jpg")
            write_mask(folder / "SegmentationClass" / f"{name}.png", mask)
            tags = [classes[i - 1] for i in np.unique(mask) if 0 < i < 255]
            rows.append(f"{name},{';'.join(tags)}\n")
            names.append(name)
        for listed in (split, "train_aug") if split == "train" else (split,):
            (lists / f"{listed}.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "labels.csv").write_text("".join(rows))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    clip = open_clip.create_model("ViT-B-16-quickgelu", load_weights=False)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, path)
    return path


@pytest.mark.rehearsal
@pytest.mark.parametrize("profile", ["voc", "coco"])
def test_from_a_folder_to_the_table(profile, weights, tmp_path, monkeypatch, capsys) -> None:
    """Twice: a run that was stopped during training goes on from its checkpoint."""
    data_set(tmp_path / "data", profile)
    parameters = {
        "profile": profile,
        "data_dir": str(tmp_path / "data"),
        "weights": str(weights),
        "work_dir": str(tmp_path / "work"),
        "preset": "official",
        "device": "cpu",
        "fetch": False,
        "complete": False,
        "steps": 3,
        "settings": {"batch": 2, "crop": 160, "rfm_start": 0.4},
    }
    out = tmp_path / "out"
    assert runner.run_notebook(NOTEBOOK, out, parameters)
    table = pd.read_csv(out / f"{NOTEBOOK.stem}.csv")
    told = " [batch=2, crop=160, rfm_start=0.4]"
    assert set(table["variant"]) == {v + told for v in (*reproduce.STAGES, "decoder")}
    assert table["value"].between(0, 100).all()
    about = json.loads((out / f"{NOTEBOOK.stem}.json").read_text())
    assert about["effective"]["rfm_rule"] == "signed" and about["effective"]["rfm_start"] == 0.4
    masks = list((out / "09_reproduce_the_paper_test").rglob("*.png"))
    assert len(masks) == (SIZES["test"] if profile == "voc" else 0)
    weclip(["verify", str(out)])
    assert not list((tmp_path / "work" / "decoders" / "unfinished").iterdir())


def test_what_differs_from_the_published_code() -> None:
    voc = get_profile("voc")
    assert reproduce.differences(official(voc)).empty
    found = reproduce.differences(with_settings(official(voc), {"box_threshold": 0.5}))
    assert found.values.tolist() == [["box_threshold", "0.5", "0.4"]]
    mini = reproduce.differences(official(get_profile("mini"))).set_index("setting")
    assert mini.loc["steps"].tolist() == ["600", "30000"]
    assert {"backbone", "crop", "dim", "rfm_layers"} <= set(mini.index)


def test_published_scores_stand_beside_those_of_the_same_kind() -> None:
    rows = [
        ("decoder", "val", "miou", 50.0),
        ("decoder", "val", "miou multi-scale", 60.0),
        ("decoder", "val", "miou multi-scale", 62.0),
        ("decoder", "val", "miou with CRF", 64.0),
        ("+ PAR (static labels)", "train", "miou", 70.0),
    ]
    table = pd.DataFrame(rows, columns=["variant", "split", "metric", "value"])
    kinds = [
        ("decoder", "val", ""),
        ("decoder, RFM", "val", "no"),
        ("decoder, RFM", "val", "yes"),
        ("decoder, RFM", "test", "yes"),
        ("static labels", "train", "yes"),
    ]
    others = pd.DataFrame(kinds, columns=["what", "split", "crf"])
    others = others.assign(figure="1", method="m", read="source", source="s")
    found = reproduce.beside(table, others)
    assert found["here"].tolist() == ["61.0 ± 1.4", "64.0", "70.0", "", ""]
    assert found["what"].tolist()[-2:] == ["decoder", "decoder, RFM"]


def test_missing_data_are_fetched_or_refused(tmp_path, monkeypatch) -> None:
    voc, asked = get_profile("voc"), []
    with pytest.raises(ValueError, match=r"train_aug.txt is not there: run `weclip download voc"):
        reproduce.prepared_data(voc, str(tmp_path), fetch=False)

    def fetched(chosen) -> None:
        asked.append(chosen.dataset)
        lists = tmp_path / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / ("train_aug.txt" if chosen.dataset == "sbd" else "train.txt")).write_text("")

    monkeypatch.setattr(download, "run", fetched)
    for _ in range(2):
        assert reproduce.prepared_data(voc, str(tmp_path), fetch=True) == tmp_path
    assert asked == ["voc", "sbd"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [("disk", "checkpoints need .* GB: choose another work_dir"), ("memory", "a step needs")],
)
def test_too_little_is_said_before_training(
    smoke_study, tmp_path, monkeypatch, spoil, message
) -> None:
    from weclip_lib.studies.experiment import begin

    given = {"profile": "smoke", "data_dir": str(smoke_study.folder), "device": "cpu"}
    given |= {"out_dir": str(tmp_path / "out"), "work_dir": str(tmp_path), "pictures": 4}
    begun = replace(begin(NOTEBOOK.stem, given), data=smoke_study.folder)
    study = begun.study()
    staged = study.masked("train", 4)
    if spoil == "disk":
        usage = reproduce.shutil.disk_usage(tmp_path)
        monkeypatch.setattr(reproduce.shutil, "disk_usage", lambda _: usage._replace(free=10))
    else:
        monkeypatch.setattr(reproduce, "_memory", lambda _: (10, 9))
    with pytest.raises(ValueError, match=message):
        reproduce.estimate(begun, study, Variant("decoder"), staged)
    monkeypatch.undo()
    table = reproduce.estimate(begun, study, Variant("decoder"), staged).set_index("what")
    hours = table[table["unit"] == "h"]["value"]
    assert (hours > 0).all() and hours["all of it"] == pytest.approx(hours.drop("all of it").sum())
