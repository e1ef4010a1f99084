import numpy as np
import pytest
import torch

from weclip_lib.loop import rfm_label
from weclip_lib.study import Study, Variant
from weclip_lib.train import main as train
from weclip_lib.watch import read_run

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
    features = study.features(RFM)
    expected = rfm_label(trained.model, features, range(5))
    assert (run.pseudo_labels[-1] == expected).float().mean() > 0.999
    assert study.watched_run(RFM, budget, 3, count=5) == folder


def test_no_more_pictures_are_watched_than_looked_at(smoke_study, tmp_path) -> None:
    few = Study(smoke_study.setting, smoke_study.folder, tmp_path, pictures=4)
    run = read_run(few.watched_run(RFM, few.setting.budget, 0, count=9))
    assert run.names == few.looked_at().names and len(run.names) == 4


def test_the_command_line_watches_too(smoke_study, tmp_path) -> None:
    given = (
        f"--profile smoke --data-dir {smoke_study.folder} --out {tmp_path} --workers 0 --watch 3"
    )
    train([*given.split(), "--validate-every", "2", "--validate-pictures", "2"])
    run = read_run(tmp_path)
    assert run.steps == [1, 2, 3, 4] and len(run.names) == 3
    assert "miou" in set(run.curve["metric"])
    assert np.isin(run.predictions.numpy(), range(13)).all()


def test_a_folder_without_watched_pictures_says_what_to_do(tmp_path) -> None:
    with pytest.raises(ValueError, match="train with `--watch 8`"):
        read_run(tmp_path)
