import json
import warnings

import open_clip
import pytest
import torch

from weclip_lib import backbone as module
from weclip_lib import weights as sources
from weclip_lib.backbone import load_backbone, run_block


@pytest.fixture(scope="module")
def miniclip():
    return load_backbone("MiniCLIP", "miniclip")


def test_loading_says_nothing(caplog) -> None:
    load_backbone("MiniCLIP", "miniclip")
    assert caplog.text == ""


def test_equals_open_clip(miniclip) -> None:
    """All blocks by our walk, against open_clip's own encode_image."""
    images = torch.randn(2, 3, 112, 112)
    features = miniclip.encode_image(images)
    last, _ = run_block(miniclip.blocks[-1], features.tokens[-1])
    visual = miniclip.visual
    ours = visual.ln_post(last[:, 0]) @ visual.proj
    torch.testing.assert_close(ours, miniclip.clip.encode_image(images), atol=1e-4, rtol=1e-4)


def test_attention_times_values_is_the_block(miniclip) -> None:
    """One head on its own: rows of attention sum to one, and reproduce the block's mixing."""
    features = miniclip.encode_image(torch.randn(1, 3, 40, 56))
    assert features.grid == (5, 7)
    assert features.tokens.shape == (11, 1, 36, 128)
    assert features.attention.shape == (11, 1, 36, 36)
    torch.testing.assert_close(features.attention.sum(-1), torch.ones(11, 1, 36))
    block, tokens = miniclip.blocks[3], features.tokens[2]
    normed = block.ln_1(tokens)
    expected, weights = block.attn(normed, normed, normed, need_weights=True)
    torch.testing.assert_close(weights, features.attention[3], atol=1e-5, rtol=0)
    torch.testing.assert_close(module.attend(block.attn, normed)[0], expected, atol=1e-5, rtol=0)


def test_fewer_maps_change_nothing_else(miniclip) -> None:
    images = torch.randn(2, 3, 40, 56)
    everything = miniclip.encode_image(images)
    for maps in (3, 0):
        some = miniclip.encode_image(images, maps=maps)
        assert some.attention.shape == (maps, 2, 36, 36)
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(some.attention, everything.attention[11 - maps :], **close)
        torch.testing.assert_close(some.tokens, everything.tokens, **close)


def test_image_statistics(miniclip) -> None:
    assert miniclip.statistics == module.MINICLIP_STATISTICS
    other = load_backbone("MiniCLIP", "miniclip", "imagenet")
    assert other.statistics == module.IMAGENET_STATISTICS


def test_frozen_and_in_eval_mode(miniclip) -> None:
    miniclip.train()
    assert not any(m.training for m in miniclip.modules())
    assert not any(p.requires_grad for p in miniclip.parameters())


def test_sizes_need_not_be_multiples_of_a_patch(miniclip) -> None:
    assert miniclip.encode_image(torch.randn(1, 3, 47, 33)).grid == (5, 4)
    with pytest.raises(ValueError, match="7x33 pixels are smaller than one patch of 8"):
        miniclip.encode_image(torch.randn(1, 3, 7, 33))


def test_unknown_words_are_named(miniclip) -> None:
    with pytest.warns(UserWarning, match="'zebra'"):
        miniclip.encode_text(["boat", "zebra"], "a photo of {}.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = miniclip.encode_text(["boat", "cat"], "a photo of {}.")
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("ViT-Z", "openai", "unknown backbone 'ViT-Z'"),
        ("ViT-B-16-quickgelu", "nowhere.pt", "neither a file nor a tag"),
    ],
)
def test_unknown_names(name, weights, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(name, weights)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_weights(damage, tmp_path, monkeypatch) -> None:
    weights = sources.MINICLIP_FOLDER / "MiniCLIP.safetensors"
    (tmp_path / "card.json").write_text((sources.MINICLIP_FOLDER / "card.json").read_text())
    if damage == "truncated":
        (tmp_path / weights.name).write_bytes(weights.read_bytes()[:-1000])
    monkeypatch.setattr(sources, "MINICLIP_FOLDER", tmp_path)
    error = FileNotFoundError if damage == "missing" else ValueError
    with pytest.raises(error, match="restore it"):
        load_backbone("MiniCLIP", "miniclip")


def test_weights_from_a_local_file(tmp_path) -> None:
    clip = open_clip.create_model("MiniCLIP", load_weights=False)
    torch.save(clip.state_dict(), tmp_path / "weights.pt")
    loaded = load_backbone("MiniCLIP", tmp_path / "weights.pt")
    for ours, theirs in zip(loaded.clip.parameters(), clip.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RN50", "its image tower is a ResNet"),
        ("ViT-B-16-SigLIP", r"its image tower is timm's vit_base_patch16_siglip_224 \(SigLIP"),
        ("ViT-L-14-CLIPA", "it averages patches before its last norm"),
        ("coca_ViT-B-32", "it pools patches by attention"),
        ("nllb-clip-base", "its text tower is facebook/nllb-200-distilled-600M"),
        ("convnext_base", "its image tower is timm's convnext_base"),
    ],
)
def test_backbones_that_are_refused_and_why(name, reason) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be a backbone here: {reason}"):
        load_backbone(name, "openai")


def test_families_that_are_not_refused() -> None:
    names = ("ViT-B-16", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "MiniCLIP")
    assert [sources.refusal(name) for name in names] == [None] * len(names)
    allowed = [name for name in open_clip.list_models() if not sources.refusal(name)]
    assert len(allowed) > 30


def test_a_checkpoint_folder_of_open_clip(tmp_path) -> None:
    clip = open_clip.create_model("MiniCLIP", load_weights=False)
    with pytest.raises(FileNotFoundError, match=r"has none of open_clip_model\.safetensors"):
        load_backbone("MiniCLIP", tmp_path)
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    loaded, statistics = sources.load_pretrained("MiniCLIP", tmp_path)
    assert torch.equal(loaded.visual.proj, clip.visual.proj)
    assert statistics == (loaded.visual.image_mean, loaded.visual.image_std)
    shown = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": shown}))
    _, statistics = sources.load_pretrained("MiniCLIP", tmp_path)
    assert statistics == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_offline_without_weights_says_what_to_fetch(monkeypatch) -> None:
    def offline(*_, **__) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(FileNotFoundError) as error:
        load_backbone("ViT-B-16-quickgelu", "openai")
    said = str(error.value)
    assert "'openai' of ViT-B-16-quickgelu are not here and cannot be fetched (Network" in said
    assert "ViT-B-16.pt or open_clip_model.safetensors of https://huggingface.co/timm/" in said
    assert "give its path as `weights`" in said
