"""Save a training run on disk, so that a resumed run equals one that never stopped.

A checkpoint is a folder `checkpoint-0000500`. It holds the decoder, the optimizer and the random
state as safetensors, and their description as JSON. It appears when it is whole; three are kept.
"""

import json
import re
import shutil
import sys
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn
from tqdm import tqdm

from weclip_lib.storage.files import reading, whole, write_text
from weclip_lib.storage.tensors import load_weights, save_weights
from weclip_lib.training.distributed import Group

KEPT = 3  # checkpoints
TENSORS = ("decoder.safetensors", "state.safetensors")
SHOWN, SHORT = 5, 60  # most words of a list, and letters of a value, in an error
NONE, ALL_DAMAGED = -1, -2  # instead of the step of a checkpoint
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW


def _optimizer_state(optimizer: torch.optim.Optimizer, decoder: nn.Module) -> dict[str, Tensor]:
    """Return AdamW's moments by name of the parameter."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment].contiguous()
        for name, parameter in decoder.named_parameters()
        for moment in (MOMENTS if parameter in optimizer.state else ())
    }


def _random_states(group: Group) -> dict[str, Tensor]:
    """Gather those of every process."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {
        f"rng.{kind}.{rank}": found
        for kind, state in states.items()
        for rank, found in enumerate(group.gather(state))
    }


def save_checkpoint(
    folder: Path,
    step: int,
    decoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    about: dict,
    group: Group,
) -> None:
    """Write the checkpoint after `step` steps, and keep the newest three; all processes call.

    Args:
        about: Settings and log of the run, as JSON can hold them.
    """
    random = _random_states(group)
    if group.is_first:
        _write(folder, step, decoder, {**_optimizer_state(optimizer, decoder), **random}, about)
    group.wait()


def _write(
    folder: Path, step: int, decoder: nn.Module, state: dict[str, Tensor], about: dict
) -> None:
    path = _named(folder, step)
    with whole(path) as partial:
        partial.mkdir()
        save_weights(decoder, partial / TENSORS[0], about["settings"])
        save_file(state, partial / TENSORS[1])
        sums = {name: _sum((partial / name).read_bytes()) for name in TENSORS}
        described = {"step": step, "sha256": sums, **about}
        write_text(partial / "state.json", json.dumps(described))
        if path.exists():  # damaged, else the run would have resumed from it
            shutil.rmtree(path)
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def _named(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:07d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _sum(content: bytes) -> str:
    return sha256(content).hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """List those of a run, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"\D+\d{7,}", path.name)]
    return sorted((path for path in found if path.is_dir()), key=_step)


def newest(folder: Path, group: Group) -> Path | None:
    """Find the newest whole checkpoint, or None; all processes call and get the same.

    Damaged ones are passed over, with a line for each.

    Raises:
        ValueError: If all are damaged.
    """
    step = group.told(_newest_step(folder) if group.is_first else NONE)
    if step == ALL_DAMAGED:
        raise ValueError(
            f"every checkpoint in {folder} is damaged: start anew with another --out; "
            "a trained.safetensors in it can still be used"
        )
    return None if step == NONE else _named(folder, step)


def _newest_step(folder: Path) -> int:
    step = NONE
    for path in reversed(checkpoints(folder)):
        try:
            _read(path)
        except ValueError as error:
            tqdm.write(f"passed over: {error}", file=sys.stderr)
            step = ALL_DAMAGED
        else:
            return _step(path)
    return step


def _read(path: Path) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """Read the description, decoder, and optimizer and random state of a checkpoint.

    Raises:
        ValueError: If a file is not as it was written.
    """
    remedy, tensors = f"remove {path}", []
    with reading(path / "state.json", remedy):
        about = json.loads((path / "state.json").read_bytes())
        kept, sums = about["settings"], about["sha256"]
        if about["step"] != _step(path) or not isinstance(kept, dict):
            raise ValueError("it is of another checkpoint")
    for name in TENSORS:
        with reading(path / name, remedy):
            content = (path / name).read_bytes()
            if _sum(content) != sums[name]:
                raise ValueError("it is not as it was written")
            tensors.append(load(content))
    return about, *tensors


def load_checkpoint(
    path: Path,
    decoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict,
    group: Group,
) -> dict:
    """Restore a run from a checkpoint; return the description in it.

    A process that the checkpoint does not know draws new dropout.

    Raises:
        ValueError: If a file is damaged or missing, or the settings differ.
    """
    about, weights, state = _read(path)
    kept, settings = about["settings"], json.loads(json.dumps(settings))
    differences = [
        _difference(name, kept.get(name), settings.get(name))
        for name in sorted({*kept, *settings})
        if kept.get(name) != settings.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path} is of another run: {'; '.join(differences)}: choose another --out, "
            "or restore what has changed"
        )
    load_weights(decoder, weights, str(path / TENSORS[0]))
    for name, parameter in decoder.named_parameters():
        moments = {m: state[f"{m}.{name}"] for m in MOMENTS if f"{m}.{name}" in state}
        if moments:
            optimizer.state[parameter] = {
                moment: value.to(parameter.device) for moment, value in moments.items()
            }
    if f"rng.cpu.{group.rank}" in state:
        torch.set_rng_state(state[f"rng.cpu.{group.rank}"])
    if f"rng.cuda.{group.rank}" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[f"rng.cuda.{group.rank}"])
    return about


def _difference(name: str, then: object, now: object) -> str:
    """Say how a setting differs from that at the start of the run."""
    if isinstance(then, list) and isinstance(now, list):
        before, after = ({repr(one): None for one in some} for some in (then, now))
        added = _first([one for one in after if one not in before])
        removed = _first([one for one in before if one not in after])
        changes = [f"{added} added"] * bool(added) + [f"{removed} removed"] * bool(removed)
        return f"{name}: {' and '.join(changes) or 'in another order'}"
    values = (repr(then), repr(now))
    if any(len(value) > SHORT or re.fullmatch("'[0-9a-f]{16,}'", value) for value in values):
        return f"{name}: not the same as when it was started"
    return f"{name} was {values[0]} and is {values[1]}"


def _first(words: list[str]) -> str:
    more = f" and {len(words) - SHOWN:,} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more
