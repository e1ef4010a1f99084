"""A second device for machines without one.

Tensors on it are kept by the CPU, but torch is told that they are elsewhere. As on a GPU, an
operation on tensors of both devices is an error, and so is `numpy()` of a tensor there. So a test
on the CPU finds a forgotten `.to(device)` or `.cpu()`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = torch.device("meta")  # torch computes nothing there, and gives no values away
aten = torch.ops.aten
MIXED = (  # moves, and what takes indices of the CPU on every device
    aten._to_copy.default,
    aten.copy_.default,
    aten._local_scalar_dense.default,
    aten.index.Tensor,
    aten.index_put_.default,
)


class Far(Tensor):
    """A tensor on the far device."""

    held: Tensor  # its values

    @staticmethod
    def __new__(cls, held: Tensor) -> "Far":
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=FAR,
        )  # fmt: skip
        made.held = held
        return made

    def tolist(self) -> list:
        return self.held.tolist()

    def __format__(self, how: str) -> str:
        return format(self.held, how)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Far(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _held(value):
    return value.held if isinstance(value, Far) else value


def _run(func, args: tuple, kwargs: dict):
    """Compute on the CPU what belongs to the far device, and refuse what belongs to both."""
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    far = [one for one in tensors if isinstance(one, Far)]
    asked = kwargs.get("device")
    goes_there = asked is not None and torch.device(asked) == FAR
    given = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs
    near = [one for one in tensors if not isinstance(one, Far) and one.dim()]
    if far and near and func not in MIXED:
        shapes = ", ".join(str(tuple(one.shape)) for one in near)
        raise RuntimeError(f"{func} has tensors on two devices: on the CPU, {shapes}")
    found = func(*tree_map(_held, args), **tree_map(_held, given))
    if func is aten._local_scalar_dense.default:
        return found
    if func is aten.copy_.default:
        return args[0]
    stays = far and not (func is aten._to_copy.default and asked is not None)
    if not (goes_there or stays):
        return found
    known = {id(one.held): one for one in far}  # in place

    def wrapped(value):
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Far(value)

    return tree_map(wrapped, found)


@contextmanager
def far_device() -> Iterator[torch.device]:
    """Make the far device usable in a block."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        # torch has a list of the devices that fused optimizers work on.
        with _Far(), patch("torch.optim.adam._device_dtype_check_for_fused"):
            yield FAR
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
