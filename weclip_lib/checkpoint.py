"""Decoder weights: safetensors in and out, and the official code's names."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from weclip_lib.files import whole

OFFICIAL_NAMES = (
    ("decoder_fts_fuse.linears_modulelist.", "projections."),
    (".proj.", ".0."),
    (".proj_2.", ".2."),
    ("decoder_fts_fuse.linear_fuse.", "fuse."),
    ("decoder.transformer.resblocks.", "blocks."),
    ("decoder.linear_pred.", "classify."),
)


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the decoder's tensors of an official WeCLIP checkpoint to ours."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(("decoder.", "decoder_fts_fuse.")):
            for theirs, ours in OFFICIAL_NAMES:
                name = name.replace(theirs, ours)
            renamed[name] = tensor
    return renamed


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
