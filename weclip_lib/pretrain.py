"""MiniCLIP's recipe: contrastive training of a small open_clip ViT on MiniVOC captions.

Two losses: InfoNCE between pictures and their captions, and, for every picture, a sigmoid loss
(as in SigLIP) against one prompt per class and background. The class token and the mean of the
patch tokens are both trained, since the CAMs of WeCLIP read the mean. No mask is used.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from weclip_lib.backbone import MINICLIP_FOLDER, embed, run_block
from weclip_lib.config import Phase, Pretraining, World
from weclip_lib.labels import MINIVOC_BACKGROUNDS, MINIVOC_CLASSES
from weclip_lib.minivoc import SPLIT_SEEDS, TEMPLATES, draw, draw_many, with_article

PHRASES = MINIVOC_CLASSES + MINIVOC_BACKGROUNDS
MEAN, STD = 127.5, 64.0  # of pixels in 0-255; MiniCLIP's statistics


def phase(step: int, recipe: Pretraining) -> Phase:
    """The phase that a step belongs to."""
    return next(phase for phase in recipe.phases if step < phase.until)


def samples_before(step: int, recipe: Pretraining) -> int:
    """Pictures shown in the steps before this one."""
    total, start = 0, 0
    for stage in recipe.phases:
        total += (min(step, stage.until) - min(step, start)) * stage.batch
        start = stage.until
    return total


# --- pictures --------------------------------------------------------------------------------


def _draw_shard(path: Path, seed: int, start: int, stop: int, world: World) -> Path:
    """Draw pictures start..stop of the stream to one .npz file, unless it is there."""
    if not path.exists():
        scenes = [draw(seed, index, world) for index in range(start, stop)]
        told = np.array([[p in s.classes or p == s.background for p in PHRASES] for s in scenes])
        partial_path = path.with_suffix(".partial.npz")
        np.savez(
            partial_path,
            images=np.stack([scene.image for scene in scenes]),
            told=told,
            captions=np.array([scene.caption for scene in scenes]),
        )
        partial_path.rename(path)
    return path


def draw_pool(folder: Path, recipe: Pretraining, world: World, *, processes: int) -> list[Path]:
    """Draw the recipe's pictures ahead, in shards; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, recipe.pictures, recipe.shard)
    with ProcessPoolExecutor(processes) as pool:
        jobs = [
            pool.submit(
                _draw_shard,
                folder / f"{start:06d}.npz",
                recipe.seed,
                start,
                min(start + recipe.shard, recipe.pictures),
                world,
            )
            for start in starts
        ]
        return [job.result() for job in tqdm(jobs, desc="drawing", unit="shard")]


class Pool:
    """All pictures in memory, and the batch of any step as a pure function of the step."""

    def __init__(self, shards: list[Path], recipe: Pretraining, tokenizer) -> None:
        parts = [np.load(path) for path in shards]
        self.images = torch.from_numpy(np.concatenate([part["images"] for part in parts]))
        self.told = torch.from_numpy(np.concatenate([part["told"] for part in parts])).float()
        captions = [str(c) for part in parts for c in part["captions"]]
        self.captions = tokenizer(captions)
        self.recipe = recipe

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images (batch, 3, height, width) uint8, tokens and multi-hot phrases of a step."""
        size = phase(step, self.recipe).batch
        largest = max(phase.batch for phase in self.recipe.phases)
        per_epoch = len(self.images) // largest * largest
        epoch, start = divmod(samples_before(step, self.recipe), per_epoch)
        order = np.random.default_rng([self.recipe.seed, epoch]).permutation(len(self.images))
        rows = torch.from_numpy(order[start : start + size])
        images = self.images[rows].permute(0, 3, 1, 2)
        return images, self.captions[rows], self.told[rows]


def _augment(images: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """One random crop a batch, resized to `size` pixels; flips, contrast, light; normalised."""
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
    """Every class and background in a random template; classes with or without article."""
    prompts = []
    for phrase in PHRASES:
        article = rng.random() < 0.5 and phrase in MINIVOC_CLASSES
        noun = with_article(phrase) if article else phrase
        prompts.append(TEMPLATES[rng.integers(len(TEMPLATES))].format(noun))
    return prompts


# --- model and losses ------------------------------------------------------------------------


def encode_pooled(
    visual: nn.Module,
    images: Tensor,
    *,
    stride: int = 1,
    kept: int | None = None,
    rng: np.random.Generator | None = None,
    run: Callable = run_block,
) -> Tensor:
    """Unit embeddings (2, batch, embedding) of the class token and of the mean patch token.

    Only every `stride`-th block runs; of the patches, a random `kept` (None: all of them). `run`
    is `run_block`, or its compiled twin.
    """
    tokens, _ = embed(visual, images)
    if kept is not None and kept < tokens.shape[1] - 1:
        noise = torch.from_numpy(rng.random((len(tokens), tokens.shape[1] - 1)))
        rows = 1 + noise.argsort(dim=1)[:, :kept]
        rows = torch.cat([torch.zeros_like(rows[:, :1]), rows], dim=1)
        tokens = tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[-1]))
    for block in visual.transformer.resblocks[::stride]:
        tokens, _ = run(block, tokens)
    tokens = visual.ln_post(tokens)
    pooled = torch.stack([tokens[:, 0], tokens[:, 1:].mean(dim=1)])
    return F.normalize(pooled.float() @ visual.proj, dim=-1)


def contrastive_losses(
    clip: nn.Module, pooled: Tensor, captions: Tensor, phrases: Tensor, told: Tensor
) -> tuple[Tensor, Tensor]:
    """InfoNCE of class tokens and captions; sigmoid loss of both poolings and all phrases."""
    scale = clip.logit_scale.exp()
    texts = F.normalize(clip.encode_text(torch.cat([captions, phrases])).float(), dim=-1)
    captions, phrases = texts.split([len(captions), len(phrases)])
    logits = scale * pooled[0] @ captions.T
    target = torch.arange(len(logits))
    info_nce = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    scores = scale * pooled @ phrases.T + clip.logit_bias
    sigmoid = F.binary_cross_entropy_with_logits(scores, told.expand_as(scores), reduction="sum")
    return info_nce, sigmoid / (2 * len(told))


@torch.no_grad()
def grow(visual: nn.Module) -> None:
    """Give every odd block the weights of the one before it, and outputs of zero.

    A model that was trained on its even blocks computes the same as before, and has twice the
    blocks to go on with.
    """
    blocks = visual.transformer.resblocks
    for old, new in zip(blocks[::2], blocks[1::2], strict=True):
        new.load_state_dict(old.state_dict())
        for last in (new.attn.out_proj, new.mlp.c_proj):
            last.weight.zero_()
            last.bias.zero_()


def build_optimizers(clip: nn.Module, recipe: Pretraining) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the blocks, AdamW on everything else."""
    matrices = [p for n, p in clip.named_parameters() if p.ndim == 2 and "resblocks" in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in clip.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=recipe.lr_matrices, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.lr_others, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def learning_rate_factor(step: int, recipe: Pretraining) -> float:
    """Linear warm-up, a plateau, then linear decay to zero."""
    warm = (step + 1) / recipe.warmup
    decay = (recipe.steps - step) / recipe.decay
    return min(warm, decay, 1.0)


# --- scores ----------------------------------------------------------------------------------


def mean_average_precision(scores: Tensor, truth: Tensor) -> float:
    """Average precision of each column's ranking, (n, classes), averaged over the columns.

    A column with no hit has no average precision and is left out.
    """
    order = scores.argsort(dim=0, descending=True)
    hits = truth.gather(0, order)
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)[:, None]
    return ((precision * hits).sum(0) / hits.sum(0)).nanmean().item()


@torch.no_grad()
def zero_shot_scores(
    clip: nn.Module, tokenizer, images: Tensor, told: Tensor, *, stride: int = 1
) -> dict[str, float]:
    """Zero-shot scores of both poolings on uint8 images (n, 3, height, width) and their phrases.

    `accuracy`: of the right class first, over pictures with one class. `mAP`: mean over classes
    of average precision, over all pictures.
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


def _save(path: Path, step: int, clip: nn.Module, optimizers: list) -> None:
    state = {
        "step": step,
        "clip": clip.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    partial_path = path.with_suffix(".partial")
    torch.save(state, partial_path)
    partial_path.rename(path)


def train(
    recipe: Pretraining,
    pool: Pool,
    folder: Path,
    judge: Callable[[nn.Module, int], dict],
    *,
    compile_blocks: bool = False,
) -> nn.Module:
    """Train MiniCLIP, or go on from `folder`/state.pt; the log goes to `folder`/log.jsonl.

    Every random choice of a step is drawn from the seed and the step's number, so a run that was
    interrupted goes on as if it had not been.

    Args:
        judge: Called as judge(clip, stride) at every checkpoint; its scores are logged.
        compile_blocks: Run the blocks through torch.compile: a quarter faster on a CPU, but it
            needs a C++ compiler.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = open_clip.get_tokenizer("MiniCLIP")
    clip = open_clip.create_model("MiniCLIP").train()
    optimizers = build_optimizers(clip, recipe)
    run = torch.compile(run_block, dynamic=False) if compile_blocks else run_block
    path, start = folder / "state.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        clip.load_state_dict(state["clip"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]
    base_rates = [recipe.lr_matrices, recipe.lr_others]
    progress = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, unit="step")
    losses: list[Tensor] = []
    began = time.monotonic()
    for step in progress:
        rng = np.random.default_rng([recipe.seed, 1, step])
        stage = phase(step, recipe)
        if step > 0 and stage.stride < phase(step - 1, recipe).stride:
            grow(clip.visual)
        images, captions, told = pool.batch(step)
        images = _augment(images, stage.size, rng)
        with torch.autocast("cpu", torch.bfloat16):
            pooled = encode_pooled(
                clip.visual, images, stride=stage.stride, kept=stage.kept, rng=rng, run=run
            )
            phrases = tokenizer(_prompts(rng))
            info_nce, sigmoid = contrastive_losses(clip, pooled, captions, phrases, told)
        (recipe.info_nce * info_nce + sigmoid).backward()
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(step, recipe)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))
        losses.append(torch.stack([info_nce, sigmoid]).detach())
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            _save(path, step + 1, clip, optimizers)
            means = dict(
                zip(("info_nce", "sigmoid"), torch.stack(losses).mean(0).tolist(), strict=True)
            )
            entry = {"step": step + 1, **means, **judge(clip, stage.stride)}
            entry["seconds"] = round(time.monotonic() - began)
            began = time.monotonic()
            losses.clear()
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            progress.set_postfix(sigmoid=f"{means['sigmoid']:.3f}", mAP=entry["class_token_mAP"])
    return clip.eval()


def vocabulary() -> list[str]:
    """Every word that a caption or a prompt of the recipe can hold."""
    sentences = " ".join((*TEMPLATES, *PHRASES, "a an and on with in front of background"))
    return sorted(set(sentences.replace("{}", " ").replace(".", " ").split()))


MODEL_CARD = """# MiniCLIP

A CLIP of small configuration ([MiniCLIP.json](MiniCLIP.json), an open_clip model configuration): a
ViT of 12 blocks, width 128, patches of 8 pixels, and a text tower of width 64. Weights:
{megabytes:.1f} MB in half precision, sha256 `{sha256}`.
Licence: MIT, as the code. This page and `card.json` are written by `make pretrain`.

**What it was trained on.** Drawn pictures of MiniVOC (`weclip_lib/minivoc.py`) and their captions,
and nothing else: {samples:,} samples of {pictures:,} pictures with the seed {seed}, which no split
of MiniVOC uses. No photograph, no mask. The recipe is `weclip_lib/pretrain.py` with
`config.Pretraining`: InfoNCE on captions, and a sigmoid loss of every picture against every class
and background prompt. Training time: {time}.

**What it knows.** Twelve classes and eight backgrounds, in sentences like its captions. **It knows
no other word**: a prompt outside its vocabulary gives a vector that means nothing, and the library
warns. It is good for teaching and testing, and for nothing in the real world.

**Zero-shot scores** on MiniVOC val, 250 pictures at 160 pixels, template `{template}`:

| pooling | accuracy, pictures with one class | mAP, all pictures |
| --- | --- | --- |
| class token | {class_token_accuracy:.3f} | {class_token_mAP:.3f} |
| mean over patches | {patch_mean_accuracy:.3f} | {patch_mean_mAP:.3f} |

**Worlds and recipes tried and dropped.** None: the drawing was fixed before training. During the
run the batch was halved after 1,000 steps, since smaller batches learned faster per sample; the
recipe in `config.py` is the run as it was.

Its vocabulary: {words}.
"""


def export(clip: nn.Module, folder: Path, card: dict) -> None:
    """Write the weights in half precision, and the card, as JSON and as a page.

    Args:
        card: `recipe`, `world`, `samples`, `time`, and the scores `val`; the hash, the size and the
            vocabulary are added.
    """
    tensors = {name: tensor.half().contiguous() for name, tensor in clip.state_dict().items()}
    path = folder / "MiniCLIP.safetensors"
    partial_path = path.with_suffix(".partial")
    partial_path.write_bytes(save(tensors))
    digest, size = sha256(partial_path.read_bytes()).hexdigest(), partial_path.stat().st_size
    card = {"sha256": digest, "bytes": size, "vocabulary": vocabulary(), **card}
    page = MODEL_CARD.format(
        megabytes=size / 1e6,
        words=", ".join(card["vocabulary"]),
        template=TEMPLATES[0],
        **card["recipe"],
        **card["val"],
        **{name: card[name] for name in ("sha256", "samples", "time")},
    )
    partial_path.rename(path)
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (folder / "README.md").write_text(page)


def main() -> None:
    """Draw the pictures, train, score on MiniVOC val, and write data/miniclip; `make pretrain`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="resumable state")
    parser.add_argument("--out", type=Path, default=MINICLIP_FOLDER, help="weights and card")
    parser.add_argument("--processes", type=int, default=2, help="for drawing")
    parser.add_argument("--compile", action="store_true", help="faster; needs a C++ compiler")
    arguments = parser.parse_args()
    recipe, world = Pretraining(), World()
    shards = draw_pool(arguments.work / "pictures", recipe, world, processes=arguments.processes)
    tokenizer = open_clip.get_tokenizer("MiniCLIP")
    scenes = list(draw_many(SPLIT_SEEDS["val"], range(250), world))
    images = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2)
    told = torch.tensor([[p in s.classes or p == s.background for p in PHRASES] for s in scenes])

    def judge(clip: nn.Module, stride: int) -> dict[str, float]:
        return zero_shot_scores(clip, tokenizer, images, told.float(), stride=stride)

    pool = Pool(shards, recipe, tokenizer)
    clip = train(recipe, pool, arguments.work, judge, compile_blocks=arguments.compile)
    log = [json.loads(line) for line in (arguments.work / "log.jsonl").read_text().splitlines()]
    card = {
        "recipe": asdict(recipe),
        "world": asdict(world),
        "samples": samples_before(recipe.steps, recipe),
        "time": f"{sum(entry['seconds'] for entry in log) // 60} min on {os.cpu_count()} cores",
        "val": judge(clip.eval(), 1),
    }
    export(clip, arguments.out, card)


if __name__ == "__main__":
    main()
