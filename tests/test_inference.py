"""A trained decoder on files: sizes, layouts, scores, and what cannot be done."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from weclip_lib import inference
from weclip_lib.backbone import load_backbone
from weclip_lib.checkpoint import save_weights
from weclip_lib.config import CRF, PROFILES
from weclip_lib.datasets import MaskedImages
from weclip_lib.decoder import Decoder
from weclip_lib.evaluate import resize_longer, score_decoders
from weclip_lib.minivoc import write_voc
from weclip_lib.pictures import read_mask
from weclip_lib.train import trained_note

SMOKE = replace(PROFILES["smoke"], long_side=80)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    decoder = Decoder(width=128, class_count=13, block_count=11, dim=32, layers=1)
    path = tmp_path_factory.mktemp("run") / "trained.safetensors"
    save_weights(decoder, path, trained_note(SMOKE, 7))
    return path


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
    inference.main([*given, "--out", str(tmp_path / "out"), str(photos)])
    for name, size in (("a", (31, 50)), ("b/c", (31, 50)), ("d", (97, 41))):
        assert read_mask(tmp_path / "out" / f"{name}.png", 13).shape == size
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


def test_as_the_voc_server_wants_it(trained, photos, tmp_path) -> None:
    (tmp_path / "test.txt").write_text("d\n")
    given = ["predict", "--decoder", str(trained), "--voc-server", str(photos)]
    inference.main([*given, "--names", str(tmp_path / "test.txt"), "--out", str(tmp_path / "o")])
    written = [str(p.relative_to(tmp_path / "o")) for p in (tmp_path / "o").rglob("*.png")]
    assert written == ["results/VOC2012/Segmentation/comp6_test_cls/d.png"]


def test_very_large_pictures(trained, monkeypatch) -> None:
    monkeypatch.setattr(inference, "LARGEST", 60)
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    (label,) = inference.load_segmenter(trained).label([image], crf=CRF(iterations=1))
    assert label.shape == (90, 120)
    assert (label[::2, ::2] == label[1::2, 1::2]).all()  # decided at half the size, then copied


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
        inference.main([*given, "--out", str(tmp_path)])
    monkey.undo()
    table = pd.read_csv(tmp_path / "scores.csv")
    assert list(table["prediction"]) == ["single scale", "scales and flips", "with CRF"]
    assert table["miou"].between(0, 100).all() and (table["pictures"] == 2).all()
    assert len(pd.read_csv(tmp_path / "per_class.csv")) == 13
    assert (tmp_path / "confusion.png").stat().st_size > 5000
    assert "with CRF" in capsys.readouterr().out


def test_crf_is_a_third_table(world) -> None:
    torch.manual_seed(1)
    backbone = load_backbone("MiniCLIP", "miniclip")
    decoder = Decoder(width=128, class_count=13, block_count=11, dim=32, layers=1)
    dataset = MaskedImages(world, "val", SMOKE.labels)
    plain = score_decoders(backbone, {"x": decoder}, dataset)["x"]
    more = score_decoders(backbone, {"x": decoder}, dataset, crf=CRF())["x"]
    assert len(plain) == 2 and len(more) == 3
    assert all(torch.equal(one, other) for one, other in zip(plain, more, strict=False))
    assert more[2].sum() == more[1].sum() and not torch.equal(more[2], more[1])


def test_what_cannot_be_done(trained, photos, tmp_path, monkeypatch) -> None:
    out = ["--out", str(tmp_path / "out")]
    (tmp_path / "names.txt").write_text("a\nzebra")
    (tmp_path / "cut.safetensors").write_bytes(trained.read_bytes()[:999])
    bare = tmp_path / "bare.safetensors"
    save_weights(torch.nn.Linear(2, 2), bare, {})
    (photos / "bad.jpg").write_text("no picture")
    predict = ["predict", *out, "--decoder"]
    for given, message in (
        ([*predict, str(tmp_path / "none"), str(photos)], "none is not there"),
        ([*predict, str(tmp_path / "cut.safetensors"), str(photos)], "is damaged"),
        ([*predict, str(bare), str(photos)], "does not say which classes"),
        ([*predict, str(trained), str(tmp_path / "gone")], "gone is not there: give pictures"),
        ([*predict, str(trained), str(photos)], r"bad\.jpg cannot be read"),
        ([*predict, str(trained), "--names", str(tmp_path / "names.txt"), str(photos)], "zebra"),
        (["score", *out, "--decoder", str(trained), "--profile", "voc"], "no VOC 2012 at"),
    ):
        with pytest.raises(SystemExit, match=message):
            inference.main(given)
    (photos / "a.png").write_bytes((photos / "b" / "c.png").read_bytes())
    with pytest.raises(ValueError, match="would write the same mask"):
        inference.find_images([photos])
