"""Training at length: what is resumed, cut in parts or shared equals what was done in one piece."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from weclip_lib.__main__ import main as weclip
from weclip_lib.backbone import load_backbone
from weclip_lib.data.datasets import LabelledImages, MaskedImages
from weclip_lib.data.profiles import PROFILES
from weclip_lib.labels import IGNORE_INDEX
from weclip_lib.model import WeCLIP
from weclip_lib.storage.files import Unusable, only_one
from weclip_lib.storage.pictures import read_mask, write_mask
from weclip_lib.storage.provenance import ROOT
from weclip_lib.training import checkpoints as state
from weclip_lib.training import train
from weclip_lib.training.distributed import joined
from weclip_lib.training.loop import RunOptions, train_decoder
from weclip_lib.training.sources import AugmentedSource, augment
from weclip_lib.world.minivoc import write_voc

SMOKE = PROFILES["smoke"]
BUDGET = replace(SMOKE.budget, steps=4, crop=80)
PLAIN = replace(SMOKE.decoder, dropout=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("data") / "world", {"train": 10, "val": 3})


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("MiniCLIP", "miniclip-v2")


def build(backbone, shape=SMOKE.decoder, **changes) -> WeCLIP:
    torch.manual_seed(7)
    method = replace(SMOKE.method, par_iterations=2, **changes)
    return WeCLIP(backbone, SMOKE.labels, method, shape)


def train_here(backbone, world, options=None, shape=SMOKE.decoder, budget=BUDGET):
    source = AugmentedSource(LabelledImages(world, "train", SMOKE.labels), budget.crop)
    return train_decoder(
        build(backbone, shape), source, budget, seed=3, options=options or RunOptions()
    )


def weights(trained) -> list[torch.Tensor]:
    return list(trained.model.decoder.state_dict().values())


class TestAugmentation:
    """Pixels hold their own place, so that every one can be traced."""

    height, width = 9, 13

    def picture(self):
        rows, columns = np.mgrid[: self.height, : self.width].astype(np.uint8)
        image = np.stack([rows, columns, np.full_like(rows, 200)], axis=-1)
        return image, (rows * self.width + columns).astype(np.uint8)

    @pytest.mark.parametrize("crop", [5, 11, 20])
    def test_mask_and_picture_stay_together(self, crop) -> None:
        image, mask = self.picture()
        starts, mirrors = set(), set()
        for number in range(40):
            found = augment(image, mask, crop, np.random.default_rng(number), (1.0, 1.0))
            assert found.pixels.shape == (crop, crop, 3)
            assert ((found.mask == IGNORE_INDEX) == found.padded).all()
            assert ((found.pixels[..., 2] == 0) == found.padded).all()
            real = ~found.padded
            assert real.sum() == min(crop, self.height) * min(crop, self.width)
            place = found.pixels[..., 0] * self.width + found.pixels[..., 1]
            assert (place[real] == found.mask[real]).all()
            columns = found.pixels[..., 1][real].reshape(min(crop, self.height), -1)[0]
            mirrors.add(bool(columns[0] > columns[-1]))
            starts.add((tuple(np.argwhere(real)[0]), int(found.mask[real].min())))
        assert mirrors == {True, False} and len(starts) > 5

    def test_scale(self) -> None:
        image, mask = self.picture()
        sizes = set()
        for number in range(30):
            found = augment(image, mask, 40, np.random.default_rng(number), (0.5, 2.0))
            rows, columns = np.nonzero(~found.padded)
            sizes.add((np.ptp(rows) + 1, np.ptp(columns) + 1))
        assert min(sizes)[0] in (4, 5, 6) and max(sizes)[0] in (16, 17, 18) and len(sizes) > 8


def test_epochs_and_workers(backbone, world) -> None:
    images = MaskedImages(world, "train", SMOKE.labels)
    source = AugmentedSource(images, 64)
    drawn = [row for step in range(5) for row in source.drawn(1, step, 4)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:] and source.drawn(2, 0, 4) != drawn[:4]
    assert source.drawn(1, 3, 4) == drawn[12:16]  # asked out of order
    model = build(backbone)
    asked = (model, 1, range(1, 3), 4, (0, 1), 2)
    alone = list(source.batches(*asked))
    helped = list(AugmentedSource(images, 64, workers=2).batches(*asked))
    assert [b.rows for b in alone] == [b.rows for b in helped]
    assert [row for batch in alone for row in batch.rows] == drawn[4:12]
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.pixels(), other.pixels()) and torch.equal(one.label, other.label)
        assert (one.label[one.padded] == IGNORE_INDEX).all() and not one.padded.all()


# AdamW's first steps are as long for a rounding error as for a gradient; small ones keep the paths
# of two sums that differ by rounding together.
SHORT = replace(BUDGET, learning_rate=1e-4)


def gradients(trained) -> list[torch.Tensor]:
    return [parameter.grad for parameter in trained.model.decoder.parameters()]


def assert_alike(trained, history: list, found: list[torch.Tensor]) -> None:
    """Loss curve, and gradients of the last step."""
    for name in ("loss", "segmentation_loss", "affinity_loss"):
        assert trained.history[0][name] == pytest.approx(history[0][name], abs=1e-5)
    largest = max(grad.abs().max() for grad in found)
    assert largest > 0.01
    for one, other in zip(gradients(trained), found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_accumulated_parts_equal_the_whole_batch(backbone, world) -> None:
    whole = train_here(backbone, world, shape=PLAIN, budget=SHORT)
    parts = train_here(backbone, world, RunOptions(accumulate=2), PLAIN, SHORT)
    assert_alike(whole, parts.history, gradients(parts))
    with pytest.raises(ValueError, match="cannot be cut in 3 equal parts"):
        train_here(backbone, world, RunOptions(accumulate=3))


def _share(rank: int, port: int, world, path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    backbone = load_backbone("MiniCLIP", "miniclip-v2")
    with joined("cpu") as group:
        options = RunOptions(group=group, folder=path.parent / "run", checkpoint_every=4)
        trained = train_here(backbone, world, options, PLAIN, SHORT)
        if group.is_first:
            torch.save((gradients(trained), trained.history), path)


def test_two_processes_equal_one(backbone, world, tmp_path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(_share, (port, world, tmp_path / "found.pt"), nprocs=2)
    found, history = torch.load(tmp_path / "found.pt")
    kept = load_file(state.checkpoints(tmp_path / "run")[0] / "state.safetensors")
    assert {"rng.cpu.0", "rng.cpu.1"} <= set(kept)  # dropout of each
    assert_alike(train_here(backbone, world, shape=PLAIN, budget=SHORT), history, found)


def test_resumed_is_bit_for_bit(backbone, world, tmp_path) -> None:
    """Stopped between two points of the curve, with dropout, before and after the RFM starts."""
    plain = train_here(backbone, world)
    for stop in (1, 3):
        options = RunOptions(folder=tmp_path / str(stop), checkpoint_every=stop)
        train_here(backbone, world, options)
        for later in state.checkpoints(options.folder)[1:]:  # as if killed after the first
            for file in later.iterdir():
                file.unlink()
            later.rmdir()
        resumed = train_here(backbone, world, options)
        assert resumed.history == plain.history
        for one, other in zip(weights(plain), weights(resumed), strict=True):
            assert torch.equal(one, other)
        assert len(state.checkpoints(options.folder)) <= state.KEPT


COUNTS = dict(zip(("train", "val", "test"), SMOKE.drawn, strict=True))
COMMAND = ["--profile", "smoke", "--steps", "6", "--workers", "0", "--checkpoint-every", "1"]


def test_killed_anywhere(world, tmp_path) -> None:
    """By SIGKILL, from outside, at no chosen moment; the end is that of a run never killed."""
    data = write_voc(tmp_path / "data", COUNTS)
    given = [*COMMAND, "--data-dir", str(data), "--out"]
    weclip(["train", *given, str(tmp_path / "whole")])
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "weclip_lib", "train", *given, str(killed)]
    same = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums follow it
    with subprocess.Popen(command, cwd=ROOT, env=same, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while not list(killed.glob("checkpoint-*2")) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert list(killed.glob("checkpoint-*")) and not (killed / "trained.safetensors").exists()
    weclip(["train", *given, str(killed)])
    for name in ("trained.safetensors", "curve.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (killed / name).read_bytes()
    about = json.loads((killed / "train.json").read_text())
    assert about["device"] == "cpu" and about["parameters"]["out"] == str(killed)
    assert about["effective"]["steps"] == about["parameters"]["steps"]
    assert "commit" in about


def test_checkpoints_of_another_run_say_what_differs(backbone, world, tmp_path) -> None:
    options = RunOptions(folder=tmp_path, checkpoint_every=2)
    train_here(backbone, world, options)
    with pytest.raises(ValueError, match=r"budget\.steps was 4 and is 5: choose another --out"):
        train_here(backbone, world, options, budget=replace(BUDGET, steps=5))
    words = replace(SMOKE.labels, prompts={"cat": "bird dog"})
    other = WeCLIP(backbone, words, build(backbone).method, SMOKE.decoder)
    source = AugmentedSource(LabelledImages(world, "train", SMOKE.labels), BUDGET.crop)
    with pytest.raises(
        ValueError, match=r"class prompts \(classes\.csv\): 'bird dog' added and 'cat' rem"
    ):
        train_decoder(other, source, BUDGET, seed=3, options=options)


def test_damaged_checkpoints_are_passed_over(backbone, world, tmp_path, capsys) -> None:
    """The one before is taken, and the end is that of a run without damage; none left: an error."""
    plain = train_here(backbone, world)
    options = RunOptions(folder=tmp_path, checkpoint_every=1)
    train_here(backbone, world, options)
    kept = state.checkpoints(tmp_path)
    for path, length in ((kept[-1] / "state.safetensors", 1000), (kept[-2] / "state.json", 20)):
        path.write_bytes(path.read_bytes()[:length])
    resumed = train_here(backbone, world, options)
    said = capsys.readouterr().err
    assert all(f"{path.name}" in said for path in kept[-2:]) and kept[-3].name not in said
    for one, other in zip(weights(plain), weights(resumed), strict=True):
        assert torch.equal(one, other)
    for path in state.checkpoints(tmp_path):
        (path / "decoder.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        train_here(backbone, world, options)


def test_copied_pictures_are_the_same_and_changed_ones_are_not(backbone, world, tmp_path) -> None:
    data, options = tmp_path / "data", RunOptions(folder=tmp_path / "run", checkpoint_every=2)
    shutil.copytree(world, data)
    plain = train_here(backbone, data, options)
    shutil.rmtree(data)
    shutil.copytree(world, data, copy_function=shutil.copyfile)  # other times
    again = train_here(backbone, data, options)
    assert again.history == plain.history
    path = data / "JPEGImages" / "train_00000.jpg"
    shutil.copyfile(data / "JPEGImages" / "train_00001.jpg", path)
    with pytest.raises(ValueError, match="is of another run: pictures"):
        train_here(backbone, data, options)
    shutil.copyfile(world / "JPEGImages" / "train_00000.jpg", path)
    table = data / "labels.csv"
    table.write_text(re.sub("train_00000,.*", "train_00000,", table.read_text()))
    with pytest.raises(ValueError, match=r"names and tags \(train\.txt and labels\.csv\)"):
        train_here(backbone, data, options)


def test_corrected_masks_are_another_source(world, tmp_path) -> None:
    data = shutil.copytree(world, tmp_path / "data")

    def key() -> str:
        return AugmentedSource(MaskedImages(data, "train", SMOKE.labels), 80).key

    before, path = key(), data / "SegmentationClass" / "train_00000.png"
    assert key() == before
    mask = read_mask(path, 21)
    write_mask(path, np.where(mask == mask.max(), 0, mask).astype(np.uint8))
    assert key() != before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_on_the_way_is_named(backbone, world, tmp_path, workers) -> None:
    """Also by a worker process, without its traceback."""
    data = shutil.copytree(world, tmp_path / "data")
    source = AugmentedSource(LabelledImages(data, "train", SMOKE.labels), 80, workers=workers)
    for path in (data / "JPEGImages").glob("train*"):
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(Unusable) as error:
        train_decoder(build(backbone), source, BUDGET, seed=3)
    assert "cannot be read" in str(error.value) and "Traceback" not in str(error.value)


def test_full_disk_keeps_the_checkpoint_before(backbone, world, tmp_path, monkeypatch) -> None:
    written = []

    def full(tensors, path, *_) -> None:
        written.append(path)
        if len(written) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    real = state.save_file
    monkeypatch.setattr(state, "save_file", full)
    options = RunOptions(folder=tmp_path, checkpoint_every=1)
    with pytest.raises(OSError, match="No space left"):
        train_here(backbone, world, options)
    assert [path.name for path in state.checkpoints(tmp_path)] == ["checkpoint-0000001"]
    resumed = train_here(backbone, world, options)
    for one, other in zip(weights(train_here(backbone, world)), weights(resumed), strict=True):
        assert torch.equal(one, other)


def test_a_loss_that_is_not_finite_names_the_pictures(backbone, world, tmp_path) -> None:
    budget = replace(BUDGET, learning_rate=1e30)
    options = RunOptions(folder=tmp_path, checkpoint_every=100)
    with pytest.raises(FloatingPointError, match=r"at step 2, with train_0000.*: lower the learn"):
        train_here(backbone, world, options, budget=budget)
    about = json.loads((tmp_path / "failed_batch.json").read_text())
    assert about["iteration"] == 2 and len(about["pictures"]) == 4


def test_not_finite_between_two_looks_is_never_kept(backbone, world, tmp_path) -> None:
    budget = replace(BUDGET, learning_rate=1e30, steps=9)
    with pytest.raises(FloatingPointError, match="at step 2, with train_0000"):
        train_here(backbone, world, RunOptions(folder=tmp_path, checkpoint_every=3), budget=budget)
    assert state.checkpoints(tmp_path) == []


def test_supervised_never_makes_labels(world, tmp_path, monkeypatch) -> None:
    data = write_voc(tmp_path / "data", COUNTS)
    monkeypatch.setattr(WeCLIP, "pseudo_label", None)  # would be called by static labels and RFM
    given = ["--profile", "smoke", "--steps", "2", "--workers", "0", "--data-dir", str(data)]
    weclip(["train", *given, "--supervised", "--out", str(tmp_path / "out")])
    with pytest.raises(TypeError):
        weclip(["train", *given, "--out", str(tmp_path / "weak")])


def test_broken_pictures_are_listed_and_left_out(tmp_path, capsys) -> None:
    data = write_voc(tmp_path / "data", COUNTS)
    content = (data / "JPEGImages" / "train_00003.jpg").read_bytes()
    (data / "JPEGImages" / "train_00003.jpg").write_bytes(content[: len(content) // 2])
    given = ["--profile", "smoke", "--steps", "1", "--workers", "0", "--data-dir", str(data)]
    with pytest.raises(SystemExit, match=r"train_00003\.jpg cannot be read"):
        weclip(["train", *given, "--out", str(tmp_path / "out")])
    weclip(["train", *given, "--skip-broken", "--out", str(tmp_path / "out")])
    assert "1 picture(s) left out" in capsys.readouterr().out
    assert "train_00003.jpg cannot be read" in (tmp_path / "out" / "skipped.txt").read_text()


def test_validation_changes_nothing(backbone, world) -> None:
    images = MaskedImages(world, "val", SMOKE.labels)
    score = train.validation(SMOKE, build(backbone), images)
    watched = train_here(backbone, world, RunOptions(validate=score, validate_every=1))
    assert [p["iteration"] for p in watched.history if "miou" in p] == [1, 2, 3, 4]
    for one, other in zip(weights(train_here(backbone, world)), weights(watched), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(
            (name, -1)
            for name in ("steps", "pictures", "watch", "batch", "crop", "workers", "seed")
        ),
        *((name, 0) for name in ("checkpoint-every", "accumulate")),
        ("steps", 2**40),
    ],
)
def test_numbers_are_refused_by_name(tmp_path, capsys, option, value) -> None:
    with pytest.raises(SystemExit):
        weclip(["train", *COMMAND, "--out", str(tmp_path / "out"), f"--{option}", str(value)])
    said = f"{option.replace('-', '_')} is {value}: give a whole number"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_option_or_no_number_is_named(tmp_path, capsys) -> None:
    place = ["--out", str(tmp_path / "out")]
    for given, words in (
        (["--batch", "two"], ["parsing --batch", "two"]),
        (["--stepz", "2"], ["Unrecognized options: --stepz", "--steps INT"]),
    ):
        with pytest.raises(SystemExit):
            weclip(["train", *COMMAND, *place, *given])
        said = capsys.readouterr().err
        assert all(word in said for word in words)
    assert not (tmp_path / "out").exists()


def test_nobody_elses_decoder_is_replaced(world, tmp_path) -> None:
    data = write_voc(tmp_path / "data", COUNTS)
    given = ["--profile", "smoke", "--steps", "1", "--workers", "0", "--data-dir", str(data)]
    out = tmp_path / "out"
    out.mkdir()
    (out / "trained.safetensors").write_text("mine")
    with pytest.raises(SystemExit, match="is there without the checkpoints of its run: choose"):
        weclip(["train", *given, "--out", str(out)])
    assert (out / "trained.safetensors").read_text() == "mine"
    with pytest.raises(SystemExit, match="is a data set, and what is written would be part of it"):
        weclip(["train", *given, "--out", str(data)])


def test_nothing_to_learn(tmp_path) -> None:
    data = write_voc(tmp_path / "data", COUNTS)
    table = data / "labels.csv"
    table.write_text(re.sub(r"(train_\d+),.*", r"\1,", table.read_text()))
    given = ["--profile", "smoke", "--steps", "1", "--data-dir", str(data)]
    with pytest.raises(SystemExit, match=r"no picture of train in .* has a tag"):
        weclip(["train", *given, "--out", str(tmp_path / "out")])


def test_two_runs_into_one_folder(tmp_path) -> None:
    with only_one(tmp_path / "trained.safetensors"):
        # The lock is the process's own; a second one is refused.
        line = [sys.executable, "-m", "weclip_lib", "train", *COMMAND, "--out", str(tmp_path)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"process {os.getpid()} on " in done.stderr and "trained.safetensors" in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--profile", "vok"], "unknown profile 'vok'"),
        (["--profile", "folder"], "profile folder needs data_dir"),
        (["--profile", "voc"], "no VOC 2012 at"),
        (["--split", "none"], r"none\.txt is missing: splits here are"),
        (["--crop", "81"], "crops of 81 pixels are no multiple of a patch of 8"),
        (["--weights", "none.pt"], "are neither a file nor a tag of MiniCLIP"),
        (["--device", "gpu"], "device is 'gpu': give auto"),
        (["--batch", "400"], "16 pictures.* do not fill a batch of 400"),
    ],
)
def test_command_line_errors(world, tmp_path, more, message) -> None:
    data = write_voc(tmp_path / "data", COUNTS)
    place = [] if "--profile" in more else ["--data-dir", str(data)]
    with pytest.raises(SystemExit, match=message):
        weclip(["train", *COMMAND, *place, "--out", str(tmp_path / "out"), *more])
