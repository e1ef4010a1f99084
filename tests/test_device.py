"""Every path on another device gives what the CPU gives; nothing is forgotten on the wrong one."""

from dataclasses import replace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch

from tests.far_device import FAR, Far, far_device
from weclip_lib.config import CRF
from weclip_lib.data.profiles import get_profile
from weclip_lib.evaluation import inference
from weclip_lib.evaluation.inference import Segmenter
from weclip_lib.evaluation.scores import score_decoders
from weclip_lib.storage.provenance import ROOT
from weclip_lib.studies import experiment, reproduce
from weclip_lib.studies.study import Study, Variant

SMOKE = get_profile("smoke")
BUDGET = replace(SMOKE.budget, steps=2)
CPU = torch.device("cpu")


def test_the_far_device_is_apart() -> None:
    with far_device():
        there = torch.ones(2).to(FAR)
        assert there.device == FAR and isinstance(there + 1, Far)
        assert there.cpu().tolist() == [1.0, 1.0] and float(there.sum()) == 2.0
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(2)
        with pytest.raises((RuntimeError, TypeError), match="numpy"):
            there.numpy()


def trained_on(device: torch.device, study: Study, work) -> dict[str, list]:
    """Train with labels of both kinds, and score; the results as plain numbers."""
    here = Study(study.setting, study.folder, work, pictures=8, device=device)
    variant = Variant("RFM", method={"rfm_start": 0.5})
    run = here.train_decoder(variant, BUDGET, 1, watched_rows=[0, 1])
    full = here.train_decoder(Variant("masks", masks=1.0), BUDGET, 1)
    tables, _ = here.confusions({("a", 0): run, ("b", 0): full}, "val", every_scale=True)
    images = here.masked("train", 2)
    return {
        "losses": [one for point in run.history + full.history for one in point.values()],
        "watched": run.watched.tolist(),
        "tables": [one.tolist() for found in tables.values() for one in found],
        "stages": [
            one.total().tolist() for one in reproduce.count_stages(here, run.model, images).values()
        ],
        "labels": here.static(variant).label.tolist(),
    }


def test_studies_there_equal_those_here(smoke_study, tmp_path) -> None:
    here = trained_on(CPU, smoke_study, tmp_path / "here")
    with far_device() as device:
        there = trained_on(device, smoke_study, tmp_path / "there")
    assert here.pop("losses") == pytest.approx(there.pop("losses"), rel=1e-4)  # other kernels
    assert here == there


def test_augmented_training_there_equals_that_here(smoke_study, tmp_path) -> None:
    setting = replace(SMOKE, augment=True, budget=replace(BUDGET, crop=80, bf16=False))
    losses = []
    for place in ("here", "there"):
        with far_device() as far:
            device = CPU if place == "here" else far
            study = Study(setting, smoke_study.folder, tmp_path / place, pictures=6, device=device)
            run = study.train_decoder(Variant("RFM"), setting.budget, 0)
            losses.append([one for point in run.history for one in point.values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_masks_of_pictures_there_equal_those_here(smoke_study) -> None:
    images = smoke_study.masked("val", 2)
    pictures = [images.image(row) for row in range(2)]
    found = []
    for place in ("here", "there"):
        with far_device() as far:
            device = CPU if place == "here" else far
            torch.manual_seed(0)
            study = Study(SMOKE, smoke_study.folder, smoke_study.work, device=device)
            decoder = study.model(Variant("it")).decoder.eval()
            segmenter = Segmenter(
                study.backbone, decoder, SMOKE.labels.classes, SMOKE.scales, 0, "smoke"
            )
            masks = segmenter.label(pictures, crf=CRF(iterations=1))
            tables = score_decoders(study.backbone, {"it": decoder}, images, crf=CRF(iterations=1))
            found.append((np.stack(masks), [one.tolist() for one in tables["it"]]))
    assert (found[0][0] == found[1][0]).all() and found[0][1] == found[1][1]


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # it is copied
@pytest.mark.rehearsal
@pytest.mark.parametrize(
    "number", ["00", "01", "02", "03", "04", "05", "07", "08", "09", "10", "11"]
)
def test_notebooks_run_there(number, smoke_study, tmp_path, monkeypatch) -> None:
    """In this process, so that the far device is there; nothing may be left on the wrong one."""
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    for module in (experiment, inference):
        monkeypatch.setattr(module, "find_device", lambda _: FAR)
    told = {"profile": "smoke", "out_dir": str(tmp_path / "out"), "work_dir": str(tmp_path)}
    if number != "08":
        told["data_dir"] = str(smoke_study.folder)
    times = {"CAM explorer": [1.0] * 50}  # in place of the cell that measures them
    names: dict = {"display": lambda *_: None, "milliseconds": times}
    with far_device():
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and "timed(" not in cell.source:
                tagged = "parameters" in cell.metadata.get("tags", [])
                more = f"\nglobals().update({told})" * tagged
                exec(compile(cell.source + more, f"{number}: {cell.source[:40]!r}", "exec"), names)
    plt.close("all")
