"""The parameters of a notebook: what it declares, and whether given values can be right.

Imports here are fast, so that it takes under a second to see that a run is up to date.
"""

import ast
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from weclip_lib.config import in_range, one_of
from weclip_lib.data.profiles import get_profile
from weclip_lib.data.settings import effective, nearest, read_value, with_settings
from weclip_lib.storage.files import Unusable, reading
from weclip_lib.storage.provenance import ROOT

NOTEBOOKS = ROOT / "notebooks"
POINTERS = ("data_dir", "weights", "run_dir")  # parameters that name files to read
LONGEST_NAME = 120  # characters of a run's folder
PARAMETER_PRESETS = ("default", "official")
RANGES = {  # of common parameters
    "seed": (0, 2**32 - 1),
    "seed_count": (1,),
    "steps": (0,),
    "pictures": (0,),
    "staged": (0,),
    "repeats": (1,),
    "shown": (1,),
}
KINDS = {
    "int": ("a whole number", int),
    "float": ("a number", (int, float)),
    "str": ("text", str),
    "bool": ("true or false", bool),
    "dict": ("names with values, such as {box_threshold: 0.3}", dict),
}


def about(notebook: Path) -> dict:
    """Read the `weclip` entry of a notebook's metadata.

    `short`: parameters of a short run. `reads`: patterns of files in the repository that it
    reads. `makes_data`: without a `data_dir`, it makes a folder of its own.
    """
    with reading(notebook):
        return json.loads(notebook.read_bytes())["metadata"].get("weclip", {})


@dataclass(frozen=True)
class Parameter:
    """Type and default of a notebook's parameter."""

    kind: str  # int, float, str, bool, dict
    default: object


def declared_parameters(notebook: Path) -> dict[str, Parameter]:
    """Read a notebook's parameters from lines `name: kind = default` of the tagged cell.

    Raises:
        ValueError: If it cannot be read, or has no cell tagged `parameters`.
    """
    with reading(notebook):
        cells = json.loads(notebook.read_bytes())["cells"]
        tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", ())]
        if not tagged:
            raise Unusable(f"{notebook} has no cell tagged `parameters`")
        lines = ast.parse("".join(tagged[0]["source"])).body
        return {
            line.target.id: Parameter(ast.unparse(line.annotation), ast.literal_eval(line.value))
            for line in lines
            if isinstance(line, ast.AnnAssign)
        }


def check_parameters(notebook: Path, parameters: Mapping[str, object]) -> None:
    """Refuse parameters that the notebook does not declare, or that are invalid.

    Raises:
        ValueError: It names the parameter and what is allowed.
    """
    declared = declared_parameters(notebook)
    for name, value in parameters.items():
        if name not in declared and name in effective(get_profile("mini")):
            raise ValueError(f"{name} is a setting: give it in `settings`, or by -s")
        if name not in declared:
            raise ValueError(
                f"{notebook.name} has no parameter {name!r}: {nearest(name, declared)}"
            )
        where = f"parameter {name} of {notebook.name}"
        words, kind = KINDS.get(declared[name].kind, ("", object))
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{where} is {value!r}: give {words}")
        if name in RANGES:
            in_range(where, value, *RANGES[name])
        if name == "preset":
            one_of(where, value, PARAMETER_PRESETS)
        if _names_nothing(name, value):
            raise ValueError(f"{where} is {value!r}: nothing is there, seen from {Path.cwd()}")
    settings = parameters.get("settings", {})
    if "profile" in declared:
        setting = get_profile(parameters.get("profile", declared["profile"].default))
        with_settings(setting, settings)
    if "steps" in settings and parameters.get("steps", 0):
        raise ValueError(f"steps of {notebook.name} is given twice: as parameter and in settings")


def check_run(notebook: Path, parameters: Mapping[str, object]) -> None:
    """`check_parameters` for a run whose output folder the runner chooses."""
    if "out_dir" in parameters:
        raise ValueError(f"parameter out_dir of {notebook.name} is the runner's: use --out")
    check_parameters(notebook, parameters)


def run_name(varied: Mapping[str, object]) -> str:
    """Make a folder name for any disk; a hash is added if characters are replaced."""
    text = ",".join(f"{name}={value}" for name, value in varied.items()) or "only"
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "=,._-") else "-" for c in text)
    # Some disks ignore case, or drop a full stop at the end.
    if safe == text.lower().removesuffix(".") and len(text) <= LONGEST_NAME:
        return text
    digest = sha256(json.dumps(varied, sort_keys=True).encode()).hexdigest()[:8]
    return f"{safe[: LONGEST_NAME - 9]}-{digest}"


def _names_nothing(name: str, value: object) -> bool:
    """Whether a parameter names a path that is missing; a tag of weights is no path."""
    if name == "weights" and not ("/" in value or os.sep in value or Path(value).suffix):
        return False
    return name in POINTERS and bool(value) and not Path(value).exists()


def read_parameters(notebook: Path, pairs: Iterable[tuple[str, str]]) -> dict[str, object]:
    """Read parameters of the command line.

    Raises:
        ValueError: If one comes twice, or is no YAML.
    """
    declared, given = declared_parameters(notebook), {}
    for name, text in pairs:
        if name in given:
            raise ValueError(f"-p {name} comes a second time: give it once")
        kind = declared[name].kind if name in declared else "str"
        given[name] = read_value(f"-p {name}", text, kind)
    return given


def injected(cells: Sequence[str]) -> set[str]:
    """Return the names that papermill has set in a kernel.

    Args:
        cells: The cells executed so far; papermill's begins with `# Parameters`.
    """
    return {
        target.id
        for cell in cells
        if cell.startswith("# Parameters\n")
        for line in ast.parse(cell).body
        if isinstance(line, ast.Assign)
        for target in line.targets
        if isinstance(target, ast.Name)
    }
