"""The training loop: owns the step number, the schedule, and when the RFM starts."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from weclip_lib.config import Budget
from weclip_lib.data.datasets import batches
from weclip_lib.model import Frozen, WeCLIP
from weclip_lib.storage.files import write_text
from weclip_lib.training.checkpoints import load_state, newest, save_state
from weclip_lib.training.distributed import Group
from weclip_lib.training.features import FrozenDataset, backbone_key
from weclip_lib.training.sources import Batch, Source

WARMUP_RATIO = 1e-6  # of the learning rate, at step 0; official PolyWarmupAdamW
WATCHED_TIMES = 10  # that the pseudo labels of watched pictures are kept in a run
LOG_EVERY = 20  # steps a point of the curve
NOTHING = torch.empty(0, 0, 0, 0, dtype=torch.uint8)  # watched


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    model: WeCLIP
    history: list[dict[str, float]]  # every 20 steps: step, and the mean losses since the last
    cpu_seconds: float  # user and system time of the training, measured when it was done
    watched: UInt8[Tensor, "time row height width"]  # labels the RFM made of the watched rows
    watched_at: list[int]  # after so many steps


def learning_rate(step: int, budget: Budget) -> float:
    """Linear warm-up, then linear decay that counts from step 0.

    Source: official utils/optimizer.py PolyWarmupAdamW; REFERENCE 37.
    """
    if step < budget.warmup:
        part = 1 - (1 - step / budget.warmup) * (1 - WARMUP_RATIO)
    else:
        part = 1 - step / budget.steps
    return budget.learning_rate * part


def build_optimizer(model: WeCLIP, budget: Budget) -> torch.optim.AdamW:
    """One group, all of the decoder's parameters, biases and norms included."""
    return torch.optim.AdamW(
        model.decoder.parameters(),
        lr=budget.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=budget.weight_decay,
        fused=True,
    )


def rfm_label(
    model: WeCLIP, features: FrozenDataset, rows: Sequence[int], *, batch: int = 8
) -> UInt8[Tensor, "row height width"]:
    """The pseudo labels that the RFM makes of some rows, with the decoder as it is now."""
    training, found = model.training, []
    model.eval()
    for part in batches(rows, batch):
        frozen = features.frozen(part)
        with torch.no_grad():
            _, affinity = model.decoder(frozen.tokens, tuple(frozen.cam.shape[-2:]))
        refined = model.refine_cam(frozen, affinity)
        label = model.pseudo_label(refined, features.pixels(part), features.labels[part])
        found.append(label.to(torch.uint8))
    model.train(training)
    return torch.cat(found)


@dataclass(frozen=True)
class Long:
    """What a run of hours or days needs besides; the defaults are those of a short one."""

    folder: Path | None = None  # of checkpoints; None: none are kept, and nothing is resumed
    checkpoint_every: int = 1000  # steps
    validate: Callable[[WeCLIP], float] | None = None  # mIoU in percent; the only one to see masks
    validate_every: int = 0  # steps; 0: never
    accumulate: int = 1  # parts that a process takes its share of a batch in
    bf16: bool = False  # autocast
    group: Group = field(default_factory=Group)
    note: Callable[[list[dict[str, float]]], None] | None = None  # is told the curve as it grows


def _settings(model: WeCLIP, source: Source, budget: Budget, seed: int) -> dict:
    """What a resumed run has to have in common with the one that was stopped."""
    return {
        **{f"method.{name}": value for name, value in asdict(model.method).items()},
        **{f"budget.{name}": value for name, value in asdict(budget).items()},
        "seed": seed,
        "class prompts (classes.csv)": list(model.labels.class_prompts),
        "background prompts (backgrounds.txt)": list(model.labels.backgrounds),
        "backbone": backbone_key(model),
        **source.about,
    }


def _made_label(model: WeCLIP, batch: Batch, frozen: Frozen, affinity: Tensor | None) -> Tensor:
    """By the RFM with the decoder's affinity, by CLIP's attention without."""
    refined = model.refine_cam(frozen, affinity)
    return model.pseudo_label(refined, batch.pixels(), batch.image_labels, padded=batch.padded)


def _loss_of_step(
    model: WeCLIP, parts: Sequence[Batch], use_rfm: bool, long: Long
) -> Float[Tensor, "3"]:
    """(total, segmentation, affinity) loss of this process's share of a batch, with a graph.

    Pixels and pairs are counted over all parts and processes before anything is divided, so that
    the sum over them is the loss of the whole batch.
    """
    outputs = []
    for batch in parts:
        with torch.autocast(long.group.device.partition(":")[0], torch.bfloat16, enabled=long.bf16):
            frozen = batch.frozen() if use_rfm or batch.label is None else None
            tokens = frozen.tokens if frozen else batch.tokens()
            logits, affinity = model.decoder(tokens, batch.grid)
        label = batch.label
        if frozen is not None:
            label = _made_label(model, batch, frozen, affinity if use_rfm else None)
        outputs.append((logits, affinity, label))
    totals = None
    if len(parts) * long.group.count > 1:
        counted = [
            model.loss_counts(label, tuple(logits.shape[-2:])) for logits, _, label in outputs
        ]
        totals = long.group.sum(torch.stack(counted).sum(0))
    found = []
    for output in outputs:
        segmentation, pairwise = model.losses(*output, totals)
        total = segmentation + model.method.affinity_weight * pairwise
        found.append(torch.stack([total, segmentation, pairwise]))
    return torch.stack(found).sum(0) if len(found) > 1 else found[0]


def _refuse_batch(
    source: Source, budget: Budget, seed: int, step: int, losses: Tensor, long: Long
) -> None:
    """Stop at a loss that is not finite, and name the pictures of its batch."""
    names = source.names(source.drawn(seed, step, budget.batch))
    about = {"iteration": step + 1, "losses": losses.tolist(), "pictures": names}
    if long.folder and long.group.is_first:
        write_text(long.folder / "failed_batch.json", json.dumps(about, indent=1))
    raise FloatingPointError(
        f"the loss is {losses.tolist()} at step {step + 1}, with {', '.join(names)}: "
        "lower the learning rate, or look at these pictures"
    )


def train_decoder(
    model: WeCLIP,
    source: Source,
    budget: Budget,
    *,
    seed: int,
    watch: Callable[[WeCLIP, int], UInt8[Tensor, "row height width"]] | None = None,
    progress: str = "training",
    long: Long = Long(),
) -> Trained:
    """Train the decoder in place, on given or static labels until the RFM starts, then on its own.

    The RFM starts at `method.rfm_start` of the steps; at 1 it never does. Its labels are made anew
    at every step with the decoder's affinity of that step.

    Args:
        source: Pictures, and labels where they are given.
        budget: `batch` counts pictures of all processes and accumulated parts together.
        seed: Of the order of the pictures and of dropout; the decoder is as it is passed.
        watch: Makes pseudo labels, of the model and the step, that are kept ten times on the way.
            Training does not depend on them, and sees no score: somebody else holds them against
            masks.
        progress: Name of the bar.
        long: Checkpoints, validation, precision, processes. A run goes on from its newest
            checkpoint, and ends with the weights that it would have had without a stop.

    Raises:
        ValueError: If there are fewer pictures than a batch has, a batch cannot be cut in equal
            parts, or a checkpoint does not fit.
        FloatingPointError: If the loss is not finite.
    """
    if len(source) < budget.batch:
        raise ValueError(
            f"{len(source)} pictures, mirrored ones included, do not fill a batch of "
            f"{budget.batch}: train on more, or take a smaller batch"
        )
    group, shares = long.group, long.accumulate * long.group.count
    if budget.batch % shares:
        raise ValueError(
            f"a batch of {budget.batch} cannot be cut in {shares} equal parts "
            f"({group.count} process(es), {long.accumulate} accumulated): choose another size"
        )
    torch.manual_seed(seed + group.rank)
    began = time.process_time()
    times = range(1, 1 + WATCHED_TIMES) if watch else ()
    watched_at = sorted({math.ceil(budget.steps * n / WATCHED_TIMES) for n in times})
    kept = []
    optimizer = build_optimizer(model, budget)
    rfm_from = round(model.method.rfm_start * budget.steps)
    history, losses, first = [], [], 0
    settings = _settings(model, source, budget, seed) if long.folder else {}
    if long.folder and (found := newest(long.folder, group)):
        about = load_state(found, model.decoder, optimizer, settings, group)
        history, first = about["history"], about["step"]
        losses = [torch.tensor(one, device=group.device) for one in about["losses"]]
    group.share_weights(model.decoder)
    model.train()
    mine = range(group.rank * long.accumulate, (group.rank + 1) * long.accumulate)
    steps = range(first, budget.steps)

    def refuse_broken() -> None:
        """Looked at rarely, since a device has to be waited for; never after the state is kept."""
        window = torch.stack(losses) if losses else torch.zeros(1, 3)
        for at in (~window.isfinite().all(dim=1)).nonzero()[:1, 0].tolist():
            _refuse_batch(source, budget, seed, done - len(losses) + at, window[at], long)

    batches = source.batches(model, seed, steps, budget.batch, mine, shares)
    for step in tqdm(
        steps, desc=progress, unit="step", initial=first, total=budget.steps,
        disable=not group.is_first,
    ):  # fmt: skip
        parts = [next(batches) for _ in mine]
        found = _loss_of_step(model, parts, step >= rfm_from, long)
        for settled in optimizer.param_groups:
            settled["lr"] = learning_rate(step, budget)
        optimizer.zero_grad()
        found[0].backward()
        group.sum_gradients(model.decoder.parameters())
        optimizer.step()
        losses.append(group.sum(found.detach().clone()))
        done = step + 1
        if done % LOG_EVERY == 0 or done == budget.steps:
            refuse_broken()
            names = ("loss", "segmentation_loss", "affinity_loss")
            means = dict(zip(names, torch.stack(losses).mean(0).tolist(), strict=True))
            history.append({"iteration": done, **means})
            losses.clear()
            if long.note:
                long.note(history)
        if long.validate and long.validate_every and done % long.validate_every == 0:
            history.append({"iteration": done, "miou": _validated(model, long)})
            if long.note:
                long.note(history)
        if long.folder and (done % long.checkpoint_every == 0 or done == budget.steps):
            refuse_broken()
            pending = [one.tolist() for one in losses]
            about = {"settings": settings, "history": history, "losses": pending}
            save_state(long.folder, done, model.decoder, optimizer, about, group)
        if done in watched_at:
            paused = time.process_time()
            kept.append(watch(model, done))
            began += time.process_time() - paused
    watched = torch.stack(kept) if kept else NOTHING
    return Trained(model.eval(), history, time.process_time() - began, watched, watched_at)


def _validated(model: WeCLIP, long: Long) -> float:
    """Score of the decoder as it is, without dropout; random state and mode are as before."""
    states = torch.get_rng_state()
    score = long.validate(model.eval()) if long.group.is_first else float("nan")
    torch.set_rng_state(states)
    model.train()
    long.group.wait()
    return score
