"""Weights in and out: safetensors, torch files, OpenAI's archives, and official WeCLIP names.

Only tensors are read; no code of a file is run.
"""

import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weclip_lib.files import whole

# Names of an official WeCLIP checkpoint and ours; the number of a block stands for {}.
OFFICIAL_NAMES = (
    ("decoder_fts_fuse.linears_modulelist.{}.proj.", "projections.{}.0."),
    ("decoder_fts_fuse.linears_modulelist.{}.proj_2.", "projections.{}.2."),
    ("decoder_fts_fuse.linear_fuse.", "fuse."),
    ("decoder.transformer.resblocks.{}.", "blocks.{}."),
    ("decoder.linear_pred.", "classify."),
)
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")  # beside the weights


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    """`name` with the first fitting prefix exchanged; None if none fits."""
    for old, new in pairs:
        found = re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), name)
        if found:
            return new.format(*found.groups()) + name[found.end() :]
    return None


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the decoder's tensors of an official WeCLIP checkpoint.

    The frozen CLIP in it, and the `positional_embedding_new` that it picks up at every forward
    pass, are left out. Source: official WeCLIP_model/model_attn_aff_voc.py; REFERENCE 4.
    """
    names = {name: _renamed(name, OFFICIAL_NAMES) for name in state}
    return {ours: state[theirs] for theirs, ours in names.items() if ours}


def to_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official code's names for our decoder's tensors; its model loads them by strict=False."""
    pairs = [(ours, theirs) for theirs, ours in OFFICIAL_NAMES]
    return {_renamed(name, pairs): tensor for name, tensor in state.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, a torch file or a TorchScript archive (OpenAI's CLIP).

    A `state_dict` or `model` within is opened, and the `module.` of parallel training taken off.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds something else than tensors.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif _is_torchscript(path):
            state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged or holds more than tensors: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    state = {name.removeprefix("module."): value for name, value in state.items()}
    strange = next((n for n, value in state.items() if not isinstance(value, Tensor)), None)
    if strange:
        raise ValueError(f"{path} holds {strange}, which is no tensor: give a state dict")
    return state


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load_clip(clip: nn.Module, path: Path) -> None:
    """Load OpenAI's or open_clip's weights from a file into an open_clip model, in its precision.

    Raises:
        ValueError: Naming the first tensor that does not fit.
    """
    state = {n: t for n, t in read_tensors(path).items() if n not in OPENAI_NUMBERS}
    load_weights(clip, state, str(path))


def load_official_decoder(decoder: nn.Module, path: Path) -> None:
    """Load the decoder of an official WeCLIP checkpoint.

    Raises:
        ValueError: If it is none, or naming the first tensor that does not fit, by our name.
    """
    state = from_official(read_tensors(path))
    if not state:
        raise ValueError(f"{path} holds no tensor named decoder_fts_fuse.* or decoder.*")
    load_weights(decoder, state, str(path))


def save_official_decoder(decoder: nn.Module, path: Path) -> None:
    """Write the decoder under the official code's names, for `torch.load` there."""
    with whole(path) as partial:
        torch.save(to_official(decoder.state_dict()), partial)


def save_weights(module: nn.Module, path: Path, metadata: dict) -> None:
    """Write all tensors of `module` and a JSON note; the file appears only when it is whole."""
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    with whole(path) as partial:
        save_file(tensors, partial, metadata={"note": json.dumps(metadata, sort_keys=True)})


def read_note(path: Path) -> dict:
    """The JSON note of a file written by `save_weights`."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("note", "{}"))


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy `state` into `module`; every tensor has to be there, and none may be left over.

    Raises:
        ValueError: Naming the first offending tensor, its shape and the expected one.
    """
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise ValueError(f"{source} lacks {name}, of shape {tuple(tensor.shape)}")
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{source} holds {name} of shape {tuple(state[name].shape)}; "
                f"expected {tuple(tensor.shape)}: it belongs to another backbone or class list"
            )
    unknown = sorted(set(state) - set(expected))
    if unknown:
        raise ValueError(f"{source} holds {unknown[0]}, which this model does not have")
    module.load_state_dict({name: torch.as_tensor(t) for name, t in state.items()})
