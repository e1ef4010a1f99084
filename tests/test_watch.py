from pathlib import Path

import numpy as np
import pytest
import torch

from weclip_lib.__main__ import main as weclip
from weclip_lib.storage.tensors import save_tensors
from weclip_lib.studies.study import Study, Variant
from weclip_lib.training.watch import read_run, rfm_labels

RFM = Variant("decoder, RFM")


def test_a_watched_run_keeps_what_the_model_said(smoke_study) -> None:
    study = smoke_study
    budget = study.setting.budget
    folder = study.watched_run(RFM, budget, 3, count=5)
    run = read_run(folder)
    assert run.steps == [1, 2, 3, 4] and run.names == study.train.names[:5]
    assert run.predictions.shape == run.pseudo_labels.shape == (4, 5, 160, 160)
    assert set(run.curve["metric"]) == {"loss", "segmentation_loss", "affinity_loss"}
    # The same run without anybody watching ends with the same weights.
    trained = study.train_decoder(RFM, budget, 3)
    last = run.decoders(study.backbone)["step 4"]
    for name, value in trained.model.decoder.state_dict().items():
        assert torch.equal(last.state_dict()[name], value), name
    cache = study.cache(RFM)
    expected = rfm_labels(trained.model, cache, range(5))
    assert (run.pseudo_labels[-1] == expected).float().mean() > 0.999
    assert study.watched_run(RFM, budget, 3, count=5) == folder


def test_no_more_pictures_are_watched_than_looked_at(smoke_study, tmp_path) -> None:
    few = Study(smoke_study.setting, smoke_study.folder, tmp_path, pictures=4)
    run = read_run(few.watched_run(RFM, few.setting.budget, 0, count=9))
    assert run.names == few.inspected_masked().names and len(run.names) == 4


def test_the_command_line_watches_too(smoke_study, tmp_path) -> None:
    given = (
        f"--profile smoke --data-dir {smoke_study.folder} --out {tmp_path} --workers 0 --watch 3"
    )
    weclip(["train", *given.split(), "--validate-every", "2", "--validate-pictures", "2"])
    run = read_run(tmp_path)
    assert run.steps == [1, 2, 3, 4] and len(run.names) == 3
    assert "miou" in set(run.curve["metric"])
    assert np.isin(run.predictions.numpy(), range(21)).all()


def test_a_folder_without_watched_pictures_says_what_to_do(tmp_path) -> None:
    with pytest.raises(ValueError, match="train with `--watch 8`"):
        read_run(tmp_path)


NOTE = {"names": ["a", "b"], "split": "val", "classes": ["cat"]}


def watched(folder, step: int, size: int = 3, note: dict = NOTE, **changes) -> Path:
    path = folder / "watched" / f"step-{step:07d}.safetensors"
    maps = torch.full((2, size, 5), step, dtype=torch.uint8)
    kept = {"pseudo_label": maps, "prediction": maps.clone(), "decoder.w": torch.ones(1), **changes}
    save_tensors({name: tensor for name, tensor in kept.items() if tensor is not None}, path, note)
    return path


def test_a_run_is_read(tmp_path) -> None:
    for step in (2, 10):
        watched(tmp_path, step)
    run = read_run(tmp_path)
    assert (run.steps, run.names, run.split, run.classes) == ([2, 10], ["a", "b"], "val", ["cat"])
    assert run.predictions.shape == (2, 2, 3, 5) and run.predictions[:, 0, 0, 0].tolist() == [2, 10]
    assert [list(w) for w in run.weights] == [["w"], ["w"]] and run.note == NOTE
    assert list(run.curve) == ["iteration", "metric", "value"] and run.curve.empty


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 4}, "of another run than those before"),
        ({"note": {**NOTE, "split": "train"}}, "of another run than those before"),
        ({"prediction": None}, "prediction"),
        ({"prediction": torch.zeros(3, 3, 5, dtype=torch.uint8)}, "no label map for each watched"),
        ({"prediction": torch.zeros(2, 3, 5)}, "prediction is no label map"),
    ],
)
def test_mixed_files_of_a_run(changes, message, tmp_path) -> None:
    watched(tmp_path, 1)
    path = watched(tmp_path, 2, **changes)
    with pytest.raises(
        ValueError, match=rf"{path.name} cannot be read \(.*{message}.*: train again"
    ):
        read_run(tmp_path)


def test_damaged_files_of_a_run(tmp_path) -> None:
    watched(tmp_path, 1)
    for content in ("", "iteration,value\n1,2\n", "iteration,metric,value\n1,loss,x\n", "\0"):
        (tmp_path / "curve.csv").write_text(content)
        with pytest.raises(ValueError, match=r"curve\.csv cannot be read"):
            read_run(tmp_path)
    (tmp_path / "curve.csv").write_text("iteration,metric,value\n1,loss,0.5\n")
    assert read_run(tmp_path).curve["value"].tolist() == [0.5]
    path = watched(tmp_path, 2)
    content = path.read_bytes()
    for damaged in (b"", content[:50], content[:-1], bytes(len(content))):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path.name} cannot be read"):
            read_run(tmp_path)
    path.unlink()
    watched(tmp_path, 1, note={"names": ["a", "b"]})
    with pytest.raises(ValueError, match=r"step-0000001\.safetensors cannot be read .'split'"):
        read_run(tmp_path)
