"""This module sets seeds and records what somebody needs to know to repeat a run.

Only functions that need torch import it; the check for an up-to-date run works without it.
"""

import ast
import json
import os
import platform
import random
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from weclip_lib.storage.files import write_text

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "weclip_lib"
RESULTS = ROOT / "results"
PACKAGES = ("torch", "open_clip_torch", "numpy", "pillow", "pandas", "papermill")


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def outside_results(folder: Path) -> Path:
    """Return the folder as a full path.

    Raises:
        ValueError: If it is inside results/, which only `make publish` writes.
    """
    folder = folder.resolve()
    if folder.is_relative_to(RESULTS):
        raise ValueError(f"{folder} is inside results/: only `make publish` writes there")
    return folder


def tree_hash(*paths: Path) -> str:
    """Return a hash of files, and of Python files below folders, by relative name and content."""
    total = sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            below = file.is_relative_to(ROOT)
            name = file.relative_to(ROOT).as_posix() if below else file.name
            total.update(f"{name}\n".encode())
            total.update(file.read_bytes())
    return total.hexdigest()


def _named(path: Path, name: str) -> Iterator[str]:
    """Yield the full names of all imports of a file, also of those within functions.

    Args:
        path: The file.
        name: Its package.
    """
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def needed_by(*modules: str, package: Path = PACKAGE) -> dict[str, Path]:
    """Return the files of some modules, and of all that they import of the library, by full name.

    Args:
        modules: Names without the library's, such as `cache`.
        package: The library's folder.

    Raises:
        ValueError: If there is no such module.
    """
    found: dict[str, Path] = {}
    waiting = [f"{package.name}.{module}" for module in modules]
    while waiting:
        parts = waiting.pop().split(".")
        for end in range(1, len(parts) + 1):  # an import of a.b also runs a
            name = ".".join(parts[:end])
            place = package.parent.joinpath(*parts[:end])
            files = place.with_suffix(".py"), place / "__init__.py"
            file = next((path for path in files if path.is_file()), None)
            if parts[0] != package.name or name in found or file is None:
                continue
            found[name] = file
            waiting += _named(file, name if file.name == "__init__.py" else name.rpartition(".")[0])
    absent = [module for module in modules if f"{package.name}.{module}" not in found]
    if absent:
        raise ValueError(f"{package} has no module {absent[0]!r}")
    return dict(sorted(found.items()))


@cache
def source_hash(*modules: str, package: Path = PACKAGE) -> str:
    """Return a hash of some modules and their imports: the code that computed a kept result."""
    total = sha256()
    for name, path in needed_by(*modules, package=package).items():
        total.update(f"{name}\n".encode() + path.read_bytes())
    return total.hexdigest()


def library_hash() -> str:
    """Return a hash of the library's source and of the weights of every MiniCLIP."""
    return tree_hash(ROOT / "weclip_lib", *sorted((ROOT / "data").glob("miniclip*/*")))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def provenance(device: "torch.device") -> dict:
    """Return commit, cleanness of the tree outside results/, hashes, versions, machine, time.

    Args:
        device: What was used, whatever else is there.
    """
    import torch

    changes = _git("status", "--porcelain", "--", ".", ":(exclude)results")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "clean": changes == "" if changes is not None else None,
        "library": library_hash(),
        "constraints": tree_hash(ROOT / "constraints.txt"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_provenance(
    path: Path, run: str, parameters: dict, device: "torch.device", **more: object
) -> dict:
    """Write parameters, commit, versions and the device used as JSON; return them.

    Args:
        run: Name of the notebook or the command.
        parameters: What somebody set; paths are written as text.
    """
    about = {"notebook": run, "parameters": parameters, **provenance(device), **more}
    text = json.dumps(about, indent=1, sort_keys=True, default=str)
    write_text(path, text + "\n")
    return about
