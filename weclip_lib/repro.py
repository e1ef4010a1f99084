"""Seeds and provenance: what has to be known to run something again."""

import os
import platform
import random
import subprocess
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "open_clip_torch", "numpy", "pillow", "pandas", "papermill")


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def tree_hash(*paths: Path) -> str:
    """Hash of files, and of all Python files below folders, by relative name and content."""
    total = sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            total.update(f"{file.relative_to(ROOT)}\n".encode())
            total.update(file.read_bytes())
    return total.hexdigest()


def source_hash(*modules: str) -> str:
    """Hash of some modules of the library: what a kept result was computed by."""
    return tree_hash(*(ROOT / "weclip_lib" / f"{module}.py" for module in modules))


def library_hash() -> str:
    """Hash of the library's source and of MiniCLIP's weights."""
    return tree_hash(ROOT / "weclip_lib", *sorted((ROOT / "data" / "miniclip").iterdir()))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def provenance() -> dict:
    """Commit, whether the tree is clean but for results/, versions, device, time."""
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)results")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "clean": changes == "" if changes is not None else None,
        "library": library_hash(),
        "constraints": tree_hash(ROOT / "constraints.txt"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
