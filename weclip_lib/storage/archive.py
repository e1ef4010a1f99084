"""This module reads the tensors of OpenAI's TorchScript archive of CLIP, and runs nothing in it.

The archive is a zip. `data.pkl` describes a tree of modules. `data/0`, `data/1` and so on hold the
numbers. The text of `code/` says which attributes of a module are parameters and buffers.
"""

import io
import math
import pickle
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import torch
from torch import Tensor

from weclip_lib.storage.files import Unusable

OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")  # beside the weights
DTYPES = {
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
}
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
OTHERS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
KNOWN = {
    TENSOR,
    PARAMETER,
    *DTYPES,
    "collections.OrderedDict",
    "torch.jit._pickle.restore_type_tag",
}
KNOWN |= {f"torch.jit._pickle.{name}" for name in OTHERS}
MODULE = re.compile(r"^class (\w+)\(Module\):\n((?:[ \t].*\n|\n)*)", re.MULTILINE)
STATE = re.compile(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", re.MULTILINE)
REMEDY = (
    "where you trust it, save `torch.jit.load(...).state_dict()` by `torch.save`, and give that"
)


class _Described:
    """A call that a pickle asks for, with its arguments; nothing ever makes the call."""

    __slots__ = ("__dict__", "arguments")
    path = ""

    def __new__(cls, *arguments: object) -> "_Described":
        made = super().__new__(cls)
        made.arguments = arguments
        return made


class _Unpickler(pickle._Unpickler):  # Python's; C's takes all memory that a file asks for
    """This reader only describes what a pickle names, and refuses what CLIP does not need."""

    def find_class(self, module: str, name: str) -> type[_Described]:
        path = f"{module}.{name}"
        if path not in KNOWN and not path.startswith("__torch__."):
            raise ValueError(f"it names {path}, which is no part of CLIP")
        return type("Described", (_Described,), {"path": path})

    def persistent_load(self, about: object) -> object:
        return about


def read_archive(path: Path) -> dict[str, Tensor]:
    """Return the tensors of OpenAI's CLIP, by the names of its `state_dict`.

    Raises:
        Unusable: If the archive holds another model: its code would have to be run.
        Exception: If it is damaged; any kind is possible.
    """
    with ZipFile(path) as archive:
        names = archive.namelist()
        (tree,) = (name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name))
        root = tree.removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("it is of a machine with another order of bytes")
        code = {
            name.removeprefix(f"{root}code/").removesuffix(".py"): archive.read(name).decode()
            for name in names
            if name.startswith(f"{root}code/") and name.endswith(".py")
        }
        if any("__setstate__" in text for text in code.values()):
            raise Unusable(f"{path} would have to be run to be read: {REMEDY}")
        described = _Unpickler(io.BytesIO(archive.read(tree))).load()

        @cache  # several tensors may lie in one storage
        def storage(key: str) -> bytearray:
            return bytearray(archive.read(f"{root}data/{key}"))

        found = _state(described, _stated(code))
        state = {name: _tensor(value, storage) for name, value in found}
    if not set(OPENAI_NUMBERS) <= set(state):
        raise Unusable(f"{path} has code, and is not OpenAI's CLIP: {REMEDY}")
    return state


def _stated(code: dict[str, str]) -> dict[str, set[str]]:
    """Return the names of the parameters and buffers of every class of modules."""
    found = {}
    for place, text in code.items():
        for name, body in MODULE.findall(text):
            listed = "".join(STATE.findall(body))
            found[f"{place.replace('/', '.')}.{name}"] = set(re.findall(r'"(.*?)"', listed))
    return found


def _state(
    module: _Described, stated: dict[str, set[str]], prefix: str = ""
) -> Iterator[tuple[str, _Described]]:
    """Yield the named parameters and buffers of a module and of the modules in it."""
    for name, value in vars(module).items():
        if name in stated[type(module).path] and value is not None:
            yield prefix + name, value
        elif isinstance(value, _Described) and type(value).path in stated:
            yield from _state(value, stated, f"{prefix}{name}.")


def _tensor(found: _Described, storage: Callable[[str], bytearray]) -> Tensor:
    """Return a tensor, or refuse one that does not lie within its storage."""
    if type(found).path == PARAMETER:
        found = found.arguments[0]
    if type(found).path != TENSOR:
        raise ValueError(f"it has {type(found).path} where a tensor should be")
    (_, kind, key, *_), offset, size, stride = found.arguments[:4]
    if not all(type(number) is int and number >= 0 for number in (offset, *size, *stride)):
        raise ValueError(f"its data/{key} is described by other things than numbers")
    content, dtype = storage(key), DTYPES[kind.path]
    held = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if count > len(held) or (count and last >= len(held)):
        raise ValueError(f"its data/{key} is too short for a tensor of shape {size}")
    return held.as_strided(size, stride, offset)
