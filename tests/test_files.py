"""Files appear whole or not at all, and one run at a time owns a folder."""

import os
import signal
import subprocess
import sys
import time

import pytest

from weclip_lib.storage import files
from weclip_lib.storage.files import Unusable, files_below, only_one, reading, whole, write_text


def left(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "partial" in path.name)


def test_two_writers_of_one_path(tmp_path) -> None:
    """Both are whole; the last one's stays."""
    path = tmp_path / "table.csv"
    with whole(path) as first:
        first.write_text("first, half")
        with whole(path) as second:
            assert second != first
            second.write_text("second")
        first.write_text("first, whole")
    assert path.read_text() == "first, whole" and left(tmp_path) == []


@pytest.mark.parametrize("fault", [OSError("No space left"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, fault) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(type(fault)), whole(tmp_path / "a.txt") as partial:
        partial.write_text("new, ha")
        raise fault
    with pytest.raises(type(fault)), whole(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "inside").write_text("ha")
        raise fault
    assert (tmp_path / "a.txt").read_text() == "old" and left(tmp_path) == []
    assert not (tmp_path / "folder").exists()


def test_what_a_killed_process_left_is_removed_and_others_work_is_not(tmp_path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = tmp_path / f".a.txt.{files.HOST}-{gone.pid}-1234abcd.partial"
    dead.mkdir()
    alive = tmp_path / f".a.txt.{files.HOST}-{os.getppid()}-1234abcd.partial"
    elsewhere = tmp_path / f".a.txt.other-{gone.pid}-1234abcd.partial"  # of another machine
    for path in (alive, elsewhere):
        path.write_text("x")
    write_text(tmp_path / "a.txt", "new")
    assert left(tmp_path) == sorted([alive.name, elsewhere.name])


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch) -> None:
    order = []
    sync, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("sync"), sync(handle)))
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda *paths: (order.append("name"), replace(*paths))
    )
    write_text(tmp_path / "a.txt", "new")
    assert order == ["sync", "name", "sync"]  # content, name, folder


def test_a_full_disk_names_the_file(tmp_path) -> None:
    """Also if a library tells it in words of its own."""
    for error in (OSError(28, "No space left on device"), RuntimeError("IO: (os error 28)")):
        with (
            pytest.raises(OSError, match=r"No space left on device: make room.*a\.txt"),
            whole(tmp_path / "a.txt"),
        ):
            raise error
    assert not list(tmp_path.iterdir())


HOLD = """
import sys, time
from pathlib import Path
from weclip_lib.storage.files import only_one
with only_one(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path) -> None:
    path = tmp_path / "run" / "trained"
    line = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        message = f"process {other.pid} on .* writes .*trained: wait"
        with pytest.raises(ValueError, match=message), only_one(path):
            pass
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    began = time.monotonic()
    with only_one(path), only_one(path.with_name("another")):
        assert time.monotonic() - began < 5


def test_reading(tmp_path) -> None:
    path = tmp_path / "a.xml"
    with pytest.raises(Unusable, match=r"a\.xml is not there"), reading(path):
        pass
    path.write_text("x")
    message = r"a\.xml cannot be read \(TypeError\): get it anew"
    with pytest.raises(Unusable, match=message), reading(path, "get it anew"):
        raise TypeError
    with pytest.raises(Unusable, match="cannot be read \\(two lines\\)"), reading(path):
        raise RuntimeError("two\nlines")


def test_hidden_files_and_loops(tmp_path) -> None:
    for name in ("b/c.txt", "b/.hidden", ".git/d.txt", "__MACOSX/e.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "b")
    assert list(files_below(tmp_path)) == ["a.txt", "again/c.txt", "b/c.txt"]
    assert files_below(tmp_path / "none") == {}
