import json
import math
from copy import deepcopy
from dataclasses import asdict, replace

import open_clip
import pytest
import torch
import torch.nn.functional as F

from weclip_lib.backbone import load_backbone
from weclip_lib.storage.weights import MINICLIP_FOLDER
from weclip_lib.world.pretrain import (
    VOTE_POWER,
    Regions,
    encode_pooled,
    export,
    grow,
    learning_rate_factor,
    mean_average_precision,
    mix,
    phrase_losses,
    samples_before,
    train,
    vocabulary,
)
from weclip_lib.world.settings import MINICLIP_ROUNDS, Phase, Pretraining, World

TINY = Pretraining(
    seed=1000,
    pictures=12,
    shard=6,
    warmup=1,
    decay=2,
    patch_vote=1.0,
    spread_vote=1.0,
    phases=(
        Phase(until=2, stride=2, size=40, kept=9, batch=6),
        Phase(until=4, stride=1, size=40, kept=16, batch=3, mixed=0.7),
    ),
    checkpoint_every=2,
)
WORLD = World(size=48)


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return open_clip.create_model("MiniCLIP", load_weights=False)


def evaluate(clip, stride):
    return {"class_token_mAP": 0.0}


def test_interrupted_training_ends_the_same(clip, tmp_path) -> None:
    other = deepcopy(clip)
    one = train(clip, TINY, WORLD, tmp_path / "whole", evaluate).state_dict()

    def interrupt(clip, stride):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(other, TINY, WORLD, tmp_path / "parted", interrupt)
    again = train(other, TINY, WORLD, tmp_path / "parted", evaluate).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    log = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [2, 4]
    shards = sorted(path.name for path in (tmp_path / "whole" / "pictures").iterdir())
    assert shards == ["000000.npz", "000006.npz"]


def test_a_mixed_picture_answers_for_both_its_parts() -> None:
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 32, 32)
    told = torch.eye(4)
    kept = torch.arange(16).repeat(4, 1)
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[1:3, 2:] = True
    mixed, regions = mix(images, told, kept, inside, 2)
    assert torch.equal(mixed[:2], images[:2])
    assert mixed[3, :, 8:24, 16:].eq(2).all()  # of the picture before
    assert mixed[2, :, 8:24, 16:].eq(3).all()  # the first of them, of the last
    assert mixed[2, :, :8].eq(2).all()
    assert regions.picture.tolist() == [0, 1, 2, 3, 2, 3]
    assert regions.patches.sum(1).tolist() == [16, 16, 12, 12, 4, 4]
    assert torch.equal(regions.patches[4], inside.flatten())
    assert torch.equal(regions.told, torch.eye(4)[[0, 1, 2, 3, 3, 2]])
    assert regions.weight[4, 3] < regions.weight[4, 2] == 1


def test_votes_by_hand(clip) -> None:
    """One patch in four is sure of phrase 0, the others of phrase 1."""
    directions = F.normalize(clip.visual.proj.detach().T[:2], dim=-1)
    tokens = directions[[0, 1, 1, 1]][None]
    embedded = F.normalize(directions @ clip.visual.proj.detach(), dim=-1)
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(100))
    whole = torch.ones(1, 4, dtype=torch.bool)
    told = torch.tensor([[1.0, 1.0]])
    regions = Regions(torch.tensor([0]), whole, told, torch.ones(1, 2))
    _, votes = phrase_losses(clip, torch.zeros_like(tokens), [tokens], embedded, regions)
    expected = -(math.log(0.25) + math.log(0.75)) / VOTE_POWER
    assert votes.item() == pytest.approx(expected, abs=1e-3)
    told[0, 0] = 0
    _, votes = phrase_losses(clip, torch.zeros_like(tokens), [tokens], embedded, regions)
    expected = -math.log(1 - 0.25 ** (1 / VOTE_POWER)) - math.log(0.75) / VOTE_POWER
    assert votes.item() == pytest.approx(expected, abs=1e-3)


def test_growing_keeps_what_the_model_computes(clip) -> None:
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
    recipe = replace(MINICLIP_ROUNDS[0], warmup=10)
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
    export(clip, tmp_path, {**about, "val": val})
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert "3 samples of 12 pictures with the seeds 1000" in card
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["bytes"] == (tmp_path / "MiniCLIP.safetensors").stat().st_size < 15e6
    assert {"boat", "railway", "origami"} <= set(vocabulary()) == set(card["vocabulary"])


def test_what_ships_is_what_its_card_says() -> None:
    """The card's recipe and world are the code's; its weights load, and know its words."""
    card = json.loads((MINICLIP_FOLDER / "card.json").read_text())
    assert card["rounds"] == json.loads(json.dumps([asdict(recipe) for recipe in MINICLIP_ROUNDS]))
    assert card["world"] == json.loads(json.dumps(asdict(World())))
    assert card["samples"] == sum(samples_before(r.steps, r) for r in MINICLIP_ROUNDS)
    assert card["vocabulary"] == vocabulary()
    assert load_backbone("MiniCLIP", "miniclip").vocabulary == set(vocabulary())
