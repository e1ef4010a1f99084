import json

import nbformat
import pytest
from papermill.exceptions import PapermillExecutionError

from weclip_lib import runner

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
BODY = """
from pathlib import Path
if fail:
    raise RuntimeError("on purpose")
Path(out_dir, "table.csv").write_text(f"{seed}\\n")
"""


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "tree_hash", lambda *paths: paths[0].read_text())
    cells = [
        nbformat.v4.new_code_cell(
            'seed: int = 0\nrate: float = 0.5\nfail: bool = False\nout_dir: str = ""',
            metadata={"tags": ["parameters"]},
        ),
        nbformat.v4.new_code_cell(BODY),
    ]
    path = tmp_path / "01_x.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), path)
    return path


def test_cached_resumed_and_whole(notebook, tmp_path) -> None:
    out = tmp_path / "out"
    assert runner.run_notebook(notebook, out, {"seed": 3})
    assert (out / "table.csv").read_text() == "3\n"
    executed = (out / "notebooks/01_x.ipynb").read_text()
    assert str(notebook) not in executed  # no path of this machine
    assert not runner.run_notebook(notebook, out, {"seed": 3})
    (out / "table.csv").unlink()
    assert runner.run_notebook(notebook, out, {"seed": 3})
    assert runner.run_notebook(notebook, out, {"seed": 4})
    assert (out / "table.csv").read_text() == "4\n"
    with pytest.raises(PapermillExecutionError, match="on purpose"):
        runner.run_notebook(notebook, out, {"seed": 5, "fail": True})
    assert (out / "table.csv").read_text() == "4\n"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sede": 1}, "no parameter 'sede': it has seed, rate, fail, out_dir"),
        ({"seed": "one"}, "parameter seed of 01_x.ipynb is 'one': give a int"),
        ({"seed": True}, "give a int"),
        ({"fail": 1}, "give a bool"),
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
        (["run", "-p", "sede", "1"], "no parameter 'sede'"),
        (["run", "--out", "results/mini"], "only `make publish` writes there"),
        (["run", "--out", f"{__file__}/out"], "out cannot be written"),
        (["run", "--processes", "0"], "0 processes: give 1 or more"),
    ],
)
def test_command_line_errors(monkeypatch, arguments, message) -> None:
    monkeypatch.setattr("sys.argv", ["runner", *arguments])
    with pytest.raises(SystemExit) as error:
        runner.main()
    assert message in str(error.value)


@pytest.mark.notebook
def test_as_processes_failures_name_their_log(tmp_path, monkeypatch, capsys) -> None:
    bad = tmp_path / "bad"
    (bad / "mine").mkdir(parents=True)
    given = ["run", "--profile", "smoke", "--notebook", "01", "--processes", "2"]
    given += ["--out", str(tmp_path / "out"), "-p", "pictures", "3", "-p", "data_dir"]
    monkeypatch.setattr("sys.argv", ["runner", *given, str(bad)])
    with pytest.raises(SystemExit, match="01_cam_generation failed"):
        runner.main()
    log = tmp_path / "out" / ".runner" / "01_cam_generation.log"
    assert f"01_cam_generation: failed, see {log}" in capsys.readouterr().out
    assert "holds something else" in log.read_text()
    assert not (tmp_path / "out" / "01_cam_generation.csv").exists()
    monkeypatch.setattr("sys.argv", ["runner", *given, str(tmp_path / "good")])
    runner.main()
    assert (tmp_path / "out" / "01_cam_generation.csv").exists()


def test_notebook_without_parameters_is_refused(tmp_path) -> None:
    path = tmp_path / "01_x.ipynb"
    path.write_text(json.dumps(nbformat.v4.new_notebook(metadata=KERNEL)))
    with pytest.raises(ValueError, match="no cell tagged"):
        runner.declared_parameters(path)
