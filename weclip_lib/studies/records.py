"""Record runs of notebooks, with hashes of all that their outputs depend on.

Imports here are fast, so that it takes under a second to see that a run is up to date.
"""

import json
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

from weclip_lib.data.profiles import get_profile
from weclip_lib.data.settings import with_settings
from weclip_lib.storage.files import Unusable, files_below, in_a_line, reading, write_text
from weclip_lib.storage.provenance import ROOT, library_hash, tree_hash
from weclip_lib.studies.parameters import POINTERS, about, declared_parameters

READ_WHOLE = (".csv", ".txt")  # lists are compared by content, others by size and time


def _state(place: Path, out: Path) -> str:
    """Hash what lies at a path, but not below `out`; empty if nothing is there."""
    files = files_below(place) if place.is_dir() else {"": place} if place.exists() else {}
    inside = out != place.resolve() and out.is_relative_to(place.resolve())
    written = f"{out.relative_to(place.resolve()).as_posix()}/" if inside else None
    lines = []
    for name, file in files.items():
        if written and name.startswith(written):
            continue
        try:
            about = file.stat()
            lines.append((name, about.st_size, about.st_mtime_ns))
            if file.suffix.lower() in READ_WHOLE:
                lines[-1] = (name, sha256(file.read_bytes()).hexdigest())
        except OSError as error:
            lines.append((name, in_a_line(error)))
    return sha256(repr(lines).encode()).hexdigest() if lines else ""


def states(notebook: Path, parameters: dict, out: Path) -> dict[str, str]:
    """Hash the files that the parameters, or the profile, name."""
    declared = declared_parameters(notebook)
    chosen = {name: about.default for name, about in declared.items()} | parameters
    places = {name: Path(chosen[name]) for name in POINTERS if chosen.get(name)}
    if (
        chosen.get("data_dir") == ""
        and "profile" in chosen
        and not about(notebook).get("makes_data")
    ):
        changed = with_settings(get_profile(chosen["profile"]), chosen.get("settings", {}))
        places["data_dir"] = changed.default_folder
    return {name: _state(place, out.resolve()) for name, place in places.items()}


def made_by(notebook: Path, parameters: dict) -> str:
    """Hash the code and the parameters."""
    read = sorted(path for name in about(notebook).get("reads", ()) for path in ROOT.glob(name))
    sources = tree_hash(notebook, ROOT / "constraints.txt", *read)
    told = json.dumps([sources, library_hash(), parameters], sort_keys=True)
    return sha256(told.encode()).hexdigest()


def key_of(maker: str, pointed: dict[str, str]) -> str:
    """Hash what makes a run, and what it reads."""
    return sha256(json.dumps([maker, pointed], sort_keys=True).encode()).hexdigest()


def run_key(notebook: Path, parameters: dict, out: Path) -> str:
    """Hash all that the outputs depend on.

    Args:
        out: Folder into which this and similar runs write; it is not hashed.
    """
    return key_of(made_by(notebook, parameters), states(notebook, parameters, out))


@dataclass(frozen=True)
class Record:
    """The record of a finished run, in `.runner/`."""

    key: str  # of `run_key`; empty while files move
    parameters: dict
    files: dict[str, str] = field(default_factory=dict)  # hashes by relative path
    earlier: dict[str, str] = field(default_factory=dict)  # files of earlier runs, still there


def record_file(folder: Path, stem: str) -> Path:
    """Return the path of a run's record."""
    return folder / ".runner" / f"{stem}.json"


def read_record(folder: Path, stem: str) -> Record:
    """Read the record of a notebook's run.

    Raises:
        Unusable: If there is none, or it is damaged.
    """
    path = record_file(folder, stem)
    with reading(path, "run the notebook again"):
        found = Record(**json.loads(path.read_bytes()))
        for part in (found.parameters, found.files, found.earlier):
            if not isinstance(part, dict):
                raise TypeError(f"{part!r} where there have to be names")
        return found


def write_record(folder: Path, stem: str, record: Record) -> None:
    """Write it whole."""
    write_text(record_file(folder, stem), json.dumps(asdict(record), indent=1) + "\n")


def file_hash(path: Path) -> str:
    """Hash a file's content; empty if there is no such file."""
    return sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def is_done(folder: Path, notebook: Path, key: str) -> bool:
    """Whether the same run has finished, and all its files are unchanged."""
    try:
        record = read_record(folder, notebook.stem)
    except Unusable:
        return False
    return record.key == key and all(
        file_hash(folder / name) == digest for name, digest in record.files.items()
    )
