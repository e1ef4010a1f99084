"""This module reads files or refuses them by name, and writes them whole or not at all."""

import errno
import os
import platform
import re
import secrets
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

HOST = "".join(c if c.isalnum() else "-" for c in platform.node())[:40] or "here"
NO_SPACE = re.compile(r"Errno 28\b|os error 28\b")
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")  # left by macOS and by network drives beside the user's


class Unusable(ValueError):
    """A file cannot be used; the message names it and says what to do."""


@contextmanager
def reading(path: Path, remedy: str = "replace or remove it") -> Iterator[None]:
    """Turn every error in reading one file of the user into `Unusable`.

    Args:
        remedy: What the user can do about a file that cannot be decoded.

    Raises:
        Unusable: If there is no such path, it is no file, or the block fails.
    """
    try:
        if not path.exists():
            raise Unusable(f"{path} is not there")
        if not path.is_file():  # reading a pipe would wait for ever
            raise Unusable(f"{path} is no file")
        yield
    except Unusable:
        raise
    except Exception as error:  # decoders raise anything on damaged files, TypeError included
        raise Unusable(f"{path} cannot be read ({in_a_line(error)}): {remedy}") from error


def in_a_line(error: BaseException) -> str:
    """Return what an error says, on one line."""
    said = getattr(error, "strerror", None) or str(error)
    return " ".join(said.split())[:200] or type(error).__name__


def files_below(folder: Path) -> dict[str, Path]:
    """Return all files below a folder, by relative path with `/`, in the order of their names.

    It follows links to folders, but never in a circle. It leaves out hidden files. Names come in
    Unicode's composed form (NFC), whichever form the file system keeps. A missing folder has none.

    Raises:
        Unusable: If a folder cannot be read, or two names differ in their Unicode form alone.
    """

    def refuse(error: OSError) -> None:
        raise Unusable(f"{error.filename} cannot be read ({in_a_line(error)})") from error

    if not folder.exists():
        return {}
    found = {}
    above = {str(folder): frozenset([os.path.realpath(folder)])}
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        inside = []
        for name in folders:
            path = os.path.join(where, name)  # noqa: PTH118
            real = os.path.realpath(path)
            if not name.startswith(".") and name not in SYSTEM_FOLDERS and real not in above[where]:
                above[path] = above[where] | {real}
                inside.append(name)
        folders[:] = inside
        below = Path(where).relative_to(folder).as_posix()
        for name in names:
            if not name.startswith("."):
                shown = name if below == "." else f"{below}/{name}"
                other = found.setdefault(unicodedata.normalize("NFC", shown), Path(where, name))
                if other != Path(where, name):
                    raise Unusable(f"{folder} holds {shown!r} in two Unicode forms: rename one")
    return dict(sorted(found.items()))


def _sync(path: Path) -> None:
    """Write a file, or a folder with its content, from memory to the disk."""
    if path.is_dir():
        for inside in path.iterdir():
            _sync(inside)
        if os.name == "nt":  # Windows has no such call for folders
            return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@lru_cache(maxsize=1024)  # once a folder: a search among many files takes long
def _remove_left(folder: Path) -> None:
    """Remove the half-written files of killed processes of this machine from a folder."""
    for path in folder.glob(f".*.{HOST}-*.partial"):
        number = path.name.split(".")[-2].split("-")[-2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            _remove(path)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary name to write a file or a folder to; it becomes `path` at the end.

    If the block fails, `path` stays as it was. Every writer has its own temporary name; the last
    one to end gives `path` its content, whole. The content reaches the disk before the name does:
    a power cut cannot leave an empty file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(path.parent)
    own = f"{HOST}-{os.getpid()}-{secrets.token_hex(4)}"
    short = os.fsencode(path.name)[:80].decode(errors="ignore")  # a name has 255 bytes at most
    partial = path.with_name(f".{short}.{own}.partial")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    except BaseException as error:
        _remove(partial)
        if NO_SPACE.search(str(error)):  # libraries do not say which file
            raise OSError(errno.ENOSPC, "No space left on device: make room", str(path)) from error
        raise
    if os.name != "nt":
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def is_there(path: Path) -> bool:
    """Return whether something has that name, even a link that leads nowhere."""
    return path.exists() or path.is_symlink()


def nearest_there(path: Path) -> Path:
    """Return the path, or the nearest folder above it, that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if is_there(p))


def check_writable(folder: Path) -> None:
    """Make the folder, and try to write a temporary file in it.

    Raises:
        ValueError: If the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}: choose another") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time make `path`; later ones wait, and find it made."""
    locks = path.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / path.name):
        yield


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Let one process at a time write `path`; refuse a second one. A killed process holds no lock.

    Raises:
        ValueError: If another process writes there; the message names it.
    """
    locks = path.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(locks / f"{path.name}.run"), locks / f"{path.name}.holder"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = holder.read_text() if holder.exists() else "another process"
        raise ValueError(f"{who} writes {path}: wait for its end, or choose another") from error
    try:
        holder.write_text(f"process {os.getpid()} on {HOST}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
