import json
import math
from copy import deepcopy
from dataclasses import asdict, replace

import numpy as np
import open_clip
import pytest
import torch

from weclip_lib.backbone import load_backbone
from weclip_lib.storage.weights import MINICLIPS
from weclip_lib.world.pretrain import (
    PHRASES,
    encode_pooled,
    export,
    grow,
    learning_rate_factor,
    losses_of,
    mean_average_precision,
    queries_and_keys,
    samples_before,
    step_losses,
    train,
    vocabulary,
    write_page,
)
from weclip_lib.world.settings import MINICLIP_ROUNDS, Phase, Pretraining, World

TINY = Pretraining(
    seed=1000,
    world=World(size=48),
    pictures=12,
    shard=6,
    warmup=1,
    decay=2,
    phases=(
        Phase(until=2, stride=2, size=40, kept=9, batch=6, pooling="mean"),
        Phase(until=4, stride=1, size=40, kept=16, batch=3),
    ),
    checkpoint_every=2,
)


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return open_clip.create_model("MiniCLIP", load_weights=False)


def evaluate(clip, stride):
    return {"class_token_mAP": 0.0}


def test_interrupted_training_ends_the_same(clip, tmp_path) -> None:
    other = deepcopy(clip)
    one = train(clip, TINY, tmp_path / "whole", evaluate).state_dict()

    def interrupt(clip, stride):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(other, TINY, tmp_path / "parted", interrupt)
    again = train(other, TINY, tmp_path / "parted", evaluate).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    log = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [2, 4]
    shards = sorted(path.name for path in (tmp_path / "whole" / "pictures").iterdir())
    assert shards == ["000000.npz", "000006.npz"]


def test_held_attention_stays(clip, tmp_path) -> None:
    """Queries and keys keep their weights, values and all else learn."""
    before = deepcopy(clip.visual.state_dict())
    recipe = replace(TINY, hold_attention=True)
    after = train(clip, recipe, tmp_path, lambda clip, stride: {"class_token_mAP": 0.0})
    after, width = after.visual.state_dict(), clip.visual.conv1.out_channels
    name = "transformer.resblocks.11.attn.in_proj_weight"
    assert torch.equal(after[name][: 2 * width], before[name][: 2 * width])
    assert not torch.equal(after[name][2 * width :], before[name][2 * width :])
    assert [part.shape[0] for part in queries_and_keys(clip.visual)] == [2 * width] * 24


def test_losses_by_hand(clip) -> None:
    """Two pictures, each nearest to its own caption; the first shows phrase 0 only."""
    pictures = torch.eye(2)
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(2))
        clip.logit_bias.fill_(-1)
    told = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    info_nce, phrases = losses_of(clip, pictures, pictures, pictures, told)
    assert info_nce.item() == pytest.approx(math.log(1 + math.exp(-2)))
    yes, no = (lambda x: math.log(1 + math.exp(-x))), (lambda x: math.log(1 + math.exp(x)))
    expected = (yes(2 - 1) + no(-1) + yes(-1) + yes(2 - 1)) / 2
    assert phrases.item() == pytest.approx(expected)


def test_growing_keeps_what_the_model_computes(clip) -> None:
    """And its last block, which Grad-CAM reads, is one that was trained."""
    images = torch.randn(2, 3, 40, 56)
    before = encode_pooled(clip.visual, images, stride=2)
    blocks = clip.visual.transformer.resblocks
    trained = blocks[11].mlp.c_fc.weight.clone()
    grow(clip.visual)
    torch.testing.assert_close(encode_pooled(clip.visual, images), before)
    assert torch.equal(blocks[10].mlp.c_fc.weight, trained)
    assert not blocks[10].mlp.c_proj.weight.any() and blocks[11].mlp.c_proj.weight.any()


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_one_embedding_a_picture(clip, pooling) -> None:
    """The loss asks the class token or the mean patch, and nothing asks a single patch."""
    stage = Phase(until=1, stride=2, size=40, kept=9, batch=2, pooling=pooling)
    tokenizer = open_clip.get_tokenizer("MiniCLIP")
    batch = torch.zeros(2, 3, 48, 48, dtype=torch.uint8), tokenizer(["a cat", "a dog"])
    grads: list = []

    def watch(_module, _given, tokens) -> None:
        tokens.register_hook(grads.append)

    norm = clip.visual.ln_post.register_forward_hook(watch)
    told = torch.eye(2, len(PHRASES))
    step_losses(clip, tokenizer, (*batch, told), stage, np.random.default_rng(0)).sum().backward()
    norm.remove()
    token, patches = grads[0][:, 0], grads[0][:, 1:]
    assert token.any() == (pooling == "token") and patches.any() == (pooling == "mean")
    assert torch.equal(patches, patches[:, :1].expand_as(patches))


def test_average_precision_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    truth = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert mean_average_precision(scores, truth) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    truth[:, 1] = 0  # a class that no picture has
    assert mean_average_precision(scores, truth) == pytest.approx((1 + 2 / 3) / 2)


def test_schedule() -> None:
    recipe = replace(MINICLIP_ROUNDS[-1], warmup=10)
    assert learning_rate_factor(0, recipe) == pytest.approx(0.1)
    assert learning_rate_factor(50, recipe) == 1
    assert learning_rate_factor(recipe.steps - 1, recipe) == pytest.approx(1 / recipe.decay)
    assert samples_before(3, TINY) == 2 * 6 + 3
    assert samples_before(recipe.steps, recipe) == sum(
        (phase.until - start) * phase.batch
        for start, phase in zip((0, *(p.until for p in recipe.phases)), recipe.phases, strict=False)
    )


def test_export(clip, tmp_path) -> None:
    val = {f"{p}_{s}": 0.5 for p in ("class_token", "patch_mean") for s in ("accuracy", "mAP")}
    about = {"rounds": [asdict(TINY)], "world": asdict(World()), "samples": 3, "time": "1 minute"}
    write_page(tmp_path, export(clip, tmp_path, {**about, "val": val}))
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert "3 samples of pictures with the seeds 1000, which" in card
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["bytes"] == (tmp_path / "MiniCLIP.safetensors").stat().st_size < 15e6
    assert {"boat", "railway", "origami"} <= set(vocabulary()) == set(card["vocabulary"])


def test_what_ships_is_what_its_card_says() -> None:
    """The card's recipe and world are the code's; its weights load, and know its words."""
    card = json.loads((MINICLIPS["miniclip-v2"] / "card.json").read_text())
    assert card["rounds"] == json.loads(json.dumps([asdict(recipe) for recipe in MINICLIP_ROUNDS]))
    assert card["world"] == json.loads(json.dumps(asdict(World())))
    assert card["samples"] == sum(samples_before(r.steps, r) for r in MINICLIP_ROUNDS)
    assert card["vocabulary"] == vocabulary()
    assert load_backbone("MiniCLIP", "miniclip-v2").vocabulary == set(vocabulary())


def test_the_first_weights_still_load() -> None:
    card = json.loads((MINICLIPS["miniclip-v1"] / "card.json").read_text())
    assert load_backbone("MiniCLIP", "miniclip-v1").vocabulary == set(card["vocabulary"])
