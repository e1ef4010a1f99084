"""papermill, made strict, cached and resumable; `make run` and `make studies`.

An unknown parameter is refused, a notebook runs into a temporary folder, and what it wrote moves
to its place only when it has succeeded. A notebook whose source, parameters, library and weights
are those of its finished run, and whose outputs are all there, is not run again.
"""

import argparse
import json
import os
import shutil
import sys
import warnings
from hashlib import sha256
from pathlib import Path

import nbformat
import papermill
import yaml
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from weclip_lib.config import get_profile
from weclip_lib.files import check_writable, write_text
from weclip_lib.processes import Command, run_commands
from weclip_lib.repro import ROOT, library_hash, tree_hash
from weclip_lib.results import RESULTS, outside_results

NOTEBOOKS = ROOT / "notebooks"
PRESETS = {
    "run": {"profile": "mini", "seed": 0, "seed_count": 1, "steps": 100, "pictures": 200},
    "studies": {"profile": "mini", "seed": 0, "seed_count": 3, "steps": 0, "pictures": 0},
}
SHORTER = (  # in `run`: many decoders each, or pictures encoded in every step
    "03_rfm_ablation",
    "04_layer_count",
    "05_fully_supervised",
    "07_official_vs_intended",
    "08_your_own_images",
)
SHORT = {"steps": 50, "pictures": 100}
READ_BENCH = ("06_training_cost",)  # what `make bench` wrote


def declared_parameters(notebook: Path) -> dict[str, str]:
    """Names and inferred types of a notebook's parameters.

    Raises:
        ValueError: If it has no cell tagged `parameters`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = papermill.inspect_notebook(str(notebook))
    if not found:
        raise ValueError(f"{notebook} has no cell tagged `parameters`")
    return {name: about["inferred_type_name"] for name, about in found.items()}


def check_parameters(notebook: Path, parameters: dict) -> None:
    """Refuse parameters that the notebook does not declare, or of another type.

    Raises:
        ValueError: Naming the parameter and what the notebook has.
    """
    declared = declared_parameters(notebook)
    types = {"int": int, "float": (int, float), "str": str, "bool": bool}
    for name, value in parameters.items():
        if name not in declared:
            raise ValueError(
                f"{notebook.name} has no parameter {name!r}: it has {', '.join(declared)}"
            )
        expected = types.get(declared[name])
        if expected and (
            not isinstance(value, expected) or isinstance(value, bool) != (expected is bool)
        ):
            raise ValueError(
                f"parameter {name} of {notebook.name} is {value!r}: give a {declared[name]}"
            )


def run_key(notebook: Path, parameters: dict) -> str:
    """Hash of all that the outputs depend on."""
    measured = sorted(RESULTS.glob("bench/*.csv")) if notebook.stem in READ_BENCH else ()
    sources = tree_hash(notebook, ROOT / "constraints.txt", *measured)
    about = json.dumps([sources, library_hash(), parameters], sort_keys=True)
    return sha256(about.encode()).hexdigest()


def is_done(folder: Path, notebook: Path, key: str) -> bool:
    """Whether the same run has finished and all that it wrote is still there."""
    record = folder / ".runner" / f"{notebook.stem}.json"
    if not record.exists():
        return False
    finished = json.loads(record.read_text())
    return finished["key"] == key and all((folder / name).exists() for name in finished["files"])


def _joined(outputs: list) -> list:
    """Outputs of a cell, successive pieces of one stream as one output."""
    joined: list = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == last.output_type == "stream" and last.name == output.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _last_line_of_bars(output: dict) -> dict:
    """A stream without the states of its progress bars that a terminal would have overwritten."""
    if output.output_type == "stream":
        lines = output.text.split("\n")
        output.text = "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines)
    return output


def _tidy(executed: Path) -> None:
    """Remove papermill's notes (paths and times), and all but the end of every progress bar."""
    notebook = nbformat.read(executed, as_version=4)
    for item in (notebook, *notebook.cells):
        item.metadata.pop("papermill", None)
        if "outputs" in item:
            item.outputs = [_last_line_of_bars(output) for output in _joined(item.outputs)]
    nbformat.write(notebook, executed)


def run_notebook(notebook: Path, folder: Path, parameters: dict) -> bool:
    """Run one notebook into `folder` unless it is done; returns whether it ran.

    Raises:
        ValueError: On a bad parameter, before anything runs.
        PapermillExecutionError: If a cell fails; what was in `folder` is as it was.
    """
    check_parameters(notebook, parameters)
    key = run_key(notebook, parameters)
    if is_done(folder, notebook, key):
        return False
    partial = folder / ".partial" / notebook.stem
    if "out_dir" in declared_parameters(notebook):
        parameters = {**parameters, "out_dir": os.path.relpath(partial, ROOT)}
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "notebooks").mkdir(parents=True)
    papermill.execute_notebook(
        str(notebook),
        str(partial / "notebooks" / notebook.name),
        parameters=parameters,
        kernel_name="python3",
        cwd=str(ROOT),
        progress_bar={"desc": notebook.stem, "leave": False},
        extra_arguments=["--IPKernelApp.log_level=50"],
        store_widget_state=False,  # explorers bring a picture of themselves along
        stderr_file=sys.stderr,  # progress bars of long cells
    )
    _tidy(partial / "notebooks" / notebook.name)
    files = sorted(str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file())
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(folder / name)
    shutil.rmtree(partial)
    record = json.dumps({"key": key, "files": files}, indent=1)
    write_text(folder / ".runner" / f"{notebook.stem}.json", record)
    return True


def _run_apart(arguments: argparse.Namespace, folder: Path, notebooks: list[Path]) -> None:
    """Run the notebooks as processes of their own, so many at a time."""
    given = ["--out", str(folder)]
    if arguments.profile:
        given += ["--profile", arguments.profile]
    for pair in arguments.p:
        given += ["-p", *pair]
    commands = [
        Command(
            notebook.stem,
            ("weclip_lib.runner", arguments.preset, "--notebook", notebook.stem, *given),
            folder / ".runner" / f"{notebook.stem}.log",
        )
        for notebook in notebooks
    ]
    try:
        failed = run_commands(commands, arguments.processes)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted: start it again, and what has finished is kept") from None
    if failed:
        raise SystemExit(f"error: {', '.join(failed)} failed; see the logs")


def main() -> None:
    """Run all notebooks of a preset, or one."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--notebook", default="", help="run only those whose name starts so: 02")
    parser.add_argument("--profile", help="instead of the preset's")
    parser.add_argument("--out", type=Path, help="folder; default runs/<profile or preset>")
    parser.add_argument("--processes", type=int, default=1, help="notebooks at a time")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    arguments = parser.parse_args()
    preset = dict(PRESETS[arguments.preset])
    try:
        if arguments.profile:
            preset["profile"] = get_profile(arguments.profile).name
            if arguments.profile == "smoke":
                preset |= {"steps": 0, "pictures": 0}
        shorten = arguments.preset == "run" and preset["profile"] != "smoke"
        given = {name: yaml.safe_load(value) for name, value in arguments.p}
        found = NOTEBOOKS.glob(f"{arguments.notebook}*.ipynb")
        notebooks = sorted(path for path in found if path.stem[0].isdigit())
        if not notebooks:
            raise ValueError(f"no notebook starts with {arguments.notebook!r} in {NOTEBOOKS}")
        default = preset["profile"] if arguments.preset == "run" else arguments.preset
        folder = outside_results(arguments.out or ROOT / "runs" / default)
        jobs = []
        for notebook in notebooks:
            declared = declared_parameters(notebook)
            budget = preset | (SHORT if shorten and notebook.stem in SHORTER else {})
            chosen = {k: v for k, v in budget.items() if k in declared} | given
            check_parameters(notebook, chosen)
            jobs.append((notebook, chosen))
        check_writable(folder)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    if arguments.processes != 1:
        _run_apart(arguments, folder, notebooks)
        return
    for notebook, chosen in tqdm(jobs, desc="notebooks", unit="notebook"):
        try:
            ran = run_notebook(notebook, folder, chosen)
        except OSError as error:
            raise SystemExit(
                f"error: {notebook.name}: {error}; finished runs in {folder} are as they were: "
                "make room there, or choose --out"
            ) from error
        except PapermillExecutionError as error:
            where = folder / ".partial" / notebook.stem / "notebooks" / notebook.name
            raise SystemExit(f"error: {notebook.name} failed, see {where}\n{error}") from error
        tqdm.write(f"{notebook.stem}: {'done' if ran else 'up to date'}", file=sys.stderr)


if __name__ == "__main__":
    main()
