"""Files and folders that appear under their name only when they are whole, and are made once."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary name to write a file or a folder to; it becomes `path` at the end.

    If the block fails, `path` is as it was. What an earlier failure left behind is removed first.
    """
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    yield partial
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(folder: Path) -> None:
    """Make the folder, and write a file without a name into it.

    Raises:
        ValueError: If that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}: choose another") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time make `path`; those that come later wait, and find it made."""
    locks = path.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / path.name):
        yield
