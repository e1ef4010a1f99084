"""Fetch, verify and safely unpack VOC 2012, SBD and COCO-2014, as `make data DATASET=voc` does.

A download that was cut off goes on. `--archive` takes an archive or unpacked folder instead.
"""

import errno
import hashlib
import shutil
import sys
import tarfile
import time
import unicodedata
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from weclip_lib.commands import Download, Prepare
from weclip_lib.data.doctor import examine
from weclip_lib.data.layouts import data_root
from weclip_lib.data.prepare import prepare_coco, prepare_sbd, prepare_voc
from weclip_lib.data.profiles import Profile, get_profile
from weclip_lib.storage.files import (
    Unusable,
    check_writable,
    is_there,
    nearest_there,
    only_one,
    reading,
    whole,
)

CHUNK = 1 << 20
TRIES = 5  # of a download; each goes on where the last was cut off
WAIT = 1.0  # seconds, doubled with each try
TIMEOUT = 60  # seconds without a byte
SPEED = 10e6  # bytes a second that the estimate assumes
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
AGAIN = "get the archive again"
BY_HAND = "nothing was unpacked; unpack it yourself, and give the folder with --archive"


@dataclass(frozen=True)
class Archive:
    """A file on a server. If no checksum is published, size and a full reading verify it."""

    url: str
    size: int  # bytes
    md5: str = ""
    only: tuple[str, ...] = ()  # only names that begin so are unpacked; all by default

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


# Checksums: torchvision.datasets (voc.py, sbd.py). Sizes: the servers' answers.
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
    """Download to `path` and verify it; go on where an earlier try was cut off.

    Raises:
        ValueError: If the server does not give the file, or gives another one, or if another
            process already fetches it.
    """
    partial = path.with_name(path.name + ".part")
    with only_one(partial):
        if path.exists():
            verify(archive, path)
            return
        if partial.exists() and partial.stat().st_size > archive.size:
            partial.unlink()
        _fetch_part(archive, partial)
        try:
            verify(archive, partial, "it was removed: start again, or give the file with --archive")
        except ValueError:
            partial.unlink()  # more bytes after wrong ones would not help
            raise
        partial.replace(path)


def _fetch_part(archive: Archive, partial: Path) -> None:
    """Fetch all that is missing, in several tries."""
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
            if attempt == TRIES or getattr(error, "errno", None) in OF_THE_DISK:
                raise ValueError(
                    f"{archive.url}: {error}; what has come is kept in {partial}: start again "
                    "later, or give the file with --archive"
                ) from error
            time.sleep(WAIT * 2**attempt)


def _continue(archive: Archive, partial: Path, there: int) -> None:
    """Append what is missing, or start again if the server cannot go on."""
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
                if file.tell() > archive.size:  # another file, perhaps without an end
                    break
    if partial.stat().st_size < archive.size:
        raise ConnectionError("the connection was cut off")


def verify(archive: Archive, path: Path, remedy: str = "remove it and start again") -> None:
    """Check the size, and then the checksum or, without one, every byte of the archive.

    Args:
        remedy: What the user can do if it is another file.

    Raises:
        ValueError: If it is another file.
    """
    size = path.stat().st_size
    if size != archive.size:
        raise ValueError(
            f"{path} has {size:,} bytes, {archive.name} has {archive.size:,}: it is not whole or "
            f"of another version; {remedy}"
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
                f"it is damaged or another file; {remedy}"
            )
        return
    with reading(path, remedy), zipfile.ZipFile(path) as file:
        broken = file.testzip()
    if broken is not None:
        raise ValueError(f"{path} is damaged at {broken}: {remedy}")


@dataclass(frozen=True)
class _Entry:
    name: str
    size: int
    is_file: bool
    is_plain: bool  # a file or a folder, no link or device
    handle: tarfile.TarInfo | zipfile.ZipInfo


@contextmanager
def _opened(path: Path) -> Iterator[tuple[list[_Entry], object]]:
    """Give the entries of a tar or zip file, and the open file.

    Raises:
        Unusable: If it is neither a tar nor a zip file, cut off, or damaged.
    """
    with ExitStack() as stack:
        with reading(path, AGAIN):
            if zipfile.is_zipfile(path):
                file = stack.enter_context(zipfile.ZipFile(path))
                entries = [
                    _Entry(
                        i.filename,
                        i.file_size,
                        not i.filename.endswith(("/", "\\")),
                        (i.external_attr >> 28) != 0xA,
                        i,
                    )
                    for i in file.infolist()
                ]
            else:
                try:
                    file = stack.enter_context(tarfile.open(path))
                except tarfile.ReadError as error:
                    raise Unusable(
                        f"{path} is no tar or zip file, or its beginning or end is missing: {AGAIN}"
                    ) from error
                entries = [
                    _Entry(m.name, m.size, m.isfile(), m.isfile() or m.isdir(), m)
                    for m in file.getmembers()
                ]
                _check_end(path, file)
        yield entries, file


def _check_end(path: Path, file: tarfile.TarFile) -> None:
    """Check that a tar file ends with zeros alone; tarfile stops silently at a damaged block.

    Raises:
        Unusable: If it is cut off between two entries, or damaged where an entry begins.
    """
    file.fileobj.seek(file.offset)
    end = file.fileobj.read(tarfile.BLOCKSIZE)
    chunks = iter(lambda: file.fileobj.read(CHUNK), b"")
    if len(end) < tarfile.BLOCKSIZE or any(end) or any(chunk.strip(b"\0") for chunk in chunks):
        last = (file.getnames() or ["its beginning"])[-1]
        raise Unusable(f"{path} is cut off or damaged after {last!r}: {AGAIN}")


def _content(path: Path, file: object, entry: _Entry) -> Iterator[bytes]:
    """Yield what an entry holds, in chunks.

    Raises:
        Unusable: If it is damaged, or its length is not what the archive says.
    """
    with reading(path, f"it is damaged at {entry.name!r}; {AGAIN}"):
        is_zip = isinstance(file, zipfile.ZipFile)
        length = 0
        with file.open(entry.handle) if is_zip else file.extractfile(entry.handle) as source:
            while length <= entry.size and (chunk := source.read(CHUNK)):
                length += len(chunk)
                yield chunk
        if length != entry.size:
            raise Unusable(f"{path} is damaged at {entry.name!r}, which has another size: {AGAIN}")


def _places(path: Path, entries: Sequence[_Entry], only: Sequence[str]) -> dict[str, _Entry]:
    """Return the wanted files, by their path in the folder where they will be unpacked.

    Raises:
        Unusable: If no file is wanted, or an entry leaves the folder, is a link, or meets another.
    """
    found: dict[str, _Entry] = {}
    above: set[str] = set()
    for entry in entries:
        place = PurePosixPath(entry.name.replace("\\", "/"))
        odd = ":" in entry.name or any(ord(sign) < 32 for sign in entry.name)
        if odd or place.is_absolute() or ".." in place.parts or (entry.is_file and not place.parts):
            raise Unusable(f"{path} holds {entry.name!r}, outside its folder: {BY_HAND}")
        if not entry.is_plain:
            raise Unusable(f"{path} holds {entry.name!r}, which is a link: {BY_HAND}")
        if entry.is_file and (not only or str(place).startswith(tuple(only))):
            if str(place) in found:
                raise Unusable(f"{path} holds {entry.name!r} twice: {BY_HAND}")
            found[str(place)] = entry
            above |= {_alike(str(parent)) for parent in place.parents}
    names: dict[str, str] = {}
    for place in found:
        other = names.setdefault(_alike(place), place)
        if other != place or _alike(place) in above:
            meets = repr(other) if other != place else "a folder of that name"
            raise Unusable(f"{path} holds {place!r} and {meets}, which are one: {BY_HAND}")
    if not found:
        what = " or ".join(only) or "at all"
        raise Unusable(f"{path} holds no file {what}: give another archive")
    return found


def _alike(name: str) -> str:
    """Return one key for all names that some file systems take for one."""
    return unicodedata.normalize("NFC", name).casefold()


def extract(path: Path, folder: Path, *, only: Sequence[str] = ()) -> None:
    """Unpack a tar or zip file; keep files that are there in full size, and replace none.

    Args:
        only: Beginnings of the wanted names; all by default.

    Raises:
        ValueError: If an entry lies outside of `folder`, is a link, or would take the place of
            another file, or if the disk lacks room; then nothing is unpacked. Also if the archive
            is damaged; then each file that was already unpacked is whole.
    """
    with _opened(path) as (entries, file):
        missing, clashes = {}, []
        for place, entry in _places(path, entries, only).items():
            target = folder / place
            if not is_there(target):
                missing[target] = entry
            elif not target.is_file() or target.stat().st_size != entry.size:
                clashes.append(target)
        parents = {nearest_there(target.parent) for target in missing}
        clashes += sorted(parent for parent in parents if not parent.is_dir())
        if clashes:
            raise ValueError(
                f"{clashes[0]} is there already, and {path} holds another of that name "
                f"({len(clashes)} such): nothing was unpacked; move it away, choose another place "
                f"with --to, or use what is unpacked with --archive {folder}"
            )
        _check_room(folder, sum(entry.size for entry in missing.values()), f"what is in {path}")
        for target, entry in tqdm(missing.items(), desc=f"unpacking {path.name}", unit="file"):
            with whole(target) as partial, partial.open("wb") as written:
                for chunk in _content(path, file, entry):
                    written.write(chunk)


def _check_room(folder: Path, needed: int, what: str) -> int:
    """Return how many bytes are free.

    Raises:
        ValueError: If they are fewer than needed.
    """
    free = shutil.disk_usage(nearest_there(folder)).free
    if needed > free:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free, and {what} needs {needed / 1e9:.1f} GB: "
            "choose another place with --to"
        )
    return free


def estimate(archives: Sequence[Archive], folder: Path) -> str:
    """Say how much time and disk the download needs.

    Raises:
        ValueError: If the disk has not enough room.
    """
    missing = [a for a in archives if not (folder / a.name).exists()]
    parts = [folder / f"{a.name}.part" for a in missing]
    size = sum(a.size for a in missing)
    come = min(size, sum(part.stat().st_size for part in parts if part.exists()))
    needed = 2 * size - come  # `extract` counts what is in archives that are there
    free = _check_room(folder, needed, "all of it, packed and unpacked,")
    return (
        f"{(size - come) / 1e9:.1f} GB to fetch (about {(size - come) / SPEED / 60:.0f} minutes at "
        f"{SPEED / 1e6:.0f} MB/s), {needed / 1e9:.1f} GB of disk; {free / 1e9:.1f} GB are free"
    )


def obtain(archives: Sequence[Archive], folder: Path, given: Sequence[Path]) -> None:
    """Fetch archives and unpack them into `folder`, or unpack given ones there.

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


def run(chosen: Download) -> None:
    """Run `weclip download`.

    Raises:
        ValueError: If something cannot be fetched, verified, unpacked or read.
    """
    folder = chosen.to or _profile(chosen.dataset).default_folder
    folders = [path for path in chosen.archive if path.is_dir()]
    if folders and len(chosen.archive) > 1:
        raise ValueError(f"{folders[0]} is a folder: give it alone, or give archives alone")
    elsewhere = folders and chosen.to and chosen.to.resolve() != folders[0].resolve()
    if elsewhere and chosen.dataset != "sbd":
        raise ValueError(f"{folders[0]} is used where it lies: leave out --to {chosen.to}")
    if not folders:
        check_writable(folder)
        obtain(ARCHIVES[chosen.dataset], folder, chosen.archive)
    unpacked = folders[0] if folders else folder
    prepare(Prepare(chosen.dataset, unpacked, voc=folder, labels=chosen.labels))


def prepare(chosen: Prepare) -> None:
    """Run `weclip prepare`.

    Raises:
        ValueError: If the folder cannot be written, or its data set cannot be read.
    """
    folder = chosen.folder
    if chosen.dataset == "sbd":
        folder = chosen.voc or _profile("sbd").default_folder
    check_writable(folder)
    if chosen.dataset == "voc":
        prepare_voc(folder, labels=chosen.labels)
    elif chosen.dataset == "sbd":
        prepare_sbd(chosen.folder, folder)
    else:
        prepare_coco(folder)
    examine(data_root(folder), _profile(chosen.dataset).labels).tell()


def _profile(dataset: str) -> Profile:
    return get_profile("coco" if dataset == "coco" else "voc")
