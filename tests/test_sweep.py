"""Sweeps: bad grids are refused before anything runs; failures, interruption and resuming."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from weclip_lib.__main__ import main as weclip
from weclip_lib.storage.provenance import ROOT
from weclip_lib.studies import sweep
from weclip_lib.studies.parameters import LONGEST_NAME, run_name

GOOD = {"notebook": "01_cam_generation", "parameters": {"profile": "smoke", "pictures": [2, 3]}}


def written(tmp_path, grid):
    path = tmp_path / "grid.yml"
    path.write_text(grid if isinstance(grid, str) else yaml.safe_dump(grid, sort_keys=False))
    return path


def test_every_combination_is_a_job(tmp_path) -> None:
    parameters = {"profile": "smoke", "seed": [0, 1], "pictures": [2, 3, 4]}
    path = written(tmp_path, GOOD | {"parameters": parameters})
    grid = sweep.read_grid(path, tmp_path / "out")
    assert [job.name for job in grid.jobs][:2] == ["seed=0,pictures=2", "seed=0,pictures=3"]
    assert len(grid.jobs) == len({job.name for job in grid.jobs}) == 6
    assert grid.job("seed=1,pictures=4").parameters == {
        "profile": "smoke",
        "seed": 1,
        "pictures": 4,
    }
    assert [job.name for job in grid.jobs if " " in job.name] == []
    names = [run_name({"data_dir": place}) for place in ("/a b/" + "x" * 300, "/a b/y")]
    assert all(len(name) <= LONGEST_NAME and "/" not in name for name in names)


def test_settings_are_swept_with_parameters(tmp_path) -> None:
    settings = {"box_threshold": [0.3, 0.5], "scales": [[1.0, 0.75], [1.0]], "rfm_start": 0.2}
    path = written(tmp_path, GOOD | {"settings": settings})
    jobs = sweep.read_grid(path, tmp_path / "out").jobs
    assert len(jobs) == len({job.name for job in jobs}) == 8
    assert jobs[0].parameters == {
        "profile": "smoke",
        "pictures": 2,
        "settings": {"box_threshold": 0.3, "scales": [1.0, 0.75], "rfm_start": 0.2},
    }
    assert list(jobs[0].varied) == ["pictures", "box_threshold", "scales"]


def test_settings_are_changed_one_at_a_time(tmp_path) -> None:
    path = written(
        tmp_path,
        GOOD | {"settings": {"dim": 64}, "each": {"par_iterations": [0, 5], "rfm_select": False}},
    )
    jobs = sweep.read_grid(path, tmp_path / "out").jobs
    assert [job.parameters["settings"] for job in jobs if job.parameters["pictures"] == 2] == [
        {"dim": 64},
        {"dim": 64, "par_iterations": 0},
        {"dim": 64, "par_iterations": 5},
        {"dim": 64, "rfm_select": False},
    ]
    assert jobs[1].varied == {"pictures": 2, "changed": "par_iterations=0"}
    assert jobs[0].varied["changed"] == "nothing" and len({job.name for job in jobs}) == 8


def test_jobs_stay_apart_on_any_disk(tmp_path) -> None:
    """Some take A for a, é for e with an accent, or drop what is at the end."""
    folders = ["a b", "a-b", "a/b", "photos", "Photos", "photos.", "é", "e\u0301", "\u4e2d" * 200]
    names = [run_name({"data_dir": folder}) for folder in folders]
    assert names[1] == "data_dir=a-b" and names[3] == "data_dir=photos"
    assert len({name.lower() for name in names}) == len(folders)
    assert all(name.isascii() and not set(name) & set(" /") for name in names)
    assert not any(name.endswith(".") for name in names)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("notebook: [", "is no YAML"),
        ("notebook: !!bool maybe", "grid.yml is no YAML"),
        ("- 01_cam_generation", "has list: it takes `notebook`, `parameters`"),
        (GOOD | {"params": {}}, "params: it takes `notebook`"),
        ("notebook: 01_cam_generation\nnotebook: 01_cam_generation", "comes a second time"),
        ("notebook: 01_cam_generation\nparameters:\n  seed: 1\n  seed: 2", "'seed' comes a second"),
        (GOOD | {"notebook": 1}, "no notebook 1: choose"),
        (GOOD | {"notebook": ["01_cam_generation"]}, "no notebook .*: choose"),
        (GOOD | {"notebook": "01_cams"}, "no notebook '01_cams': choose of 00_minivoc"),
        (GOOD | {"parameters": {"picture": 3}}, "no parameter 'picture': did you mean pictures"),
        (GOOD | {"parameters": {"pictures": ["a"]}}, "pictures of .* is 'a': give a whole number"),
        (GOOD | {"parameters": {"pictures": []}}, "pictures has an empty list"),
        (GOOD | {"parameters": {"pictures": [2, 2]}}, "pictures=2 comes a second time"),
        (GOOD | {"parameters": [1]}, "names with values"),
        (GOOD | {"settings": {"dim": 64}, "each": {"dim": 32}}, "dim is in `settings` and in `ea"),
        (GOOD | {"parameters": {"dim": 64}}, "dim is a setting: give it in `settings`"),
        (GOOD | {"settings": 3}, "`settings` is to be names with values"),
        (GOOD | {"settings": {"box_treshold": 1}}, "grid.yml: .*did you mean box_threshold"),
        (GOOD | {"settings": {"box_threshold": [0.3, 7]}}, "box_threshold is 7.0: give a number"),
        (
            GOOD | {"settings": {"scales": [1.0, 0.5]}},
            r"is 1.0: give a list, .*\(a list of lists",
        ),
        (GOOD | {"settings": {"dim": []}}, "setting dim has an empty list"),
        (GOOD | {"parameters": {"settings": {"dim": 64}}}, "write `settings` beside"),
        (GOOD | {"parameters": []}, "names with values"),
        (GOOD | {"parameters": {"pictures": None}}, "is None: give a whole number"),
        (GOOD | {"parameters": {"weights": "no/such.pt"}}, "grid.yml: .*nothing is there"),
        (GOOD | {"parameters": {"out_dir": "x"}}, "use --out"),
    ],
)
def test_bad_grids_are_refused(tmp_path, grid, message) -> None:
    with pytest.raises(ValueError, match=message):
        sweep.read_grid(written(tmp_path, grid), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_places_are_refused(tmp_path) -> None:
    path = str(written(tmp_path, GOOD))
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["run", str(tmp_path / "none.yml")], "is not there"),
        (["run", path, "--out", str(ROOT / "results" / "x")], "only `make publish` writes"),
        (["run", path, "--out", str(tmp_path / "file" / "out")], "cannot be written"),
        (["job", path, "pictures=9", "--out", str(tmp_path / "out")], "no job 'pictures=9'"),
        (["collect", path, "--out", str(tmp_path / "out")], "run `weclip sweep run` first"),
    ):
        with pytest.raises(SystemExit, match=message):
            weclip(["sweep", *arguments])


def test_another_encoding_is_named(tmp_path) -> None:
    path = tmp_path / "grid.yml"
    path.write_bytes("notebook: 01_cam_generation # été".encode("latin-1"))
    with pytest.raises(ValueError, match=r"grid.yml is not in UTF-8 \(.* in line 1\)"):
        sweep.read_grid(path, tmp_path / "out")


def test_paths_are_seen_from_where_one_stands(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, GOOD)
    assert sweep.read_grid(Path("grid.yml"), Path("out")).folder == tmp_path / "out"
    for action in ("list", "waiting"):
        weclip(["sweep", action, "grid.yml", "--out", "out"])
        assert capsys.readouterr().out == "pictures=2\npictures=3\n"


@pytest.mark.notebook
def test_failures_are_apart_and_a_sweep_resumes(tmp_path, capsys) -> None:
    """One of two data folders holds something else at first."""
    good, bad, out = tmp_path / "good", tmp_path / "bad", tmp_path / "out"
    (bad / "mine").mkdir(parents=True)
    good.mkdir()
    parameters = {"profile": "smoke", "pictures": 3, "data_dir": [str(bad), str(good)]}
    path = written(tmp_path, GOOD | {"parameters": parameters})
    arguments = ["run", str(path), "--out", str(out), "--processes", "2"]
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        weclip(["sweep", *arguments])
    failed, finished = (job.name for job in sweep.read_grid(path, out).jobs)
    said = capsys.readouterr().err
    assert f"{failed}: failed: " in said and "holds something else" in said
    table = out / finished / "01_cam_generation.csv"
    rows, stamp = len(pd.read_csv(table)), table.stat().st_mtime_ns
    assert len(pd.read_csv(out / "sweep.csv")) == rows

    (bad / "mine").rmdir()
    weclip(["sweep", *arguments])
    capsys.readouterr()
    weclip(["sweep", "waiting", *arguments[1:4]])
    assert capsys.readouterr().out == ""  # a folder that was drawn on the way is not a new one
    assert table.stat().st_mtime_ns == stamp  # what was finished was not run again
    joined = pd.read_csv(out / "sweep.csv")
    assert len(joined) == 2 * rows and set(joined["data_dir"]) == {str(good), str(bad)}


@pytest.mark.notebook
def test_interrupted_leaves_nothing_half_written(tmp_path) -> None:
    path, out = written(tmp_path, GOOD), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "weclip_lib",
        "sweep",
        "run",
        str(path),
        "--out",
        str(out),
    ]

    def listen() -> None:
        """A shell's background jobs, and so the tests in them, begin with SIGINT ignored."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=listen
    ) as process:
        until = time.monotonic() + 60
        while not list(out.glob("*/.partial")) and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(1)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "what has finished is kept" in errors
    assert not list(out.rglob("*.csv.partial"))
    assert not list(out.glob("*/01_cam_generation.csv"))
