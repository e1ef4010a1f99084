import json
import math
from dataclasses import asdict, replace

import open_clip
import pytest
import torch

from weclip_lib.backbone import MINICLIP_FOLDER, load_backbone
from weclip_lib.config import Phase, Pretraining, World
from weclip_lib.pretrain import (
    Pool,
    draw_pool,
    encode_pooled,
    export,
    grow,
    learning_rate_factor,
    mean_average_precision,
    samples_before,
    train,
    vocabulary,
)

TINY = Pretraining(
    pictures=12,
    shard=6,
    warmup=1,
    decay=2,
    phases=(
        Phase(until=2, stride=2, size=40, kept=9, batch=6),
        Phase(until=4, stride=1, size=40, kept=16, batch=3),
    ),
    checkpoint_every=2,
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    shards = draw_pool(folder, TINY, World(size=48), processes=1)
    assert [path.name for path in shards] == ["000000.npz", "000006.npz"]
    return Pool(shards, TINY, open_clip.get_tokenizer("MiniCLIP"))


def judge(clip, stride):
    return {"class_token_mAP": 0.0}


def test_interrupted_training_ends_the_same(pool, tmp_path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    whole.mkdir()
    parted.mkdir()
    torch.manual_seed(0)
    one = train(TINY, pool, whole, judge).state_dict()

    def interrupt(clip, stride):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TINY, pool, parted, interrupt)
    other = train(TINY, pool, parted, judge).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    entries = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4]


def test_growing_keeps_what_the_model_computes() -> None:
    clip = open_clip.create_model("MiniCLIP", load_weights=False)
    images = torch.randn(2, 3, 40, 56)
    before = encode_pooled(clip.visual, images, stride=2)
    grow(clip.visual)
    torch.testing.assert_close(encode_pooled(clip.visual, images), before)


def test_average_precision_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    truth = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert mean_average_precision(scores, truth) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    truth[:, 1] = 0  # a class that no picture has
    assert mean_average_precision(scores, truth) == pytest.approx((1 + 2 / 3) / 2)


def test_schedule() -> None:
    recipe = replace(Pretraining(), warmup=10)
    assert learning_rate_factor(0, recipe) == pytest.approx(0.1)
    assert learning_rate_factor(50, recipe) == 1
    assert learning_rate_factor(recipe.steps - 1, recipe) == pytest.approx(1 / recipe.decay)
    assert samples_before(3, TINY) == 2 * 6 + 3
    assert samples_before(recipe.steps, recipe) == sum(
        (phase.until - start) * phase.batch
        for start, phase in zip((0, *(p.until for p in recipe.phases)), recipe.phases, strict=False)
    )


def test_export(tmp_path) -> None:
    clip = open_clip.create_model("MiniCLIP", load_weights=False)
    val = {f"{p}_{s}": 0.5 for p in ("class_token", "patch_mean") for s in ("accuracy", "mAP")}
    about = {"recipe": asdict(TINY), "world": asdict(World()), "samples": 3, "time": "1 minute"}
    export(clip, tmp_path, {**about, "val": val})
    assert "3 samples of 12 pictures with the seed 1000" in (tmp_path / "README.md").read_text()
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["bytes"] == (tmp_path / "MiniCLIP.safetensors").stat().st_size < 15e6
    assert {"boat", "railway", "origami"} <= set(vocabulary()) == set(card["vocabulary"])


def test_what_ships_is_what_its_card_says() -> None:
    """The card's recipe and world are the code's, and its scores those of the weights."""
    card = json.loads((MINICLIP_FOLDER / "card.json").read_text())
    assert card["samples"] == samples_before(Pretraining().steps, Pretraining())
    assert math.isclose(card["world"]["co_occurrence"], World().co_occurrence)
    assert card["recipe"]["phases"][-1]["until"] == Pretraining().steps
    assert card["vocabulary"] == vocabulary()
    assert load_backbone("MiniCLIP", "miniclip").vocabulary == set(vocabulary())
