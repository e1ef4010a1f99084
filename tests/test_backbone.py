import json
import re
import subprocess
import warnings

import open_clip
import pytest
import torch

from weclip_lib import backbone as module
from weclip_lib.backbone import load_backbone, run_block
from weclip_lib.storage import weights as sources


@pytest.fixture(scope="module")
def miniclip():
    return load_backbone("MiniCLIP", "miniclip-v2")


def test_loading_says_nothing(caplog) -> None:
    load_backbone("MiniCLIP", "miniclip-v2")
    assert caplog.text == ""


def test_the_old_name_of_the_weights_is_explained() -> None:
    """A decoder from before MiniVOC 2 names them so; the other weights would give wrong masks."""
    with pytest.raises(ValueError, match="give miniclip-v1, if a decoder or run from before"):
        load_backbone("MiniCLIP", "miniclip")
    load_backbone("MiniCLIP", "miniclip-v1")


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
    query, key, value = module.project(block.attn, normed)
    heads = module.attention_heads(query, key) @ value
    ours = block.attn.out_proj(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


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
    assert miniclip.statistics == sources.MINICLIP_STATISTICS
    other = load_backbone("MiniCLIP", "miniclip-v2", "imagenet")
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


def git(root, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True)


@pytest.mark.parametrize("file", ["MiniCLIP.safetensors", "card.json"])
def test_damaged_weights_and_the_remedy(file, tmp_path, monkeypatch) -> None:
    """What the error says is done, to the letter."""
    folder = tmp_path / "data" / "miniclip-v2"
    folder.mkdir(parents=True)
    for name in ("MiniCLIP.safetensors", "card.json"):
        (folder / name).write_bytes((sources.MINICLIPS["miniclip-v2"] / name).read_bytes())
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "ship")
    monkeypatch.setitem(sources.MINICLIPS, "miniclip-v2", folder)
    content = (folder / file).read_bytes()
    for damaged in (None, b"", content[:-1000], b"[1, 2]", b"{}", bytes(len(content))):
        (folder / file).unlink()
        if damaged is not None:
            (folder / file).write_bytes(damaged)
        error = FileNotFoundError if damaged is None else ValueError
        with pytest.raises(error, match=rf"{file} .*restore it with") as said:
            load_backbone("MiniCLIP", "miniclip-v2")
        command, place = re.search(r"`(.*)` in (.*)", str(said.value)).groups()
        subprocess.run(command, shell=True, cwd=place, check=True, capture_output=True)
        assert (folder / file).read_bytes() == content
    load_backbone("MiniCLIP", "miniclip-v2")


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
    assert statistics == sources.MINICLIP_STATISTICS
    shown = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": shown}))
    _, statistics = sources.load_pretrained("MiniCLIP", tmp_path)
    assert statistics == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (b"{", "open_clip_config.json cannot be read"),
        (b"[]", "open_clip_config.json cannot be read"),
        ({"preprocess_cfg": {"mean": [0.1, 0.2], "std": [1, 1, 1]}}, "must be three numbers"),
        ({"preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}, "std None: each must be three numbers"),
        ({"preprocess_cfg": {"mean": ["a", 1, 1], "std": [1, 1, 1]}}, "must be three numbers"),
        ({"preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 0, 1]}}, "each must be more than 0"),
        (b'{"preprocess_cfg": {"mean": [0, 0, NaN], "std": [1, 1, 1]}}', "three numbers"),
        ({"model_cfg": {"embed_dim": 64}}, "trained with GELU, MiniCLIP has QuickGELU: choose the"),
    ],
)
def test_damaged_checkpoint_folders(shown, message, tmp_path) -> None:
    clip = open_clip.create_model("MiniCLIP", load_weights=False)
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    content = shown if isinstance(shown, bytes) else json.dumps(shown).encode()
    (tmp_path / "open_clip_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_backbone("MiniCLIP", tmp_path)


@pytest.mark.parametrize(
    ("name", "tag", "message"),
    [
        ("ViT-B-16", "openai", "'openai' was trained with QuickGELU, ViT-B-16 has GELU: choose "
         "ViT-B-16-quickgelu"),
        ("ViT-L-14-336", "openai", "choose ViT-L-14-336-quickgelu"),
        ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "'laion2b_s34b_b88k' was trained with GELU, "
         "ViT-B-16-quickgelu has QuickGELU: choose ViT-B-16"),
    ],
)  # fmt: skip
def test_tags_of_the_other_activation(name, tag, message, monkeypatch) -> None:
    monkeypatch.setattr(open_clip, "create_model", None)  # nothing is fetched
    with pytest.raises(ValueError, match=message + "$"):
        load_backbone(name, tag)


def test_every_model_knows_its_other() -> None:
    names = [name for name in open_clip.list_models() if name.endswith("-quickgelu")]
    assert len(names) > 8
    for name in names:
        plain = name.removesuffix("-quickgelu")
        assert (sources._other(name), sources._other(plain)) == (plain, name)
    assert sources._other("MiniCLIP") is None


def test_openai_weights_of_another_model(tmp_path, monkeypatch) -> None:
    """Told by the three numbers beside them; MiniCLIP without QuickGELU stands for ViT-B-16."""
    plain = {**open_clip.get_model_config("MiniCLIP"), "quick_gelu": False}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small", plain)
    state = open_clip.create_model("Small", load_weights=False).state_dict()
    numbers = {"input_resolution": 112, "context_length": 32, "vocab_size": 49408}
    path = tmp_path / "weights.pt"
    for wrong in ({}, *({number: 7} for number in numbers)):
        given = {n: torch.tensor(v) for n, v in {**numbers, **wrong}.items()}
        torch.save({**state, **given}, path)
        said = "weights.pt was trained with QuickGELU, Small has GELU: choose MiniCLIP"
        for number in wrong:
            said = rf"weights.pt has {number} 7, Small has {numbers[number]}: choose"
        with pytest.raises(ValueError, match=said):
            load_backbone("Small", path)
    torch.save({**state, "context_length": torch.tensor([32, 32])}, path)
    with pytest.raises(ValueError, match=r"has context_length \[32, 32\], Small has 32"):
        load_backbone("Small", path)
    torch.save({**state, "context_length": torch.tensor(32)}, path)
    load_backbone("Small", path)
    torch.save({**state, **{n: torch.tensor(v) for n, v in numbers.items()}}, path)
    load_backbone("MiniCLIP", path)


def test_statistics_go_by_their_exact_names() -> None:
    for name in ("Imagenet", "openai", ""):
        with pytest.raises(
            ValueError, match=f"statistics is {name!r}: choose one of own, imagenet"
        ):
            load_backbone("MiniCLIP", "miniclip-v2", name)


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
