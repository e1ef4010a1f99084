"""The training loop: owns the step number, the schedule, and when the RFM starts."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Integer, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from weclip_lib.cache import FrozenDataset
from weclip_lib.checkpoint import load_weights, read_note, save_weights
from weclip_lib.config import Budget
from weclip_lib.files import locked, whole
from weclip_lib.model import WeCLIP
from weclip_lib.repro import seed_everything, source_hash

WARMUP_RATIO = 1e-6  # of the learning rate, at step 0; official PolyWarmupAdamW
WATCHED_TIMES = 10  # that the pseudo labels of watched pictures are kept in a run
MADE_BY = ("affinity", "cam", "decoder", "losses", "model", "par", "rfm", "train")
LOG_EVERY = 20  # steps a point of the curve


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
    model: WeCLIP, features: FrozenDataset, rows: list[int]
) -> Integer[Tensor, "row height width"]:
    """The pseudo labels that the RFM makes of some rows, with the decoder as it is now."""
    frozen = features.frozen(rows)
    training = model.training
    with torch.no_grad():
        _, affinity = model.eval().decoder(frozen.tokens, tuple(frozen.cam.shape[-2:]))
    model.train(training)
    refined = model.refine_cam(frozen, affinity)
    return model.pseudo_label(refined, features.pixels(rows), features.labels[rows])


def train_decoder(
    model: WeCLIP,
    features: FrozenDataset,
    labels: UInt8[Tensor, "image height width"],
    budget: Budget,
    *,
    seed: int,
    rows: Sequence[int] = (),
    watch: Sequence[int] = (),
    progress: str = "training",
) -> Trained:
    """Train the decoder in place, on given labels until the RFM starts, then on those it makes.

    The RFM starts at `method.rfm_start` of the steps; at 1 it never does. Its labels are made anew
    at every step with the decoder's affinity of that step.

    Args:
        features: Frozen features of the training pictures.
        labels: Of every row of `features`: static pseudo labels, or true masks for full
            supervision (with `rfm_start` 1).
        seed: Of the order of the pictures and of dropout; the decoder is as it is passed.
        rows: Of `features` to train on; all by default.
        watch: Rows whose pseudo labels by the RFM are kept ten times on the way. Training does
            not depend on it, and sees no score: somebody else holds them against masks.
        progress: Name of the bar.

    Raises:
        ValueError: If there are fewer rows than a batch has pictures.
        FloatingPointError: If the loss is not finite.
    """
    pool = list(rows or range(len(features.labels)))
    if len(pool) < budget.batch:
        raise ValueError(
            f"{len(pool)} pictures, mirrored ones included, do not fill a batch of {budget.batch}: "
            "train on more, or take a smaller batch"
        )
    torch.manual_seed(seed)
    began = time.process_time()
    times = range(1, 1 + WATCHED_TIMES) if watch else ()
    watched_at = sorted({math.ceil(budget.steps * n / WATCHED_TIMES) for n in times})
    kept = []
    optimizer = build_optimizer(model, budget)
    rfm_from = round(model.method.rfm_start * budget.steps)
    history, losses = [], []
    model.train()
    for step in tqdm(range(budget.steps), desc=progress, unit="step"):
        rng = np.random.default_rng([seed, step])
        drawn = rng.choice(pool, budget.batch, replace=False).tolist()
        frozen = features.frozen(drawn) if step >= rfm_from else None
        tokens = frozen.tokens if frozen else features.patches(drawn)
        logits, affinity = model.decoder(tokens, tuple(features.cam.shape[-2:]))
        if frozen is None:
            label = labels[drawn].long()
        else:
            refined = model.refine_cam(frozen, affinity)
            label = model.pseudo_label(refined, features.pixels(drawn), features.labels[drawn])
        segmentation, pairwise = model.losses(logits, affinity, label)
        loss = segmentation + model.method.affinity_weight * pairwise
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, budget)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(torch.stack([loss, segmentation, pairwise]).detach())
        if (step + 1) % LOG_EVERY == 0 or step + 1 == budget.steps:
            means = torch.stack(losses).mean(0)
            if not means.isfinite().all():
                raise FloatingPointError(
                    f"the loss is {means.tolist()} near step {step + 1}: lower the learning rate"
                )
            names = ("loss", "segmentation_loss", "affinity_loss")
            history.append({"iteration": step + 1, **dict(zip(names, means.tolist(), strict=True))})
            losses.clear()
        if step + 1 in watched_at:
            paused = time.process_time()
            parts = [
                rfm_label(model, features, list(watch[start : start + budget.batch]))
                for start in range(0, len(watch), budget.batch)
            ]
            kept.append(torch.cat(parts).to(torch.uint8))
            began += time.process_time() - paused
    watched = torch.stack(kept) if kept else labels.new_empty(0, 0, *labels.shape[1:])
    return Trained(model.eval(), history, time.process_time() - began, watched, watched_at)


def trained_decoder(
    build: Callable[[], WeCLIP],
    features: FrozenDataset,
    labels: UInt8[Tensor, "image height width"],
    budget: Budget,
    *,
    seed: int,
    folder: Path,
    rows: Sequence[int] = (),
    watch: Sequence[int] = (),
    progress: str = "training",
) -> Trained:
    """`train_decoder` on a new model, or the same run's weights from `folder` if they are there.

    Args:
        build: Makes the model; called after seeding, so that its decoder follows from the seed.
        folder: Finished decoders, named by a hash of all that they depend on.
    """
    seed_everything(seed)
    model = build()
    about = (
        asdict(model.method),
        asdict(budget),
        seed,
        sha256(labels.numpy().tobytes()).hexdigest(),
        [tuple(p.shape) for p in model.decoder.parameters()],
        features.key,
        source_hash(*MADE_BY),
        list(rows),
    )
    path = folder / f"{sha256(repr(about).encode()).hexdigest()[:16]}.safetensors"
    watching = sha256(repr(list(watch)).encode()).hexdigest()[:16]
    beside = folder / "watched" / f"{path.stem}-{watching}.safetensors"
    with locked(path):
        if path.exists() and (not watch or beside.exists()):
            load_weights(model.decoder, load_file(path), str(path))
            nothing = {"labels": labels.new_empty(0, 0, *labels.shape[1:]), "at": torch.empty(0)}
            kept = load_file(beside) if watch else nothing
            at = kept["at"].tolist()
            return Trained(model.eval(), **read_note(path), watched=kept["labels"], watched_at=at)
        trained = train_decoder(
            model, features, labels, budget, seed=seed, rows=rows, watch=watch, progress=progress
        )
        if watch:
            at = torch.tensor(trained.watched_at)
            with whole(beside) as partial:
                save_file({"labels": trained.watched, "at": at}, partial)
        note = {"history": trained.history, "cpu_seconds": trained.cpu_seconds}
        save_weights(model.decoder, path, note)
        return trained
