"""The runner: what makes a run stale, what it never replaces, how it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest

from weclip_lib.__main__ import main as weclip
from weclip_lib.data import datasets, profiles
from weclip_lib.data.profiles import PROFILES
from weclip_lib.storage.files import only_one
from weclip_lib.studies import records, runner

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
PARAMETERS = """
seed: int = 0
rate: float = 0.5
fail: bool = False
data_dir: str = ""
weights: str = ""
run_dir: str = ""
out_dir: str = ""
"""
BODY = """
import time
from pathlib import Path
if fail:
    raise RuntimeError("on purpose")
Path("began").touch()
while Path("wait").exists():
    time.sleep(0.05)
if data_dir and not list(Path(data_dir).iterdir()):
    Path(data_dir, "labels.csv").write_text("drawn")
Path(out_dir, "table.csv").write_text(f"{seed}\\n")
Path(out_dir, "masks").mkdir()
Path(out_dir, "masks", "a.png").write_bytes(b"made")
"""


def write_notebook(path, body=BODY, parameters=PARAMETERS):
    cells = [
        nbformat.v4.new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(body),
    ]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), path)
    return path


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """In a folder of notebooks of its own; the tests stand beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(records, "library_hash", lambda: "the same")
    return write_notebook(tmp_path / "notebooks" / "01_x.ipynb")


@pytest.fixture
def instead(monkeypatch):
    """What a notebook writes, without a kernel: tests of everything around it take no time."""
    count = []

    def execute(notebook, executed, parameters, log):
        count.append(parameters)
        names = {
            name: about.default for name, about in records.declared_parameters(notebook).items()
        }
        exec(BODY, names | parameters)
        executed.write_text(notebook.read_text())

    monkeypatch.setattr(runner, "_execute", execute)
    return count


def main(*arguments):
    weclip(["run", *map(str, arguments)])


@pytest.mark.notebook
def test_cached_resumed_and_whole(notebook, tmp_path) -> None:
    out = tmp_path / "out"
    assert runner.run_notebook(notebook, out, {"seed": 3})
    assert (out / "table.csv").read_text() == "3\n"
    assert str(tmp_path) not in (out / "notebooks/01_x.ipynb").read_text()  # of this machine
    assert (tmp_path / "began").exists()  # ran where the caller stands
    assert not runner.run_notebook(notebook, out, {"seed": 3})
    assert runner.run_notebook(notebook, out, {"seed": 4}, replaces=True)
    assert (out / "table.csv").read_text() == "4\n"
    with pytest.raises(ValueError, match=r"01_x.ipynb failed, see .*: RuntimeError: on purpose"):
        runner.run_notebook(notebook, out, {"seed": 5, "fail": True}, replaces=True)
    assert (out / "table.csv").read_text() == "4\n"


@pytest.mark.parametrize("folder", ["out", "{braces} and spaces"])
@pytest.mark.notebook
def test_the_command_from_another_folder(notebook, tmp_path, monkeypatch, folder, capsys) -> None:
    given = ("run", "--notebook", "1", "--out", folder, "-p", "data_dir", "2012 # x")
    (tmp_path / "2012 # x").mkdir()
    main(*given)
    assert (tmp_path / "2012 # x" / "labels.csv").exists()  # text is taken as it is
    assert (tmp_path / folder / "table.csv").exists()
    assert "01_x: done" in capsys.readouterr().err
    (tmp_path / "began").unlink()
    main(*given, "--processes", "2")  # starts nothing
    assert not (tmp_path / "began").exists()


def test_what_a_run_reads_makes_it_stale(notebook, tmp_path, instead) -> None:
    data, out = tmp_path / "photos", tmp_path / "out"
    (data / "masks").mkdir(parents=True)
    for name in ("labels.csv", "masks/a.png", "weights.pt"):
        (data / name).write_text("abc")
    given = {"data_dir": "photos", "weights": "photos/weights.pt"}

    def ran() -> bool:
        return runner.run_notebook(notebook, out, given, replaces=True)

    assert ran() and not ran()
    (data / "labels.csv").write_text("abd")
    assert ran() and not ran()
    os.utime(data / "labels.csv")  # a list with the same content is the same list
    assert not ran()
    os.utime(data / "masks/a.png")
    assert ran() and not ran()
    (data / "b.jpg").write_text("new")
    assert ran() and not ran()
    (data / ".hidden").write_text("new")
    assert not ran()
    given["weights"] = "other.pt"
    (tmp_path / "other.pt").write_text("abc")
    assert ran() and not ran()
    (tmp_path / "other.pt").write_text("abcd")
    assert ran() and not ran()
    notebook.write_text(notebook.read_text().replace("0.5", "0.25"))
    assert ran() and not ran()


def test_a_folder_that_the_run_makes_counts_as_it_left_it(notebook, tmp_path, instead) -> None:
    given = {"data_dir": "new"}
    (tmp_path / "new").mkdir()
    assert runner.run_notebook(notebook, tmp_path / "out", given)
    assert not runner.run_notebook(notebook, tmp_path / "out", given)
    (tmp_path / "new" / "labels.csv").write_text("edited")
    assert runner.run_notebook(notebook, tmp_path / "out", given)


def test_an_edit_during_the_run_is_not_taken_for_done(notebook, tmp_path, monkeypatch) -> None:
    labels = tmp_path / "photos" / "labels.csv"
    labels.parent.mkdir()
    labels.write_text("before")

    def execute(notebook, executed, parameters, log):
        executed.write_text(notebook.read_text())
        labels.write_text("after")

    monkeypatch.setattr(runner, "_execute", execute)
    given = {"data_dir": "photos"}
    assert runner.run_notebook(notebook, tmp_path / "out", given)
    assert runner.run_notebook(notebook, tmp_path / "out", given)
    assert not runner.run_notebook(notebook, tmp_path / "out", given)


def test_outputs_beside_the_pictures_are_no_pictures(notebook, tmp_path, instead) -> None:
    data = tmp_path / "photos"
    data.mkdir()
    (data / "labels.csv").write_text("x")
    for _ in range(2):
        runner.run_notebook(notebook, data / "out", {"data_dir": "photos"})
    assert len(instead) == 1
    with pytest.raises(ValueError, match="holds the pictures: choose another folder"):
        runner.run_notebook(notebook, data, {"data_dir": "photos"})


@pytest.mark.parametrize("name", PROFILES)
def test_where_none_is_given_the_profile_says_which_folder(tmp_path, monkeypatch, name) -> None:
    monkeypatch.setattr(profiles, "DATA", tmp_path)
    monkeypatch.setattr(datasets, "write_voc", lambda folder, *_: folder)
    folder = PROFILES[name].default_folder
    (folder / "images").mkdir(parents=True)
    assert datasets.data_folder(PROFILES[name]) == folder
    declared = PARAMETERS + 'profile: str = "mini"'
    asks = write_notebook(tmp_path / "notebooks" / "01_y.ipynb", parameters=declared)
    before = records.run_key(asks, {"profile": name}, tmp_path / "out")
    (folder / "images" / "a.jpg").touch()
    assert records.run_key(asks, {"profile": name}, tmp_path / "out") != before


@pytest.mark.parametrize("spoil", ["missing", "cut", "record", "empty record", "list"])
def test_spoilt_outputs_are_made_anew(notebook, tmp_path, instead, spoil) -> None:
    out, record = tmp_path / "out", tmp_path / "out" / ".runner" / "01_x.json"
    runner.run_notebook(notebook, out, {})
    path, content = {
        "missing": (out / "masks/a.png", None),
        "cut": (out / "table.csv", ""),
        "record": (record, record.read_text()[:-20]),
        "empty record": (record, ""),
        "list": (record, json.dumps(json.loads(record.read_text()) | {"files": ["table.csv"]})),
    }[spoil]
    path.unlink() if content is None else path.write_text(content)
    assert runner.run_notebook(notebook, out, {})
    assert (out / "table.csv").read_text() == "0\n" and (out / "masks/a.png").exists()
    assert not runner.run_notebook(notebook, out, {})


def test_an_edited_file_is_kept_beside_the_new_one(notebook, tmp_path, instead, capsys) -> None:
    out = tmp_path / "out"
    for seed in (1, 2):
        runner.run_notebook(notebook, out, {"seed": seed}, replaces=True)
        (out / "table.csv").write_text(f"mine {seed}")
    runner.run_notebook(notebook, out, {"seed": 3}, replaces=True)
    assert (out / "table.csv").read_text() == "3\n"
    kept = [(out / f"table.csv.edited-{number}").read_text() for number in (1, 2)]
    assert kept == ["mine 1", "mine 2"]
    assert (
        f"{out / 'table.csv'} was changed since: kept as table.csv.edited-2"
        in capsys.readouterr().err
    )


def test_a_run_with_other_parameters_stays(notebook, tmp_path, instead) -> None:
    out = tmp_path / "out"
    runner.run_notebook(notebook, out, {"seed": 1})
    with pytest.raises(ValueError, match=r"holds a run of 01_x.ipynb with seed 1, not 2: choose"):
        runner.run_notebook(notebook, out, {"seed": 2})
    with pytest.raises(ValueError, match="with seed 1, not 0"):  # the default
        runner.run_notebook(notebook, out, {})
    assert (out / "table.csv").read_text() == "1\n" and len(instead) == 1
    assert not runner.run_notebook(notebook, out, {"seed": 1})


def test_what_is_asked_for_names_the_folder(notebook, tmp_path, instead, monkeypatch) -> None:
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    main("run", "--notebook", "1", "--profile", "smoke")
    main("run", "--notebook", "1", "--profile", "smoke", "-p", "seed", "8")
    assert (tmp_path / "runs" / "smoke" / "table.csv").read_text() == "0\n"
    assert (tmp_path / "runs" / "smoke,seed=8" / "table.csv").read_text() == "8\n"


@pytest.mark.parametrize("name", ["01_x.csv", "notebooks/01_x.ipynb"])
def test_what_somebody_else_wrote_stays(notebook, tmp_path, instead, name) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=f"{name} is there, and no run of 01_x.ipynb wrote it"):
        runner.run_notebook(notebook, tmp_path / "out", {})
    assert path.read_text() == "mine" and not instead


@pytest.mark.parametrize(("name", "blocked"), [("masks/a.png", "masks/a.png"), ("masks", "masks")])
def test_or_at_the_end_and_both_stay(notebook, tmp_path, instead, name, blocked) -> None:
    path, out = tmp_path / "out" / name, tmp_path / "out"
    path.parent.mkdir(parents=True)
    path.write_text("drawn by hand")
    with pytest.raises(
        ValueError, match=rf"{blocked} is there.*; what was made is in (\S+)"
    ) as error:
        runner.run_notebook(notebook, out, {})
    made = out / ".partial" / "01_x"
    assert str(error.value).endswith(str(made)) and (made / "masks/a.png").read_bytes() == b"made"
    assert path.read_text() == "drawn by hand" and not (out / "table.csv").exists()
    path.rename(tmp_path / "moved")
    assert runner.run_notebook(notebook, out, {})


def test_killed_while_files_moved(notebook, tmp_path, instead, monkeypatch) -> None:
    out, move = tmp_path / "out", runner.Path.replace
    runner.run_notebook(notebook, out, {})

    def killed(self, target):
        if self.name == "table.csv":
            raise KeyboardInterrupt
        return move(self, target)

    monkeypatch.setattr(runner.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        runner.run_notebook(notebook, out, {"seed": 1}, replaces=True)
    monkeypatch.setattr(runner.Path, "replace", move)
    assert (out / "table.csv").read_text() == "0\n"
    assert runner.run_notebook(notebook, out, {"seed": 1})
    assert (out / "table.csv").read_text() == "1\n" and not list(out.glob("*.edited*"))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sede": 1}, "no parameter 'sede': did you mean seed?"),
        ({"x": 1}, "no parameter 'x': choose of data_dir, fail"),
        ({"data_dir": "photoz"}, "is 'photoz': nothing is there, seen from"),
        ({"seed": "one"}, "parameter seed of 01_x.ipynb is 'one': give a whole number"),
        ({"seed": True}, "give a whole number"),
        ({"seed": None}, "is None: give a whole number"),
        ({"rate": "1"}, "give a number"),
        ({"fail": 1}, "give true or false"),
        ({"data_dir": 3}, "give text"),
        ({"out_dir": "x"}, "is the runner's: use --out"),
        (
            {"weights": "here/a.pt"},
            "weights of 01_x.ipynb is 'here/a.pt': nothing is there",
        ),
        ({"run_dir": "runs"}, "is 'runs': nothing is there, seen from"),
    ],
)
def test_bad_parameters_are_refused_before_anything_runs(
    notebook, tmp_path, parameters, message
) -> None:
    with pytest.raises(ValueError) as error:
        runner.run_notebook(notebook, tmp_path / "out", parameters)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--profile", "vok"], "unknown profile 'vok'"),
        (["run", "--notebook", "99"], "no notebook starts with '99'"),
        (["run", "-p", "profile", "smoke"], "-p profile smoke: give --profile smoke"),
        (["run", "-p", "settings", "{dim: 64}"], "-p settings: give -s NAME VALUE"),
        (["run", "-s", "dims", "64"], "no setting 'dims': did you mean dim"),
        (["run", "-p", "sede", "1"], "no parameter 'sede'"),
        (["run", "-p", "seed", "1", "-p", "seed", "2"], "-p seed comes a second time"),
        (["run", "-p", "seed", "[1"], "ipynb is '[1': give a whole number"),
        (["run", "-p", "seed", "1:30"], "ipynb is '1:30': give a whole number"),
        (["run", "--notebook", "02", "-p", "steps", "-5"], "is -5: give a whole number of 0"),
        (["run", "-p", "seed", "one"], "parameter seed of 00_minivoc_and_miniclip.ipynb is 'one'"),
        (["run", "--out", "results/mini"], "only `make publish` writes there"),
        (["run", "--out", f"{__file__}/out"], "out cannot be written"),
    ],
)
def test_command_line_errors(monkeypatch, tmp_path, arguments, message) -> None:
    monkeypatch.chdir(records.ROOT)
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as error:
        main(*arguments)
    assert message in str(error.value)


def test_a_number_of_processes(capsys) -> None:
    for command in (["run"], ["sweep", "run", "grid.yml"]):
        with pytest.raises(SystemExit):
            weclip([*command, "--processes", "0"])
        assert "processes is 0: give a whole number of 1 or more" in capsys.readouterr().err


def test_a_second_process_is_refused(notebook, tmp_path, instead) -> None:
    with (
        only_one(tmp_path / "out" / "01_x"),
        pytest.raises(ValueError, match=f"process {os.getpid()} on .* writes .*01_x"),
    ):
        runner.run_notebook(notebook, tmp_path / "out", {})
    assert not instead
    with only_one(tmp_path / "out" / "02_y"):  # another notebook may be running there
        assert runner.run_notebook(notebook, tmp_path / "out", {})


def ended(command, tmp_path, number, ready):
    """Send a runner a signal once its cells run; what it said, and what was below it."""
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        until = time.monotonic() + 120
        while not ready() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    if number == signal.SIGTERM:
        said = errors.strip().splitlines()[-1]
        assert said.endswith("interrupted: start it again, and what has finished is kept")
        assert not any(child.is_running() for child in below)
    assert not psutil.wait_procs(below, timeout=30)[1]  # of a killed one, they end by themselves
    assert not list(tmp_path.glob("out/*.csv")) and not list(tmp_path.glob("out/.runner/*.json"))
    return below


HERE = """
import sys
from pathlib import Path
from weclip_lib.__main__ import main
from weclip_lib.studies import runner
runner.NOTEBOOKS = Path("notebooks").resolve()
main(["run", "--out", "out", *sys.argv[1:]])
"""


@pytest.mark.notebook
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("at_once", [1, 2])
def test_a_signal_ends_all_that_runs(notebook, tmp_path, monkeypatch, at_once, number) -> None:
    (tmp_path / "wait").touch()
    for second in range(2, 1 + at_once):
        shutil.copy(notebook, notebook.with_name(f"0{second}_x.ipynb"))
    monkeypatch.setenv("PYTHONPATH", str(records.ROOT))
    command = [sys.executable, "-c", HERE, "--processes", str(at_once)]
    below = ended(command, tmp_path, number, (tmp_path / "began").exists)
    assert len(below) == at_once  # kernels


@pytest.mark.notebook
def test_side_by_side_failures_name_their_reason(tmp_path, capsys) -> None:
    bad = tmp_path / "bad"
    (bad / "mine").mkdir(parents=True)
    given = ["run", "--profile", "smoke", "--notebook", "01", "--processes", "2"]
    given += ["--out", str(tmp_path / "out"), "-p", "pictures", "3", "-p", "data_dir"]
    with pytest.raises(SystemExit, match="01_cam_generation failed"):
        main(*given, bad)
    said = capsys.readouterr().err
    assert "01_cam_generation: failed: 01_cam_generation.ipynb failed, see" in said
    assert "holds something else" in said
    assert not (tmp_path / "out" / "01_cam_generation.csv").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(nbformat.v4.new_notebook(metadata=KERNEL)), "no cell tagged"),
        ("{", "01_x.ipynb cannot be read"),
    ],
)
def test_notebook_without_parameters_is_refused(tmp_path, content, message) -> None:
    path = tmp_path / "01_x.ipynb"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        records.declared_parameters(path)
