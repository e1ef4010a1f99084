"""Share one training run between processes, one for each device.

`torchrun` and `accelerate launch` start them, and number them by environment variables. The
decoder is small, so gradients are summed once, in one piece, after the backward pass.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weclip_lib.backbone import find_device

LAUNCHER = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # of torchrun; else alone
PATIENCE = timedelta(hours=6)  # to wait while the first process validates


@dataclass(frozen=True)
class Group:
    """This process among those of a run; alone by default."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes."""
        if self.count > 1:
            grads = [parameter.grad for parameter in parameters]
            flat = self.sum(torch.cat([grad.flatten() for grad in grads]))
            for grad, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(summed.view_as(grad))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return every process's tensor, all of one shape, by rank, on the CPU."""
        if self.count == 1:
            return [tensor.cpu()]
        found = [torch.empty_like(tensor, device=self.device) for _ in range(self.count)]
        dist.all_gather(found, tensor.to(self.device))
        return [one.cpu() for one in found]

    def share_weights(self, module: nn.Module) -> None:
        """Give every process the weights of the first."""
        if self.count > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)

    def told(self, number: int) -> int:
        """Return the number of the first process; all call."""
        if self.count == 1:
            return number
        shared = torch.tensor(number, device=self.device)
        dist.broadcast(shared, src=0)
        return int(shared)

    def wait(self) -> None:
        """Wait until all call this."""
        if self.count > 1:
            dist.barrier()


def _number(name: str, default: str) -> int:
    """Read it from the environment."""
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r}: start all processes by torchrun, or unset it")
    return int(text)


@contextmanager
def joined(device: str = "") -> Iterator[Group]:
    """Join the group that this process was started in.

    Args:
        device: As for `find_device`. With `cuda`, every process takes a GPU of its own.

    Raises:
        ValueError: If there is no such device, or the launcher's numbers are wrong.
    """
    found = find_device(device)
    rank, count, local = (_number(*told) for told in LAUNCHER.items())
    if rank >= count:
        raise ValueError(f"RANK is {rank} of {count} processes: start all of them by torchrun")
    if count > 1 and str(found) not in ("cpu", "cuda"):
        raise ValueError(f"device {found} for {count} processes: choose cuda, or cpu")
    if str(found) == "cuda":
        found = find_device(f"cuda:{local}")
    kind, place = found.type, str(found)
    if kind == "cuda":
        torch.cuda.set_device(found)
    if count > 1:
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Group(rank, count, place)
    finally:
        if count > 1:
            dist.destroy_process_group()
