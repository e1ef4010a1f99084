"""One flat list of all settings of a profile: how each is named, checked, changed and shown.

A setting has the name of its field, and settings of the CRF begin with `crf_`. Notebooks, grids and
commands change a profile through this module alone. So a setting has one name and one check.
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from difflib import get_close_matches

import yaml

from weclip_lib.commands import ListSettings
from weclip_lib.data.profiles import Profile, get_profile
from weclip_lib.storage.files import in_a_line
from weclip_lib.world.settings import DIALS

PARTS = {"method": "", "decoder": "", "budget": "", "world": "", "crf": "crf_"}  # with prefixes
OWN = (  # fields of the profile itself
    "backbone",
    "statistics",
    "scales",
    "long_side",
    "train_split",
    "scored_splits",
    "inspected",
    "augment",
    "drawn",
)
EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
DRAWING = "of MiniVOC's drawing"


def effective(profile: Profile) -> dict[str, object]:
    """Return the value of every setting by name."""
    found = {name: getattr(profile, name) for name in OWN}
    for part, prefix in PARTS.items():
        found |= {prefix + name: value for name, value in asdict(getattr(profile, part)).items()}
    return found


def with_settings(profile: Profile, given: Mapping) -> Profile:
    """Change settings of a profile.

    Args:
        given: Values by name, as YAML gives them: a list stands for a tuple.

    Raises:
        ValueError: If a name is unknown, a value has the wrong type or range, or a setting has no
            effect in this profile. The message has the name and what is right.
    """
    known = effective(profile)
    values = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"there is no setting {name!r}: {nearest(name, known)}")
        values[name] = _fitting(name, value, known[name])
    own = {name: values[name] for name in OWN if name in values}
    for part, prefix in PARTS.items():
        before = getattr(profile, part)
        names = [field.name for field in fields(before) if prefix + field.name in values]
        changed = {name: values[prefix + name] for name in names}
        try:
            own[part] = replace(before, **changed)
        except ValueError as error:  # it begins with the name of the field
            raise ValueError(f"{prefix}{error}") from error
        if part == "world" and changed and not any(profile.drawn):
            raise ValueError(
                f"{next(iter(changed))} is {DRAWING}: profile {profile.name} has real pictures"
            )
    if "drawn" in values and not any(profile.drawn):
        raise ValueError(f"drawn is {DRAWING}: profile {profile.name} has real pictures")
    changed = replace(profile, **own)
    idle = [n for n in DIALS if n in values and values[n] != getattr(profile.world, n)]
    if idle and changed.world.version == 1:
        raise ValueError(f"{idle[0]} has no effect in version 1: use profile mini")
    if "crop" in values and not changed.augment:
        raise ValueError(
            f"crop has no effect in profile {profile.name}, which does not crop: set augment: true"
        )
    return changed


def read_pairs(profile: Profile, pairs: Iterable[tuple[str, str]]) -> dict[str, object]:
    """Read settings given as names and texts, such as those of a command line.

    Raises:
        ValueError: If a name is unknown or comes twice, or a text is no value.
    """
    known, found = effective(profile), {}
    for name, text in pairs:
        if name not in known:
            raise ValueError(f"there is no setting {name!r}: {nearest(name, known)}")
        if name in found:
            raise ValueError(f"setting {name} comes a second time: give it once")
        found[name] = read_value(name, text, type(known[name]).__name__)
    return found


def read_value(name: str, text: str, kind: str) -> object:
    """Read one value; what is no number stays text, for a check to refuse.

    YAML alone would read 010 as 8, 1:30 as 90 and 1e-3 as text.

    Args:
        kind: Name of the type: str, int, float, or another one, which is read as YAML.

    Raises:
        ValueError: If it is no YAML.
    """
    if kind in ("str", "int", "float"):
        with suppress(ValueError):
            return {"str": str, "int": int, "float": float}[kind](text)
        return text
    try:
        return yaml.safe_load(text)
    except Exception as error:  # a YAML tag may raise any error
        raise ValueError(f"{name} has {text!r}, which is no value: {in_a_line(error)}") from error


def nearest(name: object, known: Iterable[str]) -> str:
    """Suggest the nearest names, or list all."""
    near = get_close_matches(str(name), known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"choose of {', '.join(sorted(known))}"


def _fitting(name: str, value: object, now: object) -> object:
    """Return a value as the type of the present one.

    Raises:
        ValueError: If it has another type.
    """
    if isinstance(now, tuple):
        kind = now[0]
        if isinstance(value, list | tuple) and value:
            return tuple(_fitting(f"{name}[{i}]", one, kind) for i, one in enumerate(value))
        raise ValueError(f"{name} is {value!r}: give a list, such as {list(now)}")
    if isinstance(now, bool):
        fits, right = isinstance(value, bool), "true or false"
    elif isinstance(now, int):
        fits, right = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif isinstance(now, float):
        if isinstance(value, str) and EXPONENT.fullmatch(value):  # text to YAML, which wants 1.0e-3
            value = float(value)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits, right = fits and math.isfinite(value), "a number"
    else:
        fits, right = isinstance(value, str) and bool(value), "text"
    if not fits:
        raise ValueError(f"{name} is {value!r}: give {right}, such as {now!r}")
    return float(value) if isinstance(now, float) else value


def run(chosen: ListSettings) -> None:
    """Run `weclip settings`."""
    for name, value in effective(get_profile(chosen.profile)).items():
        shown = list(value) if isinstance(value, tuple) else value
        sys.stdout.write(f"{name}: {json.dumps(shown)}\n")


def as_text(given: Mapping[str, object]) -> str:
    """Write settings in one line, in the order of their names: `box_threshold=0.3, dim=64`."""
    return ", ".join(f"{name}={as_value(value)}" for name, value in sorted(given.items()))


def as_value(value: object) -> object:
    """Write a list as text, `1.0/0.75`; return other values as they are."""
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else value
