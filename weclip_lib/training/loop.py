"""The training loop owns the step number, the schedule, and the start of the RFM."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from weclip_lib.config import Budget
from weclip_lib.model import WeCLIP
from weclip_lib.storage.files import write_text
from weclip_lib.training.checkpoints import load_checkpoint, newest, save_checkpoint
from weclip_lib.training.distributed import Group
from weclip_lib.training.features import backbone_key
from weclip_lib.training.sources import Batch, Source

WARMUP_RATIO = 1e-6  # of the learning rate, at step 0; official PolyWarmupAdamW
WATCHED_TIMES = 10  # a run keeps pseudo labels of watched pictures
LOG_EVERY = 20  # steps per point of the curve
NOTHING = torch.empty(0, 0, 0, 0, dtype=torch.uint8)  # no watched labels


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    model: WeCLIP
    history: list[dict[str, float]]  # every 20 steps, mean losses since the last; validations
    cpu_seconds: float  # user and system time, when it was trained
    watched: UInt8[Tensor, "time row height width"] = NOTHING  # pseudo labels of the RFM
    watched_at: list[int] = field(default_factory=list)  # steps done


def learning_rate(step: int, budget: Budget) -> float:
    """Warm up linearly, then decay linearly, counted from step 0.

    Source: official utils/optimizer.py PolyWarmupAdamW; REFERENCE 37.
    """
    if step < budget.warmup:
        part = 1 - (1 - step / budget.warmup) * (1 - WARMUP_RATIO)
    else:
        part = 1 - step / budget.steps
    return budget.learning_rate * part


def build_optimizer(model: WeCLIP, budget: Budget) -> torch.optim.AdamW:
    """Put all of the decoder's parameters, biases and norms too, in one group."""
    return torch.optim.AdamW(
        model.decoder.parameters(),
        lr=budget.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=budget.weight_decay,
        fused=True,
    )


@dataclass(frozen=True)
class RunOptions:
    """Further options of a run of hours or days; the defaults suit a short one."""

    folder: Path | None = None  # of checkpoints; None: nothing is kept or resumed
    checkpoint_every: int = 1000  # steps
    validate: Callable[[WeCLIP], float] | None = None  # mIoU in percent; only this sees masks
    validate_every: int = 0  # steps; 0: never
    accumulate: int = 1  # parts of a process's share of a batch
    group: Group = field(default_factory=Group)
    note: Callable[[list[dict[str, float]]], None] | None = None  # gets the curve as it grows


def _settings(model: WeCLIP, source: Source, budget: Budget, seed: int) -> dict:
    """List the settings that a resumed run must share with the stopped one."""
    return {
        **{f"method.{name}": value for name, value in asdict(model.method).items()},
        **{f"budget.{name}": value for name, value in asdict(budget).items()},
        "seed": seed,
        "class prompts (classes.csv)": list(model.labels.class_prompts),
        "background prompts (backgrounds.txt)": list(model.labels.backgrounds),
        "backbone": backbone_key(model),
        **source.about,
    }


def _loss_of_step(
    model: WeCLIP, parts: Sequence[Batch], *, use_rfm: bool, bf16: bool, group: Group
) -> Float[Tensor, "3"]:
    """Return (total, segmentation, affinity) loss of this process's share; gradients flow.

    All parts and processes share one count of pixels and pairs. The sum of their losses is
    therefore the loss of the whole batch.
    """
    outputs = [_outputs(model, batch, use_rfm=use_rfm, bf16=bf16) for batch in parts]
    totals = None
    if len(parts) * group.count > 1:
        counted = [
            model.loss_counts(label, tuple(logits.shape[-2:])) for logits, _, label in outputs
        ]
        totals = group.sum(torch.stack(counted).sum(0))
    found = []
    for output in outputs:
        segmentation, pairwise = model.losses(*output, totals)
        total = segmentation + model.method.affinity_weight * pairwise
        found.append(torch.stack([total, segmentation, pairwise]))
    return torch.stack(found).sum(0) if len(found) > 1 else found[0]


def _outputs(
    model: WeCLIP, batch: Batch, *, use_rfm: bool, bf16: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits and affinity of the decoder, and the label that teaches them.

    Until the RFM starts, the label is the given one, or CLIP's attention makes it. Then the RFM
    makes it, with the decoder's affinity of this step.
    """
    label = None if use_rfm else batch.label
    device = model.foreground.device.type
    with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
        features = batch.features() if label is None else None
        tokens = batch.tokens() if features is None else features.tokens
        logits, affinity = model.decoder(tokens, batch.grid)
    if features is not None:
        label = model.label(
            features,
            batch.pixels(),
            batch.image_labels,
            affinity if use_rfm else None,
            padded=batch.padded,
        )
    return logits, affinity, label


def _check_batch(source: Source, budget: Budget, options: RunOptions) -> None:
    """Refuse a batch that the pictures do not fill, or that has no equal parts."""
    if len(source) < budget.batch:
        raise ValueError(
            f"{len(source)} pictures, mirrored ones included, do not fill a batch of "
            f"{budget.batch}: train on more, or take a smaller batch"
        )
    count, parts = options.group.count, options.accumulate
    if budget.batch % (count * parts):
        raise ValueError(
            f"a batch of {budget.batch} cannot be cut in {count * parts} equal parts "
            f"({count} process(es), {parts} accumulated): choose another size"
        )


class _Run:
    """What the steps of one run share, and its log so far."""

    def __init__(
        self, model: WeCLIP, source: Source, budget: Budget, seed: int, options: RunOptions
    ) -> None:
        self.model, self.source, self.budget, self.seed = model, source, budget, seed
        self.options, self.group = options, options.group
        self.optimizer = build_optimizer(model, budget)
        self.rfm_from = round(model.method.rfm_start * budget.steps)
        self.settings = _settings(model, source, budget, seed) if options.folder else {}
        self.history: list[dict[str, float]] = []
        self.pending: list[Tensor] = []  # losses since the last point of the curve
        self.began = time.process_time()

    def cpu_seconds(self) -> float:
        """Return what the steps have taken, those before a stop included."""
        return time.process_time() - self.began

    def resume(self) -> int:
        """Resume from the newest checkpoint, if any; return the number of steps done."""
        folder = self.options.folder
        found = newest(folder, self.group) if folder else None
        if found is None:
            return 0
        decoder = self.model.decoder
        about = load_checkpoint(found, decoder, self.optimizer, self.settings, self.group)
        self.history = about["history"]
        self.pending = [torch.tensor(one, device=self.group.device) for one in about["losses"]]
        self.began -= about.get("cpu_seconds", 0.0)
        return about["step"]

    def batches(self, steps: range) -> Iterator[list[Batch]]:
        """Yield this process's parts of the batch of every step."""
        parts, rank = self.options.accumulate, self.group.rank
        mine = range(rank * parts, (rank + 1) * parts)
        coming = self.source.batches(
            self.model, self.seed, steps, self.budget.batch, mine, parts * self.group.count
        )
        for _ in steps:
            yield [next(coming) for _ in mine]

    def step(self, number: int, parts: Sequence[Batch]) -> None:
        """Make one optimizer step."""
        losses = _loss_of_step(
            self.model,
            parts,
            use_rfm=number >= self.rfm_from,
            bf16=self.budget.bf16,
            group=self.group,
        )
        for settled in self.optimizer.param_groups:
            settled["lr"] = learning_rate(number, self.budget)
        self.optimizer.zero_grad()
        losses[0].backward()
        self.group.sum_gradients(self.model.decoder.parameters())
        self.optimizer.step()
        self.pending.append(self.group.sum(losses.detach().clone()))

    def after(self, done: int) -> None:
        """Log, validate and save if it is time, after `done` steps."""
        options, ended = self.options, done == self.budget.steps
        if done % LOG_EVERY == 0 or ended:
            self._refuse_broken(done)
            names = ("loss", "segmentation_loss", "affinity_loss")
            means = torch.stack(self.pending).mean(0).tolist()
            self.pending.clear()
            self._log(done, dict(zip(names, means, strict=True)))
        if options.validate and options.validate_every and done % options.validate_every == 0:
            self._log(done, {"miou": self._validated()})
        if options.folder and (done % options.checkpoint_every == 0 or ended):
            self._refuse_broken(done)
            losses = [one.tolist() for one in self.pending]
            about = {"settings": self.settings, "history": self.history, "losses": losses}
            about["cpu_seconds"] = self.cpu_seconds()
            decoder = self.model.decoder
            save_checkpoint(options.folder, done, decoder, self.optimizer, about, self.group)

    def _log(self, done: int, values: dict[str, float]) -> None:
        self.history.append({"iteration": done, **values})
        if self.options.note:
            self.options.note(self.history)

    def _refuse_broken(self, done: int) -> None:
        """Stop at a loss that is not finite, before saving, and name its pictures.

        The check is rare, since it has to wait for the device.
        """
        window = torch.stack(self.pending) if self.pending else torch.zeros(1, 3)
        broken = (~window.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        if not broken:
            return
        step, losses = done - len(self.pending) + broken[0], window[broken[0]].tolist()
        names = self.source.names(self.source.drawn(self.seed, step, self.budget.batch))
        about = {"iteration": step + 1, "losses": losses, "pictures": names}
        if self.options.folder and self.group.is_first:
            write_text(self.options.folder / "failed_batch.json", json.dumps(about, indent=1))
        raise FloatingPointError(
            f"the loss is {losses} at step {step + 1}, with {', '.join(names)}: "
            "lower the learning rate, or look at these pictures"
        )

    def _validated(self) -> float:
        """Score the decoder without dropout; random state and training mode stay as before."""
        states = torch.get_rng_state()
        first = self.group.is_first
        score = self.options.validate(self.model.eval()) if first else float("nan")
        torch.set_rng_state(states)
        self.model.train()
        self.group.wait()
        return score


def train_decoder(
    model: WeCLIP,
    source: Source,
    budget: Budget,
    *,
    seed: int,
    watcher: Callable[[WeCLIP, int], None] | None = None,
    progress: str = "training",
    options: RunOptions = RunOptions(),
) -> Trained:
    """Train the decoder in place: on given or static labels, then on labels of the RFM.

    The RFM starts after the fraction `method.rfm_start` of the steps; at 1 it never starts. It
    makes new labels at every step, with the decoder's affinity of that step.

    Args:
        source: Pictures, with labels where given.
        budget: `batch` counts the pictures of all processes and accumulated parts.
        seed: Of the order of pictures and of dropout, not of the first weights.
        watcher: Called ten times with the model and the step. Training does not depend on it,
            and sees no score. After a stop it may be called again with the same step.
        progress: Name of the bar.
        options: Checkpoints, validation, precision, processes. A run resumes from its
            newest checkpoint, and ends with the same weights as without a stop.

    Raises:
        ValueError: If there are fewer pictures than a batch needs, a batch has no equal parts,
            or a checkpoint does not fit.
        FloatingPointError: If the loss is not finite.
    """
    _check_batch(source, budget, options)
    torch.manual_seed(seed + options.group.rank)
    times = range(1, 1 + WATCHED_TIMES) if watcher else ()
    watched_at = {math.ceil(budget.steps * n / WATCHED_TIMES) for n in times}
    run = _Run(model, source, budget, seed, options)
    steps = range(run.resume(), budget.steps)
    options.group.share_weights(model.decoder)
    model.train()
    bar = tqdm(
        zip(steps, run.batches(steps), strict=True),
        desc=progress,
        unit="step",
        initial=steps.start,
        total=budget.steps,
        disable=not options.group.is_first,
    )
    for step, parts in bar:
        run.step(step, parts)
        if step + 1 in watched_at:  # before a checkpoint, so that none is missed after a stop
            paused = time.process_time()
            watcher(model, step + 1)
            run.began += time.process_time() - paused
        run.after(step + 1)
    return Trained(model.eval(), run.history, run.cpu_seconds())
