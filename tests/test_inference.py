"""A trained decoder on files: sizes, layouts, scores, memory, and what cannot be done."""

import json
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from weclip_lib.__main__ import main as weclip
from weclip_lib.backbone import load_backbone
from weclip_lib.config import CRF
from weclip_lib.data.datasets import MaskedImages, normalise
from weclip_lib.data.profiles import PROFILES
from weclip_lib.decoder import Decoder
from weclip_lib.evaluation import inference
from weclip_lib.evaluation import scores as evaluate
from weclip_lib.evaluation.scores import (
    count_decoders,
    enlarge,
    label_map,
    resize_longer,
    score_decoders,
    shown_to,
)
from weclip_lib.ops.metrics import confusion_matrix
from weclip_lib.storage.pictures import read_mask, write_mask
from weclip_lib.storage.tensors import read_note, save_weights
from weclip_lib.training.train import trained_note
from weclip_lib.world.minivoc import write_voc

SMOKE = replace(PROFILES["smoke"], long_side=80)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    decoder = Decoder(width=128, class_count=21, block_count=11, dim=32, layers=1)
    path = tmp_path_factory.mktemp("run") / "trained.safetensors"
    save_weights(decoder, path, trained_note(SMOKE, 7))
    return path


def changed(trained, path, **note):
    """The same decoder with other words about itself; None takes one out."""
    kept = {k: v for k, v in (read_note(trained) | note).items() if v is not None}
    save_file(load_file(trained), path, metadata={"note": json.dumps(kept)})
    return path


def no_scaling(trained, folder):
    return changed(trained, folder / "plain.safetensors", long_side=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("data") / "w", {"train": 2, "val": 2, "test": 2})


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (50, 31)), ("b/c.png", (50, 31)), ("d.jpg", (41, 97))):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3)).astype(np.uint8)).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("not a picture")
    return tmp_path / "photos"


def test_masks_have_the_size_of_their_picture(trained, photos, tmp_path) -> None:
    given = ["predict", "--decoder", str(trained), "--overlays", "--crf", "--batch", "2"]
    weclip([*given, "--out", str(tmp_path / "out"), str(photos)])
    for name, size in (("a", (31, 50)), ("b/c", (31, 50)), ("d", (97, 41))):
        assert read_mask(tmp_path / "out" / f"{name}.png", 21).shape == size
        with Image.open(tmp_path / "out" / "overlays" / f"{name}.png") as image:
            assert image.size == size[::-1] and image.mode == "RGB"
    assert (
        (tmp_path / "out" / "classes.csv")
        .read_text()
        .startswith("id,class\n0,background\n1,aeroplane")
    )


def test_batches_and_single_pictures_agree(trained, photos) -> None:
    segmenter = inference.load_segmenter(trained)
    images = inference.find_images([photos])
    assert list(images) == ["a", "b/c", "d"]
    together, alone = (
        {n: label for n, _, label in inference.segment_files(segmenter, images, batch=size)}
        for size in (2, 1)
    )
    for name in images:
        assert (together[name] == alone[name]).mean() > 0.999


def test_settings_of_inference(trained, photos, tmp_path) -> None:
    given = ["predict", "--decoder", str(trained), "--out", str(tmp_path / "o"), str(photos)]
    weclip([*given, "-s", "scales", "[1, 0.5, 2]", "-s", "long_side", "64", "--crf"])
    for pair, message in (
        (("crf_iterations", "5"), "crf_iterations has no effect without --crf"),
        (("dim", "64"), "dim has no effect on inference: choose of scales, long_side, crf_"),
        (("scale", "1"), "no setting 'scale': did you mean scales"),
        (("scales", "[0.5]"), "the first has to be 1"),
    ):
        with pytest.raises(SystemExit, match=message):
            weclip([*given, "-s", *pair])


def test_as_the_voc_server_wants_it(trained, photos, tmp_path) -> None:
    (tmp_path / "test.txt").write_text("d\n")
    given = ["predict", "--decoder", str(trained), "--voc-server", str(photos)]
    weclip([*given, "--names", str(tmp_path / "test.txt"), "--out", str(tmp_path / "o")])
    written = [str(p.relative_to(tmp_path / "o")) for p in (tmp_path / "o").rglob("*.png")]
    assert written == ["results/VOC2012/Segmentation/comp6_test_cls/d.png"]


def test_a_second_run_replaces_its_own_masks_and_no_other(trained, photos, tmp_path) -> None:
    given = ["predict", "--decoder", str(trained), "--overlays", "--out", str(photos / "out")]
    for _ in range(2):
        weclip([*given, str(photos)])
    assert len(list((photos / "out").rglob("*.png"))) == 6
    corrected = read_mask(photos / "out" / "a.png", 21).copy()
    corrected[0] = 12
    write_mask(photos / "out" / "a.png", corrected)
    with pytest.raises(SystemExit, match=r"out/a\.png is there, but not as this command left it"):
        weclip([*given, str(photos)])
    assert (read_mask(photos / "out" / "a.png", 21) == corrected).all()


def test_one_bad_picture_does_not_end_the_run(trained, photos, tmp_path) -> None:
    (photos / "b" / "bad.jpg").write_text("no picture")
    Image.new("RGB", (5, 3)).save(photos / "tiny.png")
    out = tmp_path / "out"
    given = ["predict", "--decoder", str(no_scaling(trained, tmp_path)), "--out", str(out)]
    with pytest.raises(SystemExit, match="1 of 5 pictures could not be labelled") as caught:
        weclip([*given, str(photos), "--batch", "3"])
    assert "bad.jpg cannot be read" in str(caught.value)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.png")) == [
        "a.png",
        "b/c.png",
        "d.png",
        "tiny.png",  # smaller than a patch: shown larger
    ]
    assert read_mask(out / "tiny.png", 21).shape == (3, 5)


def test_pictures_far_longer_than_wide(trained, tmp_path) -> None:
    """The shorter side keeps a patch at every scale."""
    path = tmp_path / "panorama.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 600, 3)).astype(np.uint8)).save(
        path
    )
    weclip(["predict", "--decoder", str(trained), "--out", str(tmp_path / "o"), str(path)])
    assert read_mask(tmp_path / "o" / "panorama.png", 21).shape == (16, 600)


def test_masks_of_other_classes_are_not_mixed(trained, photos, tmp_path) -> None:
    given = ["predict", "--out", str(tmp_path / "out"), "--decoder"]
    weclip([*given, str(trained), str(photos / "a.jpg")])
    other = changed(trained, tmp_path / "other.safetensors", classes=[f"c{n}" for n in range(20)])
    with pytest.raises(
        SystemExit, match=r"classes\.csv has other classes than .*other\.safetensors"
    ):
        weclip([*given, str(other), str(photos / "d.jpg")])
    assert not (tmp_path / "out" / "d.png").exists()


def test_few_pictures_are_held_at_once(trained, photos, monkeypatch) -> None:
    """Whatever --batch says, large pictures are shown alone."""
    shown = []
    segmenter = inference.load_segmenter(trained)
    monkeypatch.setattr(inference, "BATCH_PIXELS", 2 * 31 * 50)

    def label(self, images, *, crf=None):
        shown.append([image.shape[:2] for image in images])
        return [np.zeros(image.shape[:2], np.uint8) for image in images]

    monkeypatch.setattr(inference.Segmenter, "label", label)
    for _ in inference.segment_files(segmenter, inference.find_images([photos]), batch=9):
        pass
    assert shown == [[(31, 50), (31, 50)], [(97, 41)]]


def test_crf_of_very_large_pictures(trained, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "CRF_PIXELS", 45 * 60)
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    segmenter = inference.load_segmenter(trained)
    (label,) = segmenter.label([image], crf=CRF(iterations=1))
    assert label.shape == (90, 120)
    assert (label[::2, ::2] == label[1::2, 1::2]).all()  # decided at half the size, then copied
    assert evaluate.crf_size(375, 500) == (45, 60)
    monkeypatch.undo()
    assert evaluate.crf_size(375, 500) == (375, 500)
    assert evaluate.crf_size(3000, 4000) == (627, 836)
    (label,) = segmenter.label([image])
    assert not (label[::2, ::2] == label[1::2, 1::2]).all()  # without it, at the picture's size


@pytest.mark.parametrize("together", [1, 3, 4, 11])
def test_some_classes_at_a_time_give_the_same_labels(monkeypatch, together) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 11, 3, 5)
    logits[:, 7] = logits[:, 2]  # a tie: the first class wins
    plain = enlarge(logits, (23, 31)).argmax(dim=1)
    assert (plain == 2).any() and not (plain == 7).any()
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", together * 2 * 23 * 31)
    held = []

    def watched(some, size):
        held.append(some.shape[1])
        return enlarge(some, size)

    monkeypatch.setattr(evaluate, "enlarge", watched)
    found = label_map(logits, (23, 31))
    assert found.dtype == torch.uint8 and torch.equal(found.long(), plain)
    assert max(held) == together and sum(held) == 11


def test_the_network_sees_so_many_patches_at_most(monkeypatch) -> None:
    backbone = load_backbone("MiniCLIP", "miniclip-v2")
    patch = backbone.patch_size
    monkeypatch.setattr(evaluate, "MOST_PATCHES", 12)
    images = torch.rand(1, 3, 6 * patch, 8 * patch)
    assert shown_to(backbone, images, 0).shape[-2:] == (3 * patch, 4 * patch)
    assert shown_to(backbone, images, 0, (1.0, 2.0)).shape[-2:] == (1.5 * patch, 2 * patch)
    assert shown_to(backbone, images, 2 * patch).shape[-2:] == (1.5 * patch, 2 * patch)
    monkeypatch.undo()
    assert shown_to(backbone, images, 0) is images


def test_resize_longer() -> None:
    images = torch.rand(1, 3, 375, 500)
    assert resize_longer(images, 512).shape[-2:] == (384, 512)
    assert resize_longer(images.mT, 512).shape[-2:] == (512, 384)
    assert resize_longer(images, 0) is images and resize_longer(images, 500) is images
    # The official code makes 511 pixels of some sides (REFERENCE 40).
    assert all(
        resize_longer(torch.rand(1, 3, 9, w), 512).shape[-1] == 512 for w in range(300, 501, 7)
    )


def test_scores_single_averaged_and_with_crf(trained, world, tmp_path, capsys) -> None:
    given = ["score", "--decoder", str(trained), "--data-dir", str(world), "--split", "val"]
    monkey = pytest.MonkeyPatch()
    monkey.setattr(inference, "open_profile", lambda *_: (SMOKE, world))
    with monkey.context():
        weclip([*given, "--out", str(tmp_path)])
    monkey.undo()
    table = pd.read_csv(tmp_path / "scores.csv")
    assert list(table["prediction"]) == ["single scale", "scales and flips", "with CRF"]
    assert table["miou"].between(0, 100).all() and (table["pictures"] == 2).all()
    assert (table["split"] == "val").all()
    assert {"boundary miou", "miou small", "miou medium", "miou large"} <= set(table)
    per_class = pd.read_csv(tmp_path / "per_class.csv")
    assert len(per_class) == 21 and {"with CRF precision", "with CRF recall"} <= set(per_class)
    assert list(pd.read_csv(tmp_path / "confused.csv"))[:2] == ["class", "taken for"]
    assert (tmp_path / "confusion.png").stat().st_size > 5000
    about = json.loads((tmp_path / "score.json").read_text())
    with monkey.context(), pytest.raises(SystemExit, match="crf_iterations 10, not 3: choose"):
        monkey.setattr(inference, "open_profile", lambda *_: (SMOKE, world))
        weclip([*given, "--out", str(tmp_path), "-s", "crf_iterations", "3"])
    assert about["parameters"]["decoder"] == str(trained) and "commit" in about
    assert {"scales", "crf_iterations"} <= set(about["effective"])
    said = capsys.readouterr().out
    assert "with CRF" in said and f"split val of {world}: 2 pictures" in said
    assert "boundary miou" in said and "taken for" in said
    weclip(["verify", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/scores.csv: 3 rows checked, 0 not covered" and len(lines) == 3
    changed = (
        (tmp_path / "scores.csv").read_text().replace("scales and flips,", "scales and flips,9")
    )
    (tmp_path / "scores.csv").write_text(changed)
    with pytest.raises(SystemExit, match="prediction scales and flips: miou is 9"):
        weclip(["verify", str(tmp_path)])
    with (
        monkey.context(),
        pytest.raises(SystemExit, match=r"scores\.csv is there, but not as this"),
    ):
        monkey.setattr(inference, "open_profile", lambda *_: (SMOKE, world))
        weclip([*given, "--out", str(tmp_path)])
    monkey.undo()


def test_counts_of_pictures_add_up_to_the_scores(world) -> None:
    """Every kind of prediction, picture by picture, against masks made one by one."""
    backbone = load_backbone("MiniCLIP", "miniclip-v2")
    decoders = {}
    for seed in (1, 2):
        torch.manual_seed(seed)
        decoders[seed] = Decoder(width=128, class_count=21, block_count=11, dim=32, layers=1)
    dataset, crf = MaskedImages(world, "val", SMOKE.labels), CRF(iterations=2)
    counted = count_decoders(backbone, decoders, dataset, crf=crf, batch=2)
    totals = score_decoders(backbone, decoders, dataset, crf=crf)
    for key, decoder in decoders.items():
        assert [counts.names for counts in counted[key]] == 3 * [tuple(dataset.names)]
        assert all(map(torch.equal, (c.total() for c in counted[key]), totals[key]))
        decoder.eval()
        for row, name in enumerate(dataset.names):
            image, mask = dataset.image(row), dataset.mask(row)
            pixels = normalise([image], backbone.statistics)
            ((single, mean),) = evaluate.predict(backbone, [decoder], pixels)
            found = [label_map(logits, mask.shape)[0] for logits in (single, mean)]
            found.append(torch.from_numpy(evaluate.with_crf(mean[0], image, crf)))
            for labels, counts in zip(found, counted[key], strict=True):
                table = confusion_matrix(labels, torch.from_numpy(mask), 21)
                assert (counts.picture(name) - table).abs().sum() <= 4  # batches round differently
    decoders[1].train()
    (one, other) = count_decoders(backbone, decoders, dataset, scales=(1.0,), flip=False)[1]
    assert (one.entries == other.entries).all() and decoders[1].training


def test_crf_is_a_third_table(world) -> None:
    torch.manual_seed(1)
    backbone = load_backbone("MiniCLIP", "miniclip-v2")
    decoder = Decoder(width=128, class_count=21, block_count=11, dim=32, layers=1)
    dataset = MaskedImages(world, "val", SMOKE.labels)
    plain = score_decoders(backbone, {"x": decoder}, dataset)["x"]
    more = score_decoders(backbone, {"x": decoder}, dataset, crf=CRF())["x"]
    assert len(plain) == 2 and len(more) == 3
    assert all(torch.equal(one, other) for one, other in zip(plain, more, strict=False))
    assert more[2].sum() == more[1].sum() and not torch.equal(more[2], more[1])


def test_pixels_that_wait_for_their_crf_are_bounded(world, monkeypatch) -> None:
    """Many cores do not multiply memory."""
    now, most = [], []

    def slow(logits, image, settings):
        now.append(image.shape)
        time.sleep(0.1)
        most.append(len(now))
        now.pop()
        return np.zeros(image.shape[:2], np.uint8)

    monkeypatch.setattr(evaluate, "with_crf", slow)
    backbone = load_backbone("MiniCLIP", "miniclip-v2")
    dataset = MaskedImages(world, "val", SMOKE.labels)
    decoders = {
        name: Decoder(width=128, class_count=21, block_count=11, dim=32, layers=1)
        for name in ("x", "y", "z")
    }
    pixels = dataset.mask(0).size
    for bound, expected in ((10 * pixels, 3), (int(1.5 * pixels), 1)):
        monkeypatch.setattr(evaluate, "AHEAD_PIXELS", bound)
        found = score_decoders(backbone, decoders, dataset, scales=(1.0,), flip=False, crf=CRF())
        assert max(most) >= expected if expected > 1 else max(most) == 1
        assert all(tables[2].sum() == tables[1].sum() for tables in found.values())
        most.clear()


def test_what_cannot_be_done(trained, photos, tmp_path) -> None:
    out = ["--out", str(tmp_path / "out")]
    (tmp_path / "names.txt").write_text("a\nzebra")
    (tmp_path / "cut.safetensors").write_bytes(trained.read_bytes()[:999])
    bare = tmp_path / "bare.safetensors"
    save_weights(torch.nn.Linear(2, 2), bare, {})
    predict = ["predict", *out, "--decoder"]
    for given, message in (
        ([*predict, str(tmp_path / "none"), str(photos)], "none is not there"),
        ([*predict, str(tmp_path / "cut.safetensors"), str(photos)], "cut.safetensors .*damaged"),
        ([*predict, str(bare), str(photos)], "bare.safetensors does not say which classes"),
        ([*predict, str(trained), str(tmp_path / "gone")], "gone is not there: give pictures"),
        ([*predict, str(trained), "--names", str(tmp_path / "names.txt"), str(photos)], "zebra"),
        ([*predict, str(trained), "--device", "gpu", str(photos)], "device is 'gpu': give auto"),
        (["score", *out, "--decoder", str(trained), "--profile", "voc"], "no VOC 2012 at"),
        (["score", *out, "--decoder", str(trained), "--device", "tpu"], "device is 'tpu'"),
    ):
        with pytest.raises(SystemExit, match=message):
            weclip(given)
    assert not (tmp_path / "out").exists()
    (photos / "a.png").write_bytes((photos / "b" / "c.png").read_bytes())
    with pytest.raises(ValueError, match="would write the same mask"):
        inference.find_images([photos])


@pytest.mark.parametrize("given", [["--batch", "0"], ["--batch", "-1"], ["--pictures", "-2"]])
def test_numbers_that_are_none(trained, capsys, given) -> None:
    command = ["score"] if "--pictures" in given else ["predict", "photos"]
    with pytest.raises(SystemExit):
        weclip([*command, "--decoder", str(trained), "--out", "x", *given])
    assert f"{given[0][2:]} is {given[1]}: give a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ({"scales": [0.5, 1.0]}, "scales are .*: the first has to be 1"),
        ({"scales": 3}, "scales|subscriptable"),
        ({"scales": None}, "does not say which scales"),
        ({"long_side": -2}, "long_side is -2: give a whole number of 0 or more"),
        ({"long_side": "512"}, "long_side is '512'"),
        ({"classes": "dog"}, "classes are dog, not 1 to 254 different words"),
        ({"classes": ["dog", 3]}, "not 1 to 254 different words"),
        ({"classes": ["dog", "dog"]}, "not 1 to 254 different words"),
        ({"classes": []}, "not 1 to 254 different words"),
        ({"statistics": "mine"}, "statistics is 'mine': choose one of"),
        ({"backbone": 3}, "backbone are"),
        ({"decoder": {"depth": 3}}, "depth"),
        ({"decoder": {"dim": 33}}, "give a multiple of the 8 heads"),
        ({"decoder": [3]}, "what .* says of itself is damaged"),
    ],
)
def test_decoders_whose_note_is_damaged(trained, tmp_path, note, message) -> None:
    path = changed(trained, tmp_path / "mine.safetensors", **note)
    with pytest.raises(ValueError, match=message) as caught:
        inference.load_segmenter(path)
    assert "mine.safetensors" in str(caught.value) and "`weclip train`" in str(caught.value)
