"""State of a training run on disk: everything that makes a resumed run equal to one never stopped.

A checkpoint is a folder `checkpoint-0000500` with the decoder, the optimizer and random state as
safetensors, and what describes them as JSON. It appears when it is whole; the last ones are kept.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weclip_lib.checkpoint import load_weights, read_tensors, save_weights
from weclip_lib.distributed import Group
from weclip_lib.files import whole, write_text

KEPT = 3  # checkpoints
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW


def _optimizer_state(optimizer: torch.optim.Optimizer, decoder: nn.Module) -> dict[str, Tensor]:
    """AdamW's moments by the names of the decoder's parameters."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment].contiguous()
        for name, parameter in decoder.named_parameters()
        for moment in (MOMENTS if parameter in optimizer.state else ())
    }


def _random_states(group: Group) -> dict[str, Tensor]:
    """Of every process."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {
        f"rng.{kind}.{rank}": found
        for kind, state in states.items()
        for rank, found in enumerate(group.gather(state))
    }


def save_state(
    folder: Path,
    step: int,
    decoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    about: dict,
    group: Group,
) -> None:
    """Write the checkpoint after so many steps, and drop all but the newest; all processes call.

    Args:
        about: What describes the run and what it has logged, as JSON can hold it.
    """
    random = _random_states(group)
    if group.is_first:
        _write(folder, step, decoder, {**_optimizer_state(optimizer, decoder), **random}, about)
    group.wait()


def _write(
    folder: Path, step: int, decoder: nn.Module, state: dict[str, Tensor], about: dict
) -> None:
    path = folder / f"checkpoint-{step:07d}"
    with whole(path) as partial:
        partial.mkdir()
        save_weights(decoder, partial / "decoder.safetensors", about["settings"])
        save_file(state, partial / "state.safetensors")
        write_text(partial / "state.json", json.dumps({"step": step, **about}))
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Of a run, the oldest first."""
    return sorted(path for path in folder.glob("checkpoint-*") if path.suffix != ".partial")


def load_state(
    path: Path,
    decoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict,
    group: Group,
) -> dict:
    """Put a run back into the state of a checkpoint; returns what `save_state` was told.

    A process that was not among those of the checkpoint draws its dropout anew.

    Raises:
        ValueError: If a file is damaged or missing, or the run has other settings.
    """
    remedy = f"remove {path} to go on from the one before"
    try:
        about = json.loads((path / "state.json").read_text())
        state = load_file(path / "state.safetensors")
        weights = read_tensors(path / "decoder.safetensors")
    except Exception as error:  # safetensors and json raise their own on damaged files
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    kept = about["settings"]
    for name in sorted({*kept, *settings}):
        if kept.get(name) != settings.get(name):
            raise ValueError(
                f"{path} is of a run with {name} {kept.get(name)!r}, this one has "
                f"{settings.get(name)!r}: choose another --out, or the same settings"
            )
    load_weights(decoder, weights, str(path / "decoder.safetensors"))
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
