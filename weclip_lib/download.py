"""Fetch VOC 2012, SBD and COCO-2014: resumable, verified, safely unpacked. `make data DATASET=voc`.

Archives or unpacked folders that are there already are taken instead with `--archive`.
"""

import argparse
import errno
import hashlib
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from io import BufferedIOBase
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from weclip_lib.config import get_profile
from weclip_lib.doctor import examine
from weclip_lib.files import check_writable, whole
from weclip_lib.layouts import data_root
from weclip_lib.prepare import prepare_coco, prepare_sbd, prepare_voc
from weclip_lib.repro import ROOT

CHUNK = 1 << 20
TRIES = 5  # of a download that is cut off, each from where it was
WAIT = 1.0  # seconds, doubled with each try
TIMEOUT = 60  # seconds without a byte
SPEED = 10e6  # bytes a second that the estimate assumes


@dataclass(frozen=True)
class Archive:
    """A file on a server. Where no checksum is published, size and a full reading verify it."""

    url: str
    size: int  # bytes
    md5: str = ""
    only: tuple[str, ...] = ()  # of what is in it, what begins so is unpacked; all by default

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


# Checksums: torchvision.datasets (voc.py, sbd.py). Sizes: as the servers tell them.
ARCHIVES = {
    "voc": (
        Archive(
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            1_999_639_040,
            "6cd6e144f989b92b3379bac3b3de84fd",
        ),
    ),
    "sbd": (
        Archive(
            "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/"
            "semantic_contours/benchmark.tgz",
            1_419_539_633,
            "82b4d87ceb2ed10f6038a1cba92111cb",
            tuple(f"benchmark_RELEASE/dataset/{x}" for x in ("cls/", "train.txt", "val.txt")),
        ),
    ),
    "coco": (
        Archive(
            "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
            252_872_794,
            only=("annotations/instances_",),
        ),
        Archive("http://images.cocodataset.org/zips/train2014.zip", 13_510_573_713),
        Archive("http://images.cocodataset.org/zips/val2014.zip", 6_645_013_297),
    ),
}


def fetch(archive: Archive, path: Path) -> None:
    """Download to `path`, going on where an earlier try was cut off; it is verified at the end.

    Raises:
        ValueError: If the server does not give the file, or gives another one.
    """
    if path.exists():
        verify(archive, path)
        return
    partial = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, TRIES + 1):
        there = partial.stat().st_size if partial.exists() else 0
        if there >= archive.size:
            break
        try:
            _continue(archive, partial, there)
        except urllib.error.HTTPError as error:
            raise ValueError(
                f"{archive.url} answers {error.code} ({error.reason}): get the file elsewhere, "
                "and give it with --archive"
            ) from error
        except (OSError, HTTPException) as error:
            if attempt == TRIES or getattr(error, "errno", None) == errno.ENOSPC:
                raise ValueError(
                    f"{archive.url}: {error}; what has come is kept in {partial}: start again "
                    "later, or give the file with --archive"
                ) from error
            time.sleep(WAIT * 2**attempt)
    try:
        verify(archive, partial)
    except ValueError:
        partial.unlink()  # going on from wrong bytes would never come right
        raise
    partial.replace(path)


def _continue(archive: Archive, partial: Path, there: int) -> None:
    """Append what is missing."""
    request = urllib.request.Request(archive.url)
    if there:
        request.add_header("Range", f"bytes={there}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        goes_on = response.status == 206
        bar = tqdm(
            total=archive.size, initial=there if goes_on else 0, desc=archive.name,
            unit="B", unit_scale=True,
        )  # fmt: skip
        with bar, partial.open("ab" if goes_on else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if partial.stat().st_size < archive.size:
        raise ConnectionError("the connection was cut off")


def verify(archive: Archive, path: Path) -> None:
    """Check size, and checksum or else every byte of the archive.

    Raises:
        ValueError: If it is another file.
    """
    size = path.stat().st_size
    if size != archive.size:
        raise ValueError(
            f"{path} has {size:,} bytes, {archive.name} has {archive.size:,}: "
            "remove it and start again, or find out which version it is"
        )
    if archive.md5:
        digest = hashlib.md5(usedforsecurity=False)
        bar = tqdm(total=size, desc=f"verifying {archive.name}", unit="B", unit_scale=True)
        with bar, path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                bar.update(len(chunk))
        if digest.hexdigest() != archive.md5:
            raise ValueError(
                f"{path} has the md5 sum {digest.hexdigest()}, {archive.name} has {archive.md5}: "
                "it is damaged or another file; remove it and start again"
            )
    elif (broken := _first_broken(path)) is not None:
        raise ValueError(f"{path} is damaged at {broken}: remove it and start again")


def _first_broken(path: Path) -> str | None:
    """Name of the first entry of a zip file that cannot be read."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip()
    except zipfile.BadZipFile as error:
        return str(error)


@dataclass(frozen=True)
class _Entry:
    name: str
    size: int
    is_file: bool
    is_plain: bool  # a file or a folder, and no link or device
    handle: tarfile.TarInfo | zipfile.ZipInfo


@contextmanager
def _opened(path: Path) -> Iterator[tuple[list[_Entry], object]]:
    """Entries of a tar or zip file, and the open file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            yield (
                [
                    _Entry(
                        i.filename, i.file_size, not i.is_dir(), (i.external_attr >> 28) != 0xA, i
                    )
                    for i in file.infolist()
                ],
                file,
            )
    else:
        try:
            with tarfile.open(path) as file:
                yield (
                    [
                        _Entry(m.name, m.size, m.isfile(), m.isfile() or m.isdir(), m)
                        for m in file.getmembers()
                    ],
                    file,
                )
        except tarfile.ReadError as error:
            raise ValueError(f"{path} is no tar or zip file ({error})") from error


def _open_entry(file: object, entry: _Entry) -> BufferedIOBase:
    if isinstance(file, zipfile.ZipFile):
        return file.open(entry.handle)
    return file.extractfile(entry.handle)


def extract(path: Path, folder: Path, *, only: Sequence[str] = ()) -> None:
    """Unpack a tar or zip file; files that are there in full size are kept.

    Args:
        only: Beginnings of names; all by default.

    Raises:
        ValueError: If an entry lies outside of `folder` or is a link; nothing is unpacked then.
    """
    with _opened(path) as (entries, file):
        for entry in entries:
            parts = PurePosixPath(entry.name.replace("\\", "/"))
            if parts.is_absolute() or ".." in parts.parts or ":" in entry.name:
                raise ValueError(f"{path} holds {entry.name!r}, outside its folder: not unpacked")
            if not entry.is_plain:
                raise ValueError(f"{path} holds {entry.name!r}, which is a link: not unpacked")
        wanted = [
            entry
            for entry in entries
            if entry.is_file and (not only or entry.name.removeprefix("./").startswith(tuple(only)))
        ]
        for entry in tqdm(wanted, desc=f"unpacking {path.name}", unit="file"):
            target = folder / entry.name
            if target.exists() and target.stat().st_size == entry.size:
                continue
            with (
                whole(target) as partial,
                _open_entry(file, entry) as source,
                partial.open("wb") as written,
            ):
                shutil.copyfileobj(source, written, CHUNK)


def estimate(archives: Sequence[Archive], folder: Path) -> str:
    """What fetching will take, in words.

    Raises:
        ValueError: If the disk has not enough room.
    """
    missing = [a for a in archives if not (folder / a.name).exists()]
    size = sum(a.size for a in missing)
    needed = size + sum(a.size for a in archives)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free, and archives and pictures need "
            f"{needed / 1e9:.1f} GB: choose another place with --to"
        )
    return (
        f"{size / 1e9:.1f} GB to fetch (about {size / SPEED / 60:.0f} minutes at "
        f"{SPEED / 1e6:.0f} MB/s), {needed / 1e9:.1f} GB of disk; {free / 1e9:.1f} GB are free"
    )


def obtain(archives: Sequence[Archive], folder: Path, given: Sequence[Path]) -> None:
    """Fetch and unpack into `folder`, or unpack given archives there.

    Raises:
        ValueError: If something cannot be fetched, verified or unpacked.
    """
    if given:
        wanted = {archive.name: archive.only for archive in archives}
        for path in given:
            if not path.exists():
                raise ValueError(f"{path} is not there: give an archive or a folder")
            extract(path, folder, only=wanted.get(path.name, ()))
        return
    tqdm.write(estimate(archives, folder), file=sys.stderr)
    for archive in archives:
        fetch(archive, folder / archive.name)
        extract(folder / archive.name, folder, only=archive.only)
    tqdm.write(f"the archives in {folder} can be removed", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch a data set, make it readable, and say what is there."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("dataset", choices=ARCHIVES)
    parser.add_argument("--to", type=Path, help="folder; default data/voc or data/coco")
    parser.add_argument(
        "--archive",
        type=Path,
        action="append",
        default=[],
        help="an archive that is there already, or the folder that it was unpacked to; repeatable",
    )
    parser.add_argument("--labels", choices=("xml", "masks"), default="xml", help="of VOC")
    chosen = parser.parse_args(arguments)
    profile = get_profile("coco" if chosen.dataset == "coco" else "voc")
    folder = chosen.to or ROOT / "data" / profile.name
    try:
        folders = [path for path in chosen.archive if path.is_dir()]
        if chosen.dataset != "sbd" and folders:
            folder = folders[0]
        check_writable(folder)
        if not folders:
            obtain(ARCHIVES[chosen.dataset], folder, chosen.archive)
        if chosen.dataset == "voc":
            prepare_voc(folder, labels=chosen.labels)
        elif chosen.dataset == "sbd":
            prepare_sbd(folders[0] if folders else folder, folder)
        else:
            prepare_coco(folder)
        report = examine(data_root(folder), profile.labels)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    report.tell()


if __name__ == "__main__":
    main()
