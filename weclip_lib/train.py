"""The training loop: owns the step number, the schedule, and when the RFM starts."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from weclip_lib.cache import FrozenDataset
from weclip_lib.checkpoint import load_weights, read_note, save_weights
from weclip_lib.config import Budget
from weclip_lib.model import WeCLIP
from weclip_lib.repro import seed_everything, source_hash

WARMUP_RATIO = 1e-6  # of the learning rate, at step 0; official PolyWarmupAdamW
MADE_BY = ("affinity", "cam", "decoder", "losses", "model", "par", "rfm", "train")
LOG_EVERY = 20  # steps a point of the curve


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    model: WeCLIP
    history: list[dict[str, float]]  # as `train_decoder` returns it
    cpu_seconds: float  # user and system time of the training, measured when it was done


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
    )


def train_decoder(
    model: WeCLIP,
    features: FrozenDataset,
    labels: UInt8[Tensor, "image height width"],
    budget: Budget,
    *,
    seed: int,
    progress: str = "training",
) -> list[dict[str, float]]:
    """Train the decoder in place, on given labels until the RFM starts, then on those it makes.

    The RFM starts at `method.rfm_start` of the steps; at 1 it never does. Its labels are made anew
    at every step with the decoder's affinity of that step.

    Args:
        features: Frozen features of the training pictures.
        labels: Of every row of `features`: static pseudo labels, or true masks for full
            supervision (with `rfm_start` 1).
        seed: Of the order of the pictures and of dropout; the decoder is as it is passed.
        progress: Name of the bar.

    Returns:
        A point every 20 steps: step, and the mean losses since the last one.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    torch.manual_seed(seed)
    optimizer = build_optimizer(model, budget)
    rfm_from = round(model.method.rfm_start * budget.steps)
    history, losses = [], []
    model.train()
    for step in tqdm(range(budget.steps), desc=progress, unit="step"):
        rng = np.random.default_rng([seed, step])
        rows = rng.choice(len(features.labels), budget.batch, replace=False).tolist()
        frozen = features.frozen(rows) if step >= rfm_from else None
        tokens = frozen.tokens if frozen else features.patches(rows)
        logits, affinity = model.decoder(tokens, tuple(features.cam.shape[-2:]))
        if frozen is None:
            label = labels[rows].long()
        else:
            refined = model.refine_cam(frozen, affinity)
            label = model.pseudo_label(refined, features.pixels(rows), features.labels[rows])
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
    model.eval()
    return history


def trained_decoder(
    build: Callable[[], WeCLIP],
    features: FrozenDataset,
    labels: UInt8[Tensor, "image height width"],
    budget: Budget,
    *,
    seed: int,
    folder: Path,
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
    )
    path = folder / f"{sha256(repr(about).encode()).hexdigest()[:16]}.safetensors"
    if path.exists():
        load_weights(model.decoder, load_file(path), str(path))
        return Trained(model.eval(), **read_note(path))
    began = time.process_time()
    history = train_decoder(model, features, labels, budget, seed=seed, progress=progress)
    note = {"history": history, "cpu_seconds": time.process_time() - began}
    save_weights(model.decoder, path, note)
    return Trained(model, **note)
