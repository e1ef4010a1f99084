"""This module reads and writes weights: safetensors, torch, OpenAI's archives, official names.

It reads tensors alone, and runs no code of a file.
"""

import json
import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from zipfile import ZipFile

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weclip_lib.storage.archive import read_archive
from weclip_lib.storage.files import Unusable, reading, whole

# Each pair: the name in an official WeCLIP checkpoint, and ours; {} is the number of a block.
OFFICIAL_NAMES = (
    ("decoder_fts_fuse.linears_modulelist.{}.proj.", "projections.{}.0."),
    ("decoder_fts_fuse.linears_modulelist.{}.proj_2.", "projections.{}.2."),
    ("decoder_fts_fuse.linear_fuse.", "fuse."),
    ("decoder.transformer.resblocks.{}.", "blocks.{}."),
    ("decoder.linear_pred.", "classify."),
)
SUM = "sha256 of tensors"  # in the note
REMEDY = "it is damaged or of another kind; get it anew, or save its state dict alone"


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    """Exchange the first prefix that fits `name`; return None if none fits."""
    for old, new in pairs:
        found = re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), name)
        if found:
            return new.format(*found.groups()) + name[found.end() :]
    return None


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the decoder's tensors of an official WeCLIP checkpoint our names.

    It leaves out the frozen CLIP, and the `positional_embedding_new` that CLIP gets at every
    forward pass. Source: official WeCLIP_model/model_attn_aff_voc.py; REFERENCE 4.
    """
    names = {name: _renamed(name, OFFICIAL_NAMES) for name in state}
    return {ours: state[theirs] for theirs, ours in names.items() if ours}


def to_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give our decoder's tensors the official names; that model loads them by strict=False."""
    pairs = [(ours, theirs) for theirs, ours in OFFICIAL_NAMES]
    return {_renamed(name, pairs): tensor for name, tensor in state.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, a torch file or OpenAI's archive, of any name.

    It opens a `state_dict` or `model` within, and removes the `module.` of parallel training.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or does not hold tensors alone.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    with reading(path, REMEDY):
        state = _content(path)
        for key in ("state_dict", "model"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__} and no state dict")
        for name, value in state.items():
            plain = isinstance(value, Tensor) and value.layout == torch.strided
            if not plain or value.is_meta or value.is_quantized:
                raise Unusable(f"{path} holds {name}, which is no tensor: give a state dict")
        return {str(name).removeprefix("module."): value for name, value in state.items()}


def _content(path: Path) -> object:
    """Read what a file holds; its first bytes tell its kind."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        tensors, written = load_file(path), re.search(rf'"{SUM}": "(\w+)"', _note(path))
        if written and written[1] != _sum(tensors):
            raise ValueError("its numbers are not those that were written")
        return tensors
    if head.startswith(b"PK"):
        with ZipFile(path) as archive:
            if sum(i.file_size for i in archive.infolist()) > 2 * path.stat().st_size + 2**24:
                raise ValueError("it claims to hold more than its size allows")
            if any(re.match(r"[^/]+/(constants\.pkl|code/)", name) for name in archive.namelist()):
                return read_archive(path)
            if broken := archive.testzip():  # torch does not check
                raise ValueError(f"{broken} in it is broken")
    elif not head.startswith(b"\x80"):
        raise ValueError("it is no file of safetensors or torch, or cut")
    try:
        with path.open("rb") as file:  # given a path, torch would judge by its ending
            found = torch.load(file, map_location="cpu", weights_only=True)
            if not head.startswith(b"PK") and file.read(1):
                raise ValueError("it goes on where it should end")
            return found
    except UnpicklingError as error:  # its message advises to run the file's code
        raise ValueError("it holds other things than tensors") from error


def _sum(tensors: dict[str, Tensor]) -> str:
    """Return the checksum of all tensors with their names."""
    found = sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def load_official_decoder(decoder: nn.Module, path: Path) -> None:
    """Load the decoder of an official WeCLIP checkpoint.

    Raises:
        ValueError: If it is another file, or a tensor does not fit; the message has our name.
    """
    state = from_official(read_tensors(path))
    if not state:
        raise ValueError(f"{path} holds no tensor named decoder_fts_fuse.* or decoder.*")
    load_weights(decoder, state, str(path))


def save_official_decoder(decoder: nn.Module, path: Path) -> None:
    """Write the decoder under the official names; the official code reads it by `torch.load`."""
    with whole(path) as partial:
        torch.save(to_official(decoder.state_dict()), partial)


def save_tensors(tensors: dict[str, Tensor], path: Path, note: dict) -> None:
    """Write tensors, their checksum and a JSON note; the file appears only when it is whole."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = json.dumps({**note, SUM: _sum(kept)}, sort_keys=True)
    with whole(path) as partial:
        save_file(kept, partial, metadata={"note": described})


def save_weights(module: nn.Module, path: Path, note: dict) -> None:
    """Write the tensors of a module by `save_tensors`."""
    save_tensors(module.state_dict(), path, note)


def read_note(path: Path) -> dict:
    """Read the JSON note that `save_tensors` wrote in a file; empty if there is none.

    Raises:
        ValueError: If the file or the note is damaged.
    """
    with reading(path, REMEDY):
        note = json.loads(_note(path))
        if not isinstance(note, dict):
            raise ValueError("its note is no JSON object")
    note.pop(SUM, None)
    return note


def _note(path: Path) -> str:
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("note", "{}")


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy `state` into `module`, which must have exactly the same tensors.

    Raises:
        ValueError: If a tensor does not fit; the message names the first, and its fault.
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
        if state[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{source} holds {name} in {state[name].dtype}: give {tensor.dtype}")
        if not state[name].to(tensor.dtype).sum(dtype=torch.float32).isfinite():
            raise ValueError(f"{source} holds {name} with values that are not finite: get it anew")
    unknown = sorted(set(state) - set(expected))
    if unknown:
        raise ValueError(f"{source} holds {unknown[0]}, which this model does not have")
    module.load_state_dict({name: torch.as_tensor(t) for name, t in state.items()})
