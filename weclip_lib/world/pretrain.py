"""MiniCLIP's recipe: contrastive training of a small open_clip ViT on MiniVOC captions.

As CLIP, it learns from pictures and texts alone, with one embedding a picture. InfoNCE between
pictures and captions is not enough for such a small model. So every picture is also compared with
one prompt per class and background, by a sigmoid loss (as in SigLIP). No patch is asked for
anything, and no mask is used.
"""

import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from weclip_lib.backbone import embed, run_block
from weclip_lib.commands import Pretrain
from weclip_lib.labels import MINIVOC_BACKGROUNDS, MINIVOC_CLASSES
from weclip_lib.storage.files import whole, write_text
from weclip_lib.storage.weights import MINICLIP_STATISTICS, MINICLIPS, register_miniclip
from weclip_lib.world.minivoc import SPLIT_SEEDS, draw, draw_many
from weclip_lib.world.scene import TEMPLATES, with_article
from weclip_lib.world.settings import MINICLIP_ROUNDS, Phase, Pretraining, World

SHIPPED_ROUNDS = (2, 3)  # weights of less training, beside those of the last round
PHRASES = MINIVOC_CLASSES + MINIVOC_BACKGROUNDS
MEAN, STD = (255 * values[0] for values in MINICLIP_STATISTICS)  # of pixels in 0-255


def phase(step: int, recipe: Pretraining) -> Phase:
    """Return the phase of a step."""
    return next(phase for phase in recipe.phases if step < phase.until)


def samples_before(step: int, recipe: Pretraining) -> int:
    """Count the pictures shown in the steps before this one."""
    total, start = 0, 0
    for stage in recipe.phases:
        total += (min(step, stage.until) - min(step, start)) * stage.batch
        start = stage.until
    return total


# --- pictures --------------------------------------------------------------------------------


def _draw_shard(path: Path, seed: int, start: int, stop: int, world: World) -> Path:
    """Draw pictures start to stop - 1 of a seed into one .npz file, unless the file exists."""
    if not path.exists():
        scenes = [draw(seed, index, world) for index in range(start, stop)]
        told = np.array([[p in s.classes or p == s.background for p in PHRASES] for s in scenes])
        with whole(path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                images=np.stack([scene.image for scene in scenes]),
                told=told,
                captions=np.array([scene.caption for scene in scenes]),
            )
    return path


def draw_pool(folder: Path, recipe: Pretraining, *, processes: int) -> list[Path]:
    """Draw the recipe's pictures before the training, in shards; existing shards are kept."""
    starts = range(0, recipe.pictures, recipe.shard)
    with ProcessPoolExecutor(processes) as pool:
        jobs = [
            pool.submit(
                _draw_shard,
                folder / f"{start:06d}.npz",
                recipe.seed,
                start,
                min(start + recipe.shard, recipe.pictures),
                recipe.world,
            )
            for start in starts
        ]
        return [job.result() for job in tqdm(jobs, desc="drawing", unit="shard")]


class Pool:
    """All pictures, in memory. The batch of a step depends only on the step."""

    def __init__(self, shards: list[Path], recipe: Pretraining, tokenizer) -> None:
        parts = [np.load(path) for path in shards]
        self.images = torch.from_numpy(np.concatenate([part["images"] for part in parts]))
        self.told = torch.from_numpy(np.concatenate([part["told"] for part in parts])).float()
        captions = [str(c) for part in parts for c in part["captions"]]
        self.captions = tokenizer(captions)
        self.recipe = recipe

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return uint8 images (batch, 3, height, width), tokens and multi-hot phrases of a step."""
        size = phase(step, self.recipe).batch
        largest = max(phase.batch for phase in self.recipe.phases)
        per_epoch = len(self.images) // largest * largest
        epoch, start = divmod(samples_before(step, self.recipe), per_epoch)
        order = np.random.default_rng([self.recipe.seed, epoch]).permutation(len(self.images))
        rows = torch.from_numpy(order[start : start + size])
        images = self.images[rows].permute(0, 3, 1, 2)
        return images, self.captions[rows], self.told[rows]


def _augment(images: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """Crop a batch at random, resize it to `size`, flip, normalise, change contrast and light."""
    side = images.shape[-1]
    window = int(rng.integers(int(0.85 * side), side + 1))
    top, left = rng.integers(0, side - window + 1, 2)
    images = images[..., top : top + window, left : left + window].float()
    if window != size:
        antialias = window > size
        images = F.interpolate(
            images, (size, size), mode="bilinear", align_corners=False, antialias=antialias
        )
    flip = torch.from_numpy(rng.random(len(images)) < 0.5)
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    gain = torch.from_numpy(rng.uniform(0.8, 1.2, (len(images), 1, 1, 1))).float()
    shift = torch.from_numpy(rng.uniform(-0.2, 0.2, (len(images), 1, 1, 1))).float()
    return (images - MEAN) / STD * gain + shift


def _prompts(rng: np.random.Generator) -> list[str]:
    """Write every class and background in a random template; classes may have an article."""
    prompts = []
    for phrase in PHRASES:
        article = rng.random() < 0.5 and phrase in MINIVOC_CLASSES
        noun = with_article(phrase) if article else phrase
        prompts.append(TEMPLATES[rng.integers(len(TEMPLATES))].format(noun))
    return prompts


# --- model and losses ------------------------------------------------------------------------


def _run(block: nn.Module, tokens: Tensor) -> Tensor:
    """Run a block. In bfloat16 on a CPU this takes half as long as with fused attention."""
    return run_block(block, tokens)[0]


def encode_tokens(
    visual: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    *,
    stride: int = 1,
    kept: Integer[Tensor, "batch kept"] | None = None,
    run: Callable = _run,
) -> Float[Tensor, "batch token channel"]:
    """Return the tokens before the projection: the class token, and the patches.

    Only every `stride`-th block runs, the last one among them.

    Args:
        kept: The patches that go through the blocks; None: all.
        run: `_run`, or its compiled version.
    """
    tokens, _ = embed(visual, images)
    if kept is not None:
        rows = F.pad(kept + 1, (1, 0))
        tokens = tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[-1]))
    for block in visual.transformer.resblocks[stride - 1 :: stride]:
        tokens = run(block, tokens)
    return visual.ln_post(tokens)


def encode_pooled(visual: nn.Module, images: Tensor, *, stride: int = 1) -> Tensor:
    """Return unit embeddings (2, batch, embedding) of the class token and the mean patch token."""
    tokens = encode_tokens(visual, images, stride=stride)
    pooled = torch.stack([tokens[:, 0], tokens[:, 1:].mean(dim=1)])
    return F.normalize(pooled.float() @ visual.proj, dim=-1)


def losses_of(
    clip: nn.Module,
    pictures: Float[Tensor, "picture embedding"],
    captions: Float[Tensor, "picture embedding"],
    phrases: Float[Tensor, "phrase embedding"],
    told: Float[Tensor, "picture phrase"],
) -> tuple[Tensor, Tensor]:
    """Compute InfoNCE of pictures and captions, and the sigmoid loss of pictures and phrases.

    Args:
        pictures: Of unit length, as all embeddings here.
        told: 1: the phrase is true of the picture.
    """
    scale = clip.logit_scale.exp()
    logits = scale * pictures @ captions.T
    target = torch.arange(len(logits))
    info_nce = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    scores = scale * pictures @ phrases.T + clip.logit_bias
    sigmoid = F.binary_cross_entropy_with_logits(scores, told, reduction="sum")
    return info_nce, sigmoid / len(told)


@torch.no_grad()
def grow(visual: nn.Module) -> None:
    """Put before every odd block, which is trained, a copy with outputs of zero.

    A model trained on its odd blocks still computes the same. Its training can go on with twice as
    many blocks.
    """
    blocks = visual.transformer.resblocks
    for new, trained in zip(blocks[::2], blocks[1::2], strict=True):
        new.load_state_dict(trained.state_dict())
        for last in (new.attn.out_proj, new.mlp.c_proj):
            last.weight.zero_()
            last.bias.zero_()


def queries_and_keys(visual: nn.Module) -> list[Tensor]:
    """Return the parts of the blocks' parameters that attention is computed with, not copied."""
    return [
        tensor[: 2 * visual.conv1.out_channels]
        for name, tensor in visual.state_dict().items()
        if "attn.in_proj" in name
    ]


def build_optimizers(clip: nn.Module, recipe: Pretraining) -> list[torch.optim.Optimizer]:
    """Build Muon for the matrices of the blocks, and AdamW for everything else."""
    matrices = [p for n, p in clip.named_parameters() if p.ndim == 2 and "resblocks" in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in clip.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=recipe.lr_matrices, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.lr_others, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def learning_rate_factor(step: int, recipe: Pretraining) -> float:
    """Return the factor of a step: linear warm-up, then constant, then linear decay to zero."""
    warm = (step + 1) / recipe.warmup
    decay = (recipe.steps - step) / recipe.decay
    return min(warm, decay, 1.0)


# --- scores ----------------------------------------------------------------------------------


def mean_average_precision(scores: Tensor, truth: Tensor) -> float:
    """Average the average precision of each column's ranking, (n, classes), over the columns.

    A column without a hit has no average precision and is left out.
    """
    order = scores.argsort(dim=0, descending=True)
    hits = truth.gather(0, order)
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)[:, None]
    return ((precision * hits).sum(0) / hits.sum(0)).nanmean().item()


@torch.no_grad()
def zero_shot_scores(
    clip: nn.Module, tokenizer, images: Tensor, told: Tensor, *, stride: int = 1
) -> dict[str, float]:
    """Score both poolings zero-shot on uint8 images (n, 3, height, width) and their phrases.

    `accuracy` is the share of one-class pictures whose class comes first. `mAP` is the mean of the
    classes' average precision over all pictures.
    """
    clip.eval()
    names = tokenizer([TEMPLATES[0].format(name) for name in MINIVOC_CLASSES])
    texts = F.normalize(clip.encode_text(names), dim=-1)
    batches = images.split(64)
    pooled = [encode_pooled(clip.visual, (b.float() - MEAN) / STD, stride=stride) for b in batches]
    scores = torch.cat(pooled, dim=1) @ texts.T
    truth = told[:, : len(MINIVOC_CLASSES)]
    single = truth.sum(1) == 1
    result = {}
    for name, table in zip(("class_token", "patch_mean"), scores, strict=True):
        right = truth[single].gather(1, table[single].argmax(1, keepdim=True))
        result[f"{name}_accuracy"] = right.mean().item()
        result[f"{name}_mAP"] = mean_average_precision(table, truth)
    clip.train()
    return result


# --- the loop --------------------------------------------------------------------------------


LOSSES = ("info_nce", "phrases")  # in this order everywhere; weights: fields of `Pretraining`


def step_losses(
    clip: nn.Module,
    tokenizer,
    batch: tuple[Tensor, Tensor, Tensor],
    stage: Phase,
    rng: np.random.Generator,
    run: Callable = _run,
) -> Float[Tensor, " loss"]:
    """Compute a `Pool` batch's losses in the order of `LOSSES`, with all randomness from `rng`."""
    images, captions, told = batch
    images = _augment(images, stage.size, rng)
    side = stage.size // clip.visual.patch_size[0]
    kept = torch.from_numpy(rng.random((len(images), side**2))).argsort(dim=1)[:, : stage.kept]
    prompts = torch.cat([captions, tokenizer(_prompts(rng))])
    with torch.autocast("cpu", torch.bfloat16):
        tokens = encode_tokens(clip.visual, images, stride=stage.stride, kept=kept, run=run)
        texts = clip.encode_text(prompts)
    pooled = tokens[:, 0] if stage.pooling == "token" else tokens[:, 1:].mean(dim=1)
    pictures = F.normalize(pooled.float() @ clip.visual.proj, dim=-1)
    captions, phrases = F.normalize(texts.float(), dim=-1).split([len(images), len(PHRASES)])
    return torch.stack(losses_of(clip, pictures, captions, phrases, told))


def _save(path: Path, step: int, clip: nn.Module, optimizers: list) -> None:
    state = {
        "step": step,
        "clip": clip.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    with whole(path) as partial:
        torch.save(state, partial)


def train(
    clip: nn.Module,
    recipe: Pretraining,
    folder: Path,
    evaluate: Callable[[nn.Module, int], dict],
    *,
    processes: int = 1,
    compile_blocks: bool = False,
) -> nn.Module:
    """Train `clip` in place for a round, or go on from `folder`/state.pt; log to log.jsonl there.

    Every random choice depends only on the seed and the step's number. So an interrupted run
    continues as if without interruption.

    Args:
        evaluate: Called as evaluate(clip, stride) at every checkpoint; its scores are logged.
        processes: For drawing the pictures.
        compile_blocks: Run the blocks through torch.compile: a quarter faster on a CPU, but it
            needs a C++ compiler.
    """
    optimizers = build_optimizers(clip, recipe)
    path, start = folder / "state.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        clip.load_state_dict(state["clip"])
        start = state["step"]
        if start == recipe.steps:
            return clip.eval()
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    shards = draw_pool(folder / "pictures", recipe, processes=processes)
    tokenizer = open_clip.get_tokenizer("MiniCLIP")
    pool = Pool(shards, recipe, tokenizer)
    run = torch.compile(_run, dynamic=False) if compile_blocks else _run
    base_rates = [recipe.lr_matrices, recipe.lr_others]
    weights = torch.tensor([getattr(recipe, name) for name in LOSSES])
    held = queries_and_keys(clip.visual) if recipe.hold_attention else []
    before = [part.clone() for part in held]
    progress = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, unit="step")
    history: list[Tensor] = []
    began = time.monotonic()
    clip.train()
    for step in progress:
        stage = phase(step, recipe)
        if step > 0 and stage.stride < phase(step - 1, recipe).stride:
            grow(clip.visual)
        rng = np.random.default_rng([recipe.seed, 1, step])
        losses = step_losses(clip, tokenizer, pool.batch(step), stage, rng, run)
        (weights @ losses).backward()
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(step, recipe)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))
            for part, value in zip(held, before, strict=True):
                part.copy_(value)
        history.append(losses.detach())
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            _save(path, step + 1, clip, optimizers)
            means = dict(zip(LOSSES, torch.stack(history).mean(0).tolist(), strict=True))
            entry = {"step": step + 1, **means, **evaluate(clip, stage.stride)}
            entry["seconds"] = round(time.monotonic() - began)
            began = time.monotonic()
            history.clear()
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            progress.set_postfix(phrases=f"{means['phrases']:.3f}", mAP=entry["class_token_mAP"])
    return clip.eval()


def vocabulary() -> list[str]:
    """List every word that a caption or a prompt of the recipe can have."""
    sentences = " ".join((*TEMPLATES, *PHRASES, "a an and on with in front of background"))
    return sorted(set(sentences.replace("{}", " ").replace(".", " ").split()))


MODEL_CARD = """# MiniCLIP for MiniVOC

A CLIP of small configuration ([MiniCLIP.json](MiniCLIP.json), an open_clip model configuration): a
ViT of 12 blocks, width 128, patches of 8 pixels, and a text tower of width 64. Weights:
{megabytes:.1f} MB in half precision, sha256 `{sha256}`.
Licence: MIT, as the code. This page and `card.json` are written by `make pretrain`.

**What it was trained on.** Drawn pictures of MiniVOC and their captions, and nothing else:
{samples:,} samples of pictures with the seeds {seeds}, which no split uses. It saw no photograph
and no mask. Training time: {time}.

**How.** As CLIP is: every picture has one embedding, and every text has one. InfoNCE compares
pictures with captions; a sigmoid loss compares every picture with a prompt of every class and
background (as in SigLIP). Nothing asks a patch for anything. The first rounds show large single
objects in plain view, and take the mean patch as the embedding; from the second round on it is the
class token. Every second block learns first. In the last round the others join, with outputs of
zero, each before a trained one. The recipe is `weclip_lib/world/settings.py` (`MINICLIP_ROUNDS`)
with `pretrain.py` beside it.

**What it knows.** Twenty classes and eight backgrounds, in sentences like its captions. **It knows
no other word**: a prompt outside its vocabulary gives a vector that means nothing, and the library
warns. Words outside the vocabulary have embeddings of zero in the file. It is good for teaching and
testing, and for nothing in the real world.

**Zero-shot scores** on MiniVOC val, 250 pictures at 160 pixels, template `{template}`:

| pooling | accuracy, pictures with one class | mAP, all pictures |
| --- | --- | --- |
| class token | {class_token_accuracy:.3f} | {class_token_mAP:.3f} |
| mean over patches | {patch_mean_accuracy:.3f} | {patch_mean_mAP:.3f} |

**Earlier rounds** ship beside it, for the study of worse teachers in notebook 11:
`miniclip-v2-round-2` and `miniclip-v2-round-3`, each with a `card.json`. `miniclip-v1` belongs to
MiniVOC 1.

[What was tried](TRIED.md) before world and weights were frozen, and why they are as they are.

Its vocabulary: {words}.
"""


def export(clip: nn.Module, folder: Path, card: dict) -> dict:
    """Write the weights in half precision, and the card as JSON; return the card.

    Embeddings of tokens that no caption has become zero: they were never trained.

    Args:
        card: `rounds`, `world`, `samples`, `time`, and the scores `val`. The function adds hash,
            size and vocabulary.
    """
    tensors = {name: tensor.half().contiguous() for name, tensor in clip.state_dict().items()}
    known = open_clip.get_tokenizer("MiniCLIP")(vocabulary()).unique()
    table = tensors["token_embedding.weight"]
    tensors["token_embedding.weight"] = torch.zeros_like(table).index_copy(0, known, table[known])
    content = save(tensors)
    digest, size = sha256(content).hexdigest(), len(content)
    card = {"sha256": digest, "bytes": size, "vocabulary": vocabulary(), **card}
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "MiniCLIP.safetensors") as partial:
        partial.write_bytes(content)
    write_text(folder / "card.json", json.dumps(card, indent=1) + "\n")
    return card


def write_page(folder: Path, card: dict) -> None:
    """Write the card of the finished weights as a page."""
    page = MODEL_CARD.format(
        megabytes=card["bytes"] / 1e6,
        words=", ".join(card["vocabulary"]),
        template=TEMPLATES[0],
        seeds=" and ".join(sorted({str(recipe["seed"]) for recipe in card["rounds"]})),
        **card["val"],
        **{name: card[name] for name in ("sha256", "samples", "time")},
    )
    write_text(folder / "README.md", page)


def run(arguments: Pretrain) -> None:
    """Run `weclip pretrain`."""
    register_miniclip()
    tokenizer = open_clip.get_tokenizer("MiniCLIP")
    scenes = list(draw_many(SPLIT_SEEDS["val"], range(250)))
    images = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2)
    told = torch.tensor([[p in s.classes or p == s.background for p in PHRASES] for s in scenes])

    def evaluate(clip: nn.Module, stride: int) -> dict[str, float]:
        return zero_shot_scores(clip, tokenizer, images, told.float(), stride=stride)

    torch.manual_seed(MINICLIP_ROUNDS[0].seed)
    clip = open_clip.create_model("MiniCLIP", load_weights=False)
    out = arguments.out or MINICLIPS["miniclip-v2"]
    log, stride = [], MINICLIP_ROUNDS[0].phases[0].stride
    for number, recipe in enumerate(MINICLIP_ROUNDS, start=1):
        if recipe.phases[0].stride < stride:
            grow(clip.visual)
        stride = recipe.phases[-1].stride
        folder = arguments.work / f"round-{number}"
        how = {"processes": arguments.processes, "compile_blocks": arguments.compile}
        clip = train(clip, recipe, folder, evaluate, **how)
        log += [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        last = number == len(MINICLIP_ROUNDS)
        if not last and number not in SHIPPED_ROUNDS:
            continue
        whole_clip = deepcopy(clip)
        if stride > 1:
            grow(whole_clip.visual)
        done = MINICLIP_ROUNDS[:number]
        card = {
            "rounds": [asdict(recipe) for recipe in done],
            "world": asdict(World()),
            "samples": sum(samples_before(recipe.steps, recipe) for recipe in done),
            "time": f"{sum(entry['seconds'] for entry in log) // 60} min on {os.cpu_count()} cores",
            "val": evaluate(whole_clip, 1),
        }
        place = out if last else out.with_name(f"{out.name}-round-{number}")
        card = export(whole_clip, place, card)
    write_page(out, card)
