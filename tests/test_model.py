"""The composed model and its training on a tiny world."""

import os
from dataclasses import replace

import pytest
import torch

from weclip_lib import cam
from weclip_lib.backbone import load_backbone
from weclip_lib.data.datasets import LabelledImages, normalise
from weclip_lib.data.profiles import PROFILES
from weclip_lib.decoder import Decoder
from weclip_lib.evaluation.scores import label_map, predict
from weclip_lib.labels import IGNORE_INDEX
from weclip_lib.model import WeCLIP
from weclip_lib.storage.tensors import load_weights, save_weights
from weclip_lib.training import features as caches
from weclip_lib.training.features import FeatureCache, static_labels
from weclip_lib.training.loop import build_optimizer, train_decoder
from weclip_lib.training.sources import CachedSource
from weclip_lib.training.train import trained_decoder
from weclip_lib.training.watch import KeptLabels, rfm_labels
from weclip_lib.world.minivoc import write_voc

SMOKE = PROFILES["smoke"]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("MiniCLIP", "miniclip-v2")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Eight training pictures, and no mask folder at all."""
    folder = write_voc(tmp_path_factory.mktemp("data") / "world", {"train": 8})
    for path in (folder / "SegmentationClass").iterdir():
        path.unlink()
    (folder / "SegmentationClass").rmdir()
    return LabelledImages(folder, "train", SMOKE.labels, min_size=8)


def build(backbone, **changes) -> WeCLIP:
    return WeCLIP(backbone, SMOKE.labels, replace(SMOKE.method, **changes), SMOKE.decoder)


@pytest.fixture(scope="module")
def cache(backbone, world, tmp_path_factory):
    return FeatureCache(build(backbone), world, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def static(backbone, cache, tmp_path_factory):
    return static_labels(build(backbone), cache, tmp_path_factory.mktemp("labels"))


def test_batched_grad_cam_equals_one_picture_and_class_at_a_time(backbone, world) -> None:
    model = build(backbone)
    rows = list(range(6))
    images = normalise([world.image(row) for row in rows], backbone.statistics)
    labels = world.image_labels[rows]
    together = model.extract(images, labels)
    for row in rows:
        alone = model.extract(images[row : row + 1], labels[row : row + 1])
        torch.testing.assert_close(together.cam[row], alone.cam[0], atol=2e-4, rtol=0)
    assert together.cam.amax() <= 1 and together.cam.amin() >= 0
    assert together.cam[labels == 0].eq(0).all()


def test_a_picture_without_foreground_is_all_background(backbone) -> None:
    model = build(backbone)
    images, labels = torch.randn(2, 3, 40, 56), torch.zeros(2, 20)
    features = model.extract(images, labels)
    assert features.cam.eq(0).all()
    assert model.pseudo_label(model.refine_cam(features), images, labels).eq(0).all()
    logits, affinity = model.decoder(features.tokens, (5, 7))
    label = model.pseudo_label(model.refine_cam(features, affinity), images, labels)
    assert all(loss.isfinite() for loss in model.losses(logits, affinity, label))


def test_padding_is_ignored_or_trained_on(backbone, world) -> None:
    images = normalise([world.image(0)], backbone.statistics)
    labels = world.image_labels[:1]
    padded = torch.zeros(1, 160, 160, dtype=torch.bool)
    padded[..., 150:] = True
    for ignore in (True, False):
        model = build(backbone, ignore_padding=ignore)
        refined = model.refine_cam(model.extract(images, labels))
        label = model.pseudo_label(refined, images, labels, padded=padded)
        assert bool((label[padded] == IGNORE_INDEX).all()) == ignore
        assert (label[~padded] != IGNORE_INDEX).all()


def test_one_step_changes_the_decoder_only(backbone, cache, static) -> None:
    model = build(backbone)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    features = cache.features_of([0, 1])
    logits, affinity = model.decoder(features.tokens, (20, 20))
    loss = sum(model.losses(logits, affinity, static.label[[0, 1]].long()))
    loss.backward()
    build_optimizer(model, SMOKE.budget).step()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)
    assert all(p.grad is None for p in backbone.parameters())


def test_cache_holds_what_the_model_computes(backbone, world, cache, static) -> None:
    model = build(backbone)
    rows = [1, 3]
    images = normalise([world.image(row)[:, ::-1] for row in rows], backbone.statistics)
    features = model.extract(images, world.image_labels[rows])
    mirrored = [len(world) + row for row in rows]
    kept = cache.features_of(mirrored)
    torch.testing.assert_close(cache.pixels_of(mirrored), images)
    torch.testing.assert_close(kept.cam, features.cam, atol=1e-3, rtol=0)
    torch.testing.assert_close(kept.tokens, features.tokens, atol=2e-2, rtol=2e-3)
    torch.testing.assert_close(kept.attention, features.attention, atol=1e-3, rtol=1e-3)
    label = model.pseudo_label(model.refine_cam(features), images, world.image_labels[rows])
    assert (label != static.label[mirrored]).float().mean() < 0.002


def test_cache_misses_when_a_setting_changes(backbone, world, cache, tmp_path) -> None:
    other = build(backbone, template="a photo of {}.")
    assert FeatureCache(other, world, tmp_path).key != cache.key
    other = build(backbone, rfm_layers=6)
    assert FeatureCache(other, world, tmp_path).key != cache.key
    for count, changes in ((1, {}), (1, {"rfm_start": 0.1}), (2, {"keep_box_ends": False})):
        static_labels(build(backbone, **changes), cache, tmp_path / "labels")
        assert len(list((tmp_path / "labels").glob("labels-*"))) == count


def test_cache_is_bounded(backbone, world, tmp_path, monkeypatch) -> None:
    first = FeatureCache(build(backbone), world, tmp_path)
    second = FeatureCache(build(backbone, template="{}"), world, tmp_path)
    size = sum(file.stat().st_size for file in (tmp_path / f"features-{first.key}").iterdir())
    os.utime(tmp_path / f"features-{first.key}", (1, 1))
    monkeypatch.setattr(caches, "LIMIT", int(1.5 * size))
    third = FeatureCache(build(backbone, template="a {}"), world, tmp_path)
    left = {path.name for path in tmp_path.glob("features-*")}
    assert left == {f"features-{features.key}" for features in (second, third)}


def test_rfm_starts_at_its_step(backbone, cache, static, monkeypatch) -> None:
    """Of 8 steps with rfm_start 0.25 the first two use the static labels."""
    calls = []
    original = cam.pseudo_label
    monkeypatch.setattr(cam, "pseudo_label", lambda *a, **k: calls.append(1) or original(*a, **k))
    budget = replace(SMOKE.budget, steps=8)
    for start, expected in ((0.25, 6), (1.0, 0), (0.0, 8)):
        calls.clear()
        train_decoder(
            build(backbone, rfm_start=start), CachedSource(cache, static.label), budget, seed=0
        )
        assert len(calls) == expected


def test_training_repeats_bit_for_bit_and_is_kept(backbone, cache, static, tmp_path) -> None:
    def run(folder):
        return trained_decoder(
            lambda: build(backbone),
            CachedSource(cache, static.label),
            SMOKE.budget,
            seed=3,
            folder=tmp_path / folder,
        )

    runs = [run("a"), run("b"), run("a")]  # the last one is read back
    assert runs[0].history == runs[1].history == runs[2].history
    assert runs[0].cpu_seconds == runs[2].cpu_seconds > 0
    weights = (trained.model.decoder.state_dict().values() for trained in runs)
    for one, two, three in zip(*weights, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_watching_changes_nothing(backbone, cache, static, tmp_path) -> None:
    budget, rows = replace(SMOKE.budget, steps=3), [1, 5, 7]
    torch.manual_seed(0)
    plain, watched = build(backbone), build(backbone)
    watched.decoder.load_state_dict(plain.decoder.state_dict())
    train_decoder(plain, CachedSource(cache, static.label), budget, seed=0)
    kept = KeptLabels(cache, rows, tmp_path)
    train_decoder(watched, CachedSource(cache, static.label), budget, seed=0, watcher=kept)
    weights = [model.decoder.state_dict().values() for model in (plain, watched)]
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))
    labels, at = kept.read()
    assert at == [1, 2, 3]
    assert torch.equal(labels[-1], rfm_labels(watched, cache, rows))


def test_training_on_some_rows(backbone, cache, static) -> None:
    """Labels of other rows are never read: ids of no class there would raise."""
    rows = [0, 3, 4, 9]
    labels = torch.full_like(static.label, 200)
    labels[rows] = static.label[rows]
    model = build(backbone, rfm_start=1.0)
    train_decoder(model, CachedSource(cache, labels, rows), SMOKE.budget, seed=0)
    with pytest.raises(ValueError, match=r"3 pictures.* do not fill a batch of 4"):
        train_decoder(model, CachedSource(cache, labels, rows[:3]), SMOKE.budget, seed=0)


def test_infinite_loss_stops(backbone, cache, static) -> None:
    budget = replace(SMOKE.budget, learning_rate=1e30, steps=6)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train_decoder(build(backbone), CachedSource(cache, static.label), budget, seed=0)


def test_prediction_looks_at_mirror_images_only_if_told(backbone) -> None:
    torch.manual_seed(0)
    decoder = Decoder(width=backbone.width, class_count=5, block_count=11, dim=32, layers=1).eval()
    images = torch.randn(2, 3, 56, 40)
    ((plain, same),) = predict(backbone, [decoder], images, scales=(1.0,), flip=False)
    torch.testing.assert_close(same, plain, rtol=0, atol=0)
    ((_, mirrored),) = predict(backbone, [decoder], images.flip(-1), scales=(1.0,), flip=False)
    ((single, mean),) = predict(backbone, [decoder], images, scales=(1.0,))
    torch.testing.assert_close(single, plain)
    torch.testing.assert_close(mean, (plain + mirrored.flip(-1)) / 2)
    assert (mean - plain).abs().max() > 0.001


def test_of_equal_classes_the_first_is_taken() -> None:
    logits = torch.tensor([1.0, 2.0, 2.0, 0.0])[None, :, None, None].expand(1, 4, 3, 5)
    assert (label_map(logits, (7, 11)) == 1).all()


def test_decoder_size_is_the_published_one() -> None:
    decoder = Decoder(width=768, class_count=21, block_count=11)
    assert sum(p.numel() for p in decoder.parameters()) == 5_985_045


def test_decoder_names_a_wrong_number_of_blocks() -> None:
    decoder = Decoder(width=5, class_count=3, block_count=2, dim=8, layers=1)
    with pytest.raises(ValueError, match="fuses 2 blocks but got 1"):
        decoder(torch.randn(1, 1, 35, 5), (5, 7))


def test_decoder_fuses_the_last_blocks() -> None:
    torch.manual_seed(0)
    decoder = Decoder(width=5, class_count=3, block_count=2, dim=8, layers=0).eval()
    tokens = torch.randn(4, 1, 35, 5)
    whole, last = decoder(tokens, (5, 7)), decoder(tokens[-2:], (5, 7))
    assert torch.equal(whole[0], last[0]) and torch.equal(whole[1], last[1])
    # One after the other, as the official code has it, instead of multiplied first:
    levels = [project(t) for project, t in zip(decoder.projections, tokens[-2:], strict=True)]
    planes = torch.cat(levels, dim=-1).transpose(1, 2).view(1, 16, 5, 7)
    torch.testing.assert_close(whole[0], decoder.classify(decoder.fuse(planes)))


def test_weights_of_another_decoder_are_refused(tmp_path) -> None:
    small = Decoder(width=5, class_count=3, block_count=2, dim=8, layers=1)
    save_weights(small, tmp_path / "small.safetensors", {"history": []})
    large = Decoder(width=5, class_count=4, block_count=2, dim=8, layers=1)
    with pytest.raises(ValueError, match=r"classify.weight of shape \(3, 8, 1, 1\)"):
        load_weights(large, small.state_dict(), "small.safetensors")
