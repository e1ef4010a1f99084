"""Numbers and devices that somebody gives, checked where they enter."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def in_range(name: str, value: object, low: float, high: float | None = None) -> None:
    """Refuse a number outside a range; both ends belong to it.

    Raises:
        ValueError: Naming it, and what it may be.
    """
    kinds = int if isinstance(low, int) else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool)
    if not fits or not low <= value <= (float("inf") if high is None else high):
        kind = "a whole number" if kinds is int else "a number"
        span = f"of {low} or more" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} is {value!r}: give {kind} {span}")


def one_of(name: str, value: object, choices: tuple) -> None:
    """Refuse a value that is not one of some.

    Raises:
        ValueError: Naming it, and what it may be.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(map(str, choices))}")


def at_least(low: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """A type for argparse: whole numbers from `low` up to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise ArgumentTypeError(f"{text}: give a whole number of {low} or more")
        if value > most:
            raise ArgumentTypeError(f"{text}: give a whole number of at most {most}")
        return value

    return parse


def find_device(name: str = "") -> "torch.device":
    """The device of that name: cpu, cuda, cuda:1, mps; empty or `auto`: a GPU if there is one.

    Raises:
        ValueError: If there is no such device here.
    """
    import torch  # takes seconds; help texts and refusals need none of it

    here = ["cpu"]
    if torch.cuda.is_available():
        here += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        here.append("mps")
    if name in ("", "auto"):
        return torch.device("cuda" if "cuda" in here else here[-1])
    if name not in here:
        raise ValueError(f"device {name!r}: torch sees only {', '.join(here)} here")
    return torch.device(name)
