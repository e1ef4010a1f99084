"""Downloads from a local server: resumed, verified, refused; archives that would escape."""

import hashlib
import io
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from weclip_lib import download
from weclip_lib.download import Archive, estimate, extract, fetch

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


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0.0)
    handler = type("Handler", (Server,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        thread = threading.Thread(target=found.serve_forever)
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
    assert len(server.asked) <= 3 and not list(path.parent.glob("*.part"))


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
    assert list(tmp_path.iterdir()) == []


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


def test_what_is_no_archive_and_a_damaged_zip(tmp_path) -> None:
    path = tmp_path / "a.zip"
    path.write_text("no archive")
    with pytest.raises(ValueError, match=r"a\.zip is no tar or zip file"):
        extract(path, tmp_path / "to")
    zip_of(path, **{"a.txt": b"some content"})
    damaged = path.read_bytes().replace(b"some content", b"same content")
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"damaged at a\.txt"):
        download.verify(Archive("http://x/a.zip", len(damaged)), path)


def test_estimate_and_a_small_disk(tmp_path) -> None:
    archive = Archive("http://x/a.zip", 3_000_000_000)
    said = estimate([archive], tmp_path)
    assert "3.0 GB to fetch (about 5 minutes at 10 MB/s), 6.0 GB of disk" in said
    with pytest.raises(ValueError, match="choose another place with --to"):
        estimate([Archive("http://x/a.zip", 10**16)], tmp_path)
