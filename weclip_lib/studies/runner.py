"""papermill, made strict, cached and resumable; `make run` and `make studies`.

An unknown parameter is refused, a notebook runs into a temporary folder, and what it wrote moves
to its place only when it has succeeded. A notebook runs where the caller stands. It is not run
again if its source, parameters, library, weights and pictures are those of its finished run, and
its outputs are all there as it wrote them. papermill is imported when something has to be run.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import yaml
from tqdm import tqdm

from weclip_lib.config import get_profile, in_range
from weclip_lib.storage.files import Unusable, check_writable, in_a_line, only_one
from weclip_lib.storage.provenance import ROOT, outside_results
from weclip_lib.studies.processes import Command, interruptible, run_commands
from weclip_lib.studies.records import (
    Parameter,
    Record,
    declared_parameters,
    file_hash,
    is_done,
    key_of,
    made_by,
    read_record,
    record_file,
    run_key,
    states,
    write_record,
)

NOTEBOOKS = ROOT / "notebooks"
RANGES = {  # of parameters that several notebooks have
    "seed": (0, 2**32 - 1),
    "seed_count": (1,),
    "steps": (0,),
    "pictures": (0,),
}
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
KINDS = {
    "int": ("a whole number", int),
    "float": ("a number", (int, float)),
    "str": ("text", str),
    "bool": ("true or false", bool),
}


def check_parameters(notebook: Path, parameters: dict) -> None:
    """Refuse parameters that the notebook does not declare, or that cannot be right.

    Raises:
        ValueError: Naming the parameter and what the notebook has.
    """
    declared = declared_parameters(notebook)
    for name, value in parameters.items():
        if name not in declared:
            raise ValueError(
                f"{notebook.name} has no parameter {name!r}: it has {', '.join(declared)}"
            )
        if name == "out_dir":
            raise ValueError(f"parameter out_dir of {notebook.name} is the runner's: use --out")
        words, kind = KINDS.get(declared[name].kind, ("", object))
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"parameter {name} of {notebook.name} is {value!r}: give {words}")
        if name in RANGES:
            in_range(f"parameter {name} of {notebook.name}", value, *RANGES[name])
        if _names_nothing(name, value):
            raise ValueError(
                f"parameter {name} of {notebook.name} is {value!r}: nothing is there, seen from "
                f"{Path.cwd()}"
            )


def _names_nothing(name: str, value: object) -> bool:
    """Whether a parameter names a place where files have to be, and are not; a tag is no place.

    `data_dir` may be new: MiniVOC is drawn there.
    """
    if name == "weights" and not ("/" in value or os.sep in value or Path(value).suffix):
        return False
    return name in ("weights", "run_dir") and bool(value) and not Path(value).exists()


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
    import nbformat

    notebook = nbformat.read(executed, as_version=4)
    for item in (notebook, *notebook.cells):
        item.metadata.pop("papermill", None)
        if "outputs" in item:
            item.outputs = [_last_line_of_bars(output) for output in _joined(item.outputs)]
    nbformat.write(notebook, executed)


def _keep_strangers(folder: Path, notebook: Path, names: Iterable[str], about: str) -> None:
    """Refuse to write where something lies that no run of the notebook wrote.

    Raises:
        ValueError: Naming the first such file, with `about` at the end.
    """
    known: dict[str, str] = {}
    if record_file(folder, notebook.stem).exists():
        try:
            record = read_record(folder, notebook.stem)
        except Unusable:  # a run ended here, and nobody knows any more what it wrote
            return
        known = record.files | record.earlier
    for name in names:
        path = folder / name
        above = [p for p in path.parents if p != folder and p.is_relative_to(folder)]
        in_way = [p for p in above if p.exists() and not p.is_dir()]
        there = path.exists() or path.is_symlink()
        if path.is_dir() or (there and name not in known):
            in_way.append(path)
        if in_way:
            raise ValueError(
                f"{in_way[0]} is there, and no run of {notebook.name} wrote it: move it, or "
                f"choose another folder{about}"
            )


def _move(partial: Path, folder: Path, stem: str, key: str, parameters: dict) -> None:
    """Move what a run wrote to its place, and record it; what somebody edited there is kept."""
    files = {name: file_hash(path) for name, path in _files(partial).items()}
    try:
        old = read_record(folder, stem)
    except Unusable:
        old = Record("", {})
    known = {n: d for n, d in (old.earlier | old.files).items() if (folder / n).is_file()}
    write_record(folder, stem, Record("", parameters, files, known))  # if it ends half-way
    for name, digest in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        ours = (digest, old.files.get(name), old.earlier.get(name))
        if name in known and file_hash(target) not in ours:
            aside = _free_name(target)
            target.replace(aside)
            tqdm.write(f"{target} was edited: kept as {aside.name}", file=sys.stderr)
        (partial / name).replace(target)
    shutil.rmtree(partial)
    earlier = {name: digest for name, digest in known.items() if name not in files}
    write_record(folder, stem, Record(key, parameters, files, earlier))


def _files(partial: Path) -> dict[str, Path]:
    """All files that a run wrote, by relative path; locks are none."""
    found = {p.relative_to(partial).as_posix(): p for p in partial.rglob("*") if p.is_file()}
    return {name: path for name, path in sorted(found.items()) if ".locks" not in path.parts}


def _free_name(path: Path) -> Path:
    """A name beside an edited file that nothing has."""
    number = 1
    while (free := path.with_name(f"{path.name}.edited-{number}")).exists():
        number += 1
    return free


def _from_here(path: Path) -> str:
    """A path as seen from the working directory, so that no name of the machine is kept."""
    try:
        return os.path.relpath(path)
    except ValueError:  # on another drive of Windows
        return str(path)


def _execute(notebook: Path, executed: Path, parameters: dict) -> None:
    """Run a notebook here into `executed`.

    Raises:
        ValueError: If a cell fails, or the kernel dies.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            *(str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, executed)),
            parameters=parameters,
            kernel_name="python3",
            progress_bar={"desc": notebook.stem, "leave": False},
            extra_arguments=["--IPKernelApp.log_level=50"],
            store_widget_state=False,  # explorers bring a picture of themselves along
            stderr_file=sys.stderr,  # progress bars of long cells
        )
    except PapermillExecutionError as error:
        said = " ".join(f"{error.ename}: {error.evalue}".split())
        raise ValueError(f"{notebook.name} failed, see {executed}: {said}") from error
    except RuntimeError as error:
        raise ValueError(
            f"{notebook.name}: its kernel did not start, or died ({in_a_line(error)}): see whether "
            "there is memory enough"
        ) from error


def run_notebook(
    notebook: Path, folder: Path, parameters: dict, *, out: Path | None = None
) -> bool:
    """Run one notebook into `folder`, where the caller stands, unless it is done.

    Args:
        out: Folder into which this and similar runs write; default `folder`.

    Returns:
        Whether it ran.

    Raises:
        ValueError: On a bad parameter, if another process runs the notebook into that folder, or
            if something of somebody else's lies where it has to write; before anything runs. If a
            cell fails; what was in `folder` is as it was.
    """
    check_parameters(notebook, parameters)
    if (given := parameters.get("data_dir")) and Path(given).resolve() == folder.resolve():
        raise ValueError(f"{folder} holds the pictures: choose another folder for the outputs")
    with only_one(folder / notebook.stem):
        maker = made_by(notebook, parameters)
        before = states(notebook, parameters, out or folder)
        if is_done(folder, notebook, key_of(maker, before)):
            return False
        executed = f"notebooks/{notebook.name}"
        certain = (executed, f"{notebook.stem}.csv", f"{notebook.stem}.json")
        _keep_strangers(folder, notebook, certain, "")
        partial = folder / ".partial" / notebook.stem
        if partial.exists():
            shutil.rmtree(partial)
        (partial / "notebooks").mkdir(parents=True)
        place = {"out_dir": _from_here(partial)}
        told = place if "out_dir" in declared_parameters(notebook) else {}
        _execute(notebook, partial / executed, parameters | told)
        _tidy(partial / executed)
        _keep_strangers(folder, notebook, _files(partial), f"; what was made is in {partial}")
        # What the run itself made counts as it is now; anything else, as it was at the start.
        after = states(notebook, parameters, out or folder)
        key = key_of(maker, {name: state or after[name] for name, state in before.items()})
        _move(partial, folder, notebook.stem, key, parameters)
    return True


def _run_apart(
    arguments: argparse.Namespace, folder: Path, jobs: Sequence[tuple[Path, dict]]
) -> None:
    """Run the notebooks that are not done as processes of their own, so many at a time."""
    given = ["--out", str(folder)]
    if arguments.profile:
        given += ["--profile", arguments.profile]
    for pair in arguments.p:
        given += ["-p", *pair]
    commands = [
        Command(
            notebook.stem,
            ("weclip_lib.studies.runner", arguments.preset, "--notebook", notebook.stem, *given),
            folder / ".runner" / f"{notebook.stem}.log",
        )
        for notebook, chosen in jobs
        if not is_done(folder, notebook, run_key(notebook, chosen, folder))
    ]
    failed = run_commands(commands, arguments.processes, finished=len(jobs) - len(commands))
    if failed:
        raise ValueError(f"{', '.join(failed)} failed; see the logs")


def _parsed(pairs: Sequence[Sequence[str]], declared: dict[str, Parameter]) -> dict:
    """Parameters of the command line: text as it is where text is asked for, else YAML.

    Raises:
        ValueError: If one comes twice, or is no YAML.
    """
    given: dict = {}
    for name, text in pairs:
        if name in given:
            raise ValueError(f"-p {name} comes a second time: give it once")
        given[name], kind = text, declared[name].kind if name in declared else "str"
        if kind == "int":  # YAML takes 010 for 8, and 1:30 for 90
            with suppress(ValueError):
                given[name] = int(text)
        elif kind != "str":
            try:
                given[name] = yaml.safe_load(text)
            except Exception as error:  # tags of YAML raise whatever the conversion does
                said = in_a_line(error)
                raise ValueError(f"-p {name} has {text!r}, which is no value: {said}") from error
    return given


def _run_all(arguments: argparse.Namespace) -> None:
    """Check what is asked for, then run it.

    Raises:
        ValueError: Naming what cannot be done, or what failed.
    """
    preset = dict(PRESETS[arguments.preset])
    if arguments.profile:
        preset["profile"] = get_profile(arguments.profile).name
        if arguments.profile == "smoke":
            preset |= {"steps": 0, "pictures": 0}
    shorten = arguments.preset == "run" and preset["profile"] != "smoke"
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
        chosen = {k: v for k, v in budget.items() if k in declared}
        chosen |= _parsed(arguments.p, declared)
        check_parameters(notebook, chosen)
        jobs.append((notebook, chosen))
    check_writable(folder)
    if arguments.processes != 1:
        _run_apart(arguments, folder, jobs)
        return
    for notebook, chosen in tqdm(jobs, desc="notebooks", unit="notebook"):
        try:
            ran = run_notebook(notebook, folder, chosen)
        except OSError as error:
            raise ValueError(
                f"{notebook.name}: {error}; finished runs in {folder} are as they were: "
                "make room there, or choose --out"
            ) from error
        tqdm.write(f"{notebook.stem}: {'done' if ran else 'up to date'}", file=sys.stderr)


def main() -> None:
    """Run all notebooks of a preset, or one."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--notebook", default="", help="run only those whose name starts so: 02")
    parser.add_argument("--profile", help="instead of the preset's")
    parser.add_argument("--out", type=Path, help="folder; default runs/<profile or preset>")
    parser.add_argument("--processes", type=int, default=1, help="notebooks at a time")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    try:
        with interruptible():
            _run_all(parser.parse_args())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
