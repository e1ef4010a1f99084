"""Downloads from a local server: resumed, verified, refused; archives that would escape."""

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from weclip_lib.__main__ import main as weclip
from weclip_lib.data import download
from weclip_lib.data.download import Archive, estimate, extract, fetch
from weclip_lib.storage.files import Unusable, only_one
from weclip_lib.storage.provenance import ROOT

CONTENT = np.random.default_rng(0).bytes(5_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Gives CONTENT; cuts the first `cuts` answers short."""

    cuts, asked, ranges = 0, [], True

    def do_GET(self) -> None:
        self.asked.append(self.headers.get("Range"))
        if self.path != "/file.bin":
            self.send_error(404)
            return
        start = 0
        if self.ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        cut = len(self.asked) <= self.cuts
        self.wfile.write(CONTENT[start : start + 2_000_000 if cut else None])

    def log_message(self, *arguments) -> None:
        pass


def files_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".locks"}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0.0)
    handler = type("Handler", (Server,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,))
        thread.start()
        handler.url = f"http://127.0.0.1:{found.server_port}/file.bin"
        yield handler
        found.shutdown()
        thread.join()


def test_goes_on_where_it_was_cut(server, tmp_path) -> None:
    server.cuts = 2
    path = tmp_path / "to" / "file.bin"
    fetch(Archive(server.url, len(CONTENT), MD5), path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=2000000-", "bytes=4000000-"][: len(server.asked)]
    assert len(server.asked) >= 2
    fetch(Archive(server.url, len(CONTENT), MD5), path)  # is there: nothing is asked
    assert len(server.asked) <= 3 and files_in(path.parent) == {"file.bin"}


def test_an_earlier_part_is_used_and_a_server_without_ranges_starts_over(server, tmp_path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:123])
    fetch(Archive(server.url, len(CONTENT), MD5), tmp_path / "file.bin")
    assert server.asked == ["bytes=123-"]
    server.ranges = False
    (tmp_path / "again.part").write_bytes(CONTENT[:123])
    fetch(Archive(server.url, len(CONTENT), MD5), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == CONTENT


def test_too_many_cuts_keep_what_has_come(server, tmp_path, monkeypatch) -> None:
    server.cuts = 99
    monkeypatch.setattr(download, "TRIES", 2)
    with pytest.raises(ValueError, match=r"what has come is kept in .*file\.bin\.part"):
        fetch(Archive(server.url, len(CONTENT), MD5), tmp_path / "file.bin")
    assert (tmp_path / "file.bin.part").stat().st_size == 4_000_000
    assert not (tmp_path / "file.bin").exists()


def test_wrong_bytes_and_404(server, tmp_path) -> None:
    with pytest.raises(ValueError, match=rf"has the md5 sum {MD5}, file\.bin has 0000"):
        fetch(Archive(server.url, len(CONTENT), "0000"), tmp_path / "file.bin")
    with pytest.raises(ValueError, match=r"has 5,000,000 bytes, file\.bin has 4,999,999"):
        fetch(Archive(server.url, len(CONTENT) - 1, MD5), tmp_path / "file.bin")
    with pytest.raises(ValueError, match=r"answers 404 .*give it with --archive"):
        fetch(Archive(server.url + "x", 1), tmp_path / "gone")
    assert files_in(tmp_path) == set()


def test_a_part_that_is_too_long_and_a_server_without_end(server, tmp_path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"of another version")
    fetch(Archive(server.url, len(CONTENT), MD5), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT and server.asked == [None]
    with pytest.raises(ValueError, match=r"has 1,048,576 bytes.*it was removed: start again"):
        fetch(Archive(server.url, 1000), tmp_path / "short.bin")  # not all five megabytes
    (tmp_path / "mine.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"has 4 bytes.*remove it and start again"):
        fetch(Archive(server.url, len(CONTENT), MD5), tmp_path / "mine.bin")
    assert files_in(tmp_path) == {"file.bin", "mine.bin"}


def test_a_second_download_to_one_place_is_refused(server, tmp_path) -> None:
    path = tmp_path / "file.bin"
    part = tmp_path / "file.bin.part"
    part.write_bytes(CONTENT[:9])
    with (
        only_one(part),
        pytest.raises(ValueError, match=rf"process {os.getpid()} on .* writes .*file\.bin\.part"),
    ):
        fetch(Archive(server.url, len(CONTENT), MD5), path)
    assert part.read_bytes() == CONTENT[:9] and server.asked == []
    fetch(Archive(server.url, len(CONTENT), MD5), path)
    assert path.read_bytes() == CONTENT


def tar_of(path, **members):
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                about.size = len(content)
                file.addfile(about, io.BytesIO(content))
            else:
                about.type, about.linkname = tarfile.SYMTYPE, content
                file.addfile(about)
    return path


def zip_of(path, **members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            about = zipfile.ZipInfo(name)
            if isinstance(content, str):
                about.create_system, about.external_attr = 3, 0o120777 << 16
            file.writestr(about, content)
    return path


@pytest.mark.parametrize("pack", [tar_of, zip_of])
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"a", "../b.txt": b"b"}, r"'\.\./b\.txt', outside its folder"),
        ({"a.txt": b"a", "x/../../b.txt": b"b"}, "outside its folder"),
        ({"a.txt": b"a", "/tmp/weclip-b.txt": b"b"}, "outside its folder"),
        ({"a.txt": b"a", "b": "/etc"}, "'b', which is a link"),
        ({"a.txt": b"a", "b\\..\\..\\c.txt": b"b"}, "outside its folder"),
        ({"a.txt": b"a", "C:b.txt": b"b"}, "outside its folder"),
        ({"a.txt": b"a", "b\n.txt": b"b"}, "outside its folder"),
        ({"a.txt": b"a", "A.TXT": b"b"}, "'A.TXT' and 'a.txt', which are one"),
        ({"\u00e9": b"a", "e\u0301": b"b"}, "which are one"),
        ({"a.txt": b"a", "./a.txt": b"b"}, "'./a.txt' twice"),
        ({"a/b": b"a", "A": b"b"}, "'A' and a folder of that name"),
        ({}, "holds no file"),
    ],
)
def test_archives_that_would_escape_are_not_unpacked(tmp_path, pack, members, message) -> None:
    path = pack(tmp_path / "archive", **members)
    with pytest.raises(ValueError, match=message):
        extract(path, tmp_path / "to")
    assert not (tmp_path / "to").exists() and not (tmp_path / "b.txt").exists()


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_unpacks_what_is_wanted_and_keeps_what_is_there(tmp_path, pack) -> None:
    path = pack(tmp_path / "archive", **{"x/a.txt": b"aaa", "x/b.txt": b"b", "y.txt": b"y"})
    (tmp_path / "to" / "x").mkdir(parents=True)
    (tmp_path / "to" / "x" / "a.txt").write_bytes(b"mmm")
    extract(path, tmp_path / "to", only=("x/",))
    assert (tmp_path / "to/x/a.txt").read_bytes() == b"mmm"
    assert (tmp_path / "to/x/b.txt").read_bytes() == b"b"
    assert not (tmp_path / "to/y.txt").exists()


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_no_file_of_the_user_is_replaced(tmp_path, pack) -> None:
    path = pack(tmp_path / "archive", **{"a.txt": b"a", "x/b.txt": b"bb", "x/c/d.txt": b"d"})
    to = tmp_path / "to"
    (to / "x").mkdir(parents=True)
    (to / "x" / "b.txt").write_bytes(b"mine")
    (to / "x" / "c").write_bytes(b"mine")
    for name in ("b.txt", "c"):
        with pytest.raises(ValueError, match=rf"{name} is there already, and .*move it away"):
            extract(path, to)
        assert (to / "x" / name).read_bytes() == b"mine" and not (to / "a.txt").exists()
        (to / "x" / name).rename(tmp_path / name)  # the remedy
    (to / "a.txt").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"a\.txt is there already"):
        extract(path, to)
    (to / "a.txt").unlink()
    extract(path, to)
    assert (to / "x/c/d.txt").read_bytes() == b"d" and (to / "a.txt").read_bytes() == b"a"


NOISE = np.random.default_rng(1).bytes(30_000)  # cannot be packed
MEMBERS = {"a.txt": b"aaa", "x/b.bin": NOISE, "x/c.txt": b"c" * 2000}


def cut(content: bytes, at: int) -> bytes:
    return content[:at]


def zeroed(content: bytes, at: int) -> bytes:
    return content[:at] + bytes(64) + content[at + 64 :]


@pytest.mark.parametrize("harm", [cut, zeroed])
@pytest.mark.parametrize("at", [0, 300, 1100, 20_000, -2600, -40])
@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
def test_a_damaged_archive_is_named_and_nothing_is_half_unpacked(tmp_path, kind, at, harm) -> None:
    path = tmp_path / f"archive.{kind}"
    if kind == "zip":
        zip_of(path, **MEMBERS)
    else:
        tar_of(path, **MEMBERS)
    content = path.read_bytes()
    if kind == "tgz":
        content = gzip.compress(content)
    path.write_bytes(harm(content, at % len(content)))
    to = tmp_path / "to"
    try:
        extract(path, to)
    except Unusable as error:
        assert f"{path} " in str(error) and "get the archive again" in str(error)
        assert "\n" not in str(error)
    else:  # of a tar file, other data cannot be told, and padding at its end may be missing
        assert kind == "tar" and (harm is zeroed or at < 0)
    there = {p.relative_to(to).as_posix(): p for p in to.rglob("*") if p.is_file()}
    for name, found in there.items():
        assert len(found.read_bytes()) == len(MEMBERS[name])
        assert kind == "tar" or found.read_bytes() == MEMBERS[name]


def test_a_tar_file_that_ends_too_early_or_in_its_middle(tmp_path) -> None:
    path = tar_of(tmp_path / "a.tar", **MEMBERS)
    content = path.read_bytes()
    second = content.index(b"x/b.bin")
    for damaged in (content[:second], content[:second] + bytes(100) + content[second + 100 :]):
        path.write_bytes(damaged)  # tarfile would take both for the end
        with pytest.raises(Unusable, match=r"a\.tar is cut off or damaged after 'a\.txt': get the"):
            extract(path, tmp_path / "to")
        assert not (tmp_path / "to").exists()


def test_a_zip_that_unpacks_to_more_than_it_says(tmp_path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.txt", bytes(10_000_000))
        file.filelist[0].file_size = 1000
    with pytest.raises(Unusable, match=r"a\.zip cannot be read .*damaged at 'a\.txt'"):
        extract(path, tmp_path / "to")
    assert not list((tmp_path / "to").glob("*"))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", b"short")
        file.filelist[0].file_size = 10**15
    with pytest.raises(ValueError, match=r"what is in .*a\.zip needs 1000000\.0 GB"):
        extract(path, tmp_path / "to")


def test_what_is_no_archive_and_a_damaged_zip(tmp_path) -> None:
    path = tmp_path / "a.zip"
    path.write_text("no archive")
    with pytest.raises(ValueError, match=r"a\.zip is no tar or zip file"):
        extract(path, tmp_path / "to")
    zip_of(path, **{"a.txt": b"some content"})
    content = path.read_bytes()
    archive = Archive("http://x/a.zip", len(content))
    path.write_bytes(content.replace(b"some content", b"same content"))
    with pytest.raises(ValueError, match=r"damaged at a\.txt: remove it and start again"):
        download.verify(archive, path)
    path.write_bytes(content[:-30] + bytes(30))
    with pytest.raises(ValueError, match=r"a\.zip cannot be read .*: remove it and start again"):
        download.verify(archive, path)
    with pytest.raises(
        ValueError, match=r"a\.zip holds no file annotations/: give another archive"
    ):
        path.write_bytes(content)
        extract(path, tmp_path / "to", only=("annotations/",))


def test_estimate_and_a_small_disk(tmp_path) -> None:
    archive = Archive("http://x/a.zip", 3_000_000_000)
    said = estimate([archive], tmp_path)
    assert "3.0 GB to fetch (about 5 minutes at 10 MB/s), 6.0 GB of disk" in said
    with pytest.raises(ValueError, match="choose another place with --to"):
        estimate([Archive("http://x/a.zip", 10**16)], tmp_path)
    (tmp_path / "a.zip.part").write_bytes(bytes(1_000_000))
    assert "0.0 GB to fetch" in estimate([Archive("http://x/a.zip", 1_000_001)], tmp_path)
    (tmp_path / "b.zip").touch()  # its content is counted when it is unpacked
    assert "0.0 GB of disk" in estimate([Archive("http://x/b.zip", 10**16)], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "{0}/file"], "{0}/file cannot be written"),
        (["--to", "{0}/file/below"], "{0}/file/below cannot be written"),
        (["--to", "{0}/to", "--archive", "{0}/file"], "{0}/file is no tar or zip file"),
        (["--to", "{0}/to", "--archive", "{0}/none"], "{0}/none is not there"),
        (["--archive", "{0}/one"], "{0}/one has no JPEGImages"),
        (["--archive", "{0}/one", "--archive", "{0}/file"], "{0}/one is a folder: give it alone"),
        (["--to", "{0}/to", "--archive", "{0}/one"], "{0}/one is used where it lies: leave out"),
    ],
)
def test_what_is_given_is_used_or_refused(tmp_path, arguments, said) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "one").mkdir()
    with pytest.raises(SystemExit) as caught:
        weclip(["download", "voc", *(text.format(tmp_path) for text in arguments)])
    assert str(caught.value).startswith(f"error: {said.format(tmp_path)}")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_command_ends_with_one_line_and_a_status(tmp_path) -> None:
    path = tar_of(tmp_path / "a.tar", **MEMBERS)
    path.write_bytes(path.read_bytes()[:9000])
    line = [
        sys.executable,
        "-m",
        "weclip_lib",
        "download",
        "voc",
        "--archive",
        path,
        "--to",
        tmp_path,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {path} cannot be read")
