"""Run notebooks with papermill, strictly and only when needed; `make run` and `make studies`.

Unknown parameters are refused. A notebook runs in the caller's working directory and writes into
a temporary folder. Its files move to their place only after success. It does not run again if its
source, parameters, library, weights, pictures and outputs are those of its finished run.
papermill is imported only to run something.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import psutil
from tqdm import tqdm

from weclip_lib.commands import Run
from weclip_lib.data.profiles import get_profile
from weclip_lib.data.settings import read_pairs
from weclip_lib.storage.files import Unusable, check_writable, in_a_line, only_one
from weclip_lib.storage.provenance import ROOT, outside_results
from weclip_lib.studies.parameters import (
    NOTEBOOKS,
    about,
    check_run,
    declared_parameters,
    read_parameters,
    run_name,
)
from weclip_lib.studies.records import (
    Record,
    file_hash,
    is_done,
    key_of,
    made_by,
    read_record,
    record_file,
    states,
    write_record,
)

PRESETS = {
    "run": {"profile": "mini", "seed": 0, "seed_count": 1, "steps": 100, "pictures": 200},
    "studies": {"profile": "mini", "seed": 0, "seed_count": 3, "steps": 0, "pictures": 0},
}


def _joined(outputs: list) -> list:
    """Join successive pieces of one stream in the outputs of a cell."""
    joined: list = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == last.output_type == "stream" and last.name == output.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _last_line_of_bars(output: dict) -> dict:
    """Remove states of progress bars that a terminal would have overwritten."""
    if output.output_type == "stream":
        lines = output.text.split("\n")
        output.text = "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines)
    return output


def _tidy(executed: Path) -> None:
    """Remove papermill's notes (paths and times), and all but the last state of each bar."""
    import nbformat

    notebook = nbformat.read(executed, as_version=4)
    for item in (notebook, *notebook.cells):
        item.metadata.pop("papermill", None)
        if "outputs" in item:
            item.outputs = [_last_line_of_bars(output) for output in _joined(item.outputs)]
    nbformat.write(notebook, executed)


def _keep_strangers(folder: Path, notebook: Path, names: Iterable[str], about: str) -> None:
    """Refuse to replace files that no run of the notebook wrote.

    Raises:
        ValueError: It names the first such file, and ends with `about`.
    """
    known: dict[str, str] = {}
    if record_file(folder, notebook.stem).exists():
        try:
            record = read_record(folder, notebook.stem)
        except Unusable:  # the record is damaged: nobody knows what the run wrote
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


def _keep_other_run(folder: Path, notebook: Path, parameters: dict) -> None:
    """Refuse to replace the results of other parameters.

    Raises:
        ValueError: It names the folder, and the first parameter that differs.
    """
    try:
        there = read_record(folder, notebook.stem)
    except Unusable:
        return
    names = sorted(there.parameters.keys() | parameters.keys())
    kept = {name: about.default for name, about in declared_parameters(notebook).items()}
    before, now = kept | there.parameters, kept | parameters
    for name in names:
        if there.key and before.get(name) != now.get(name):
            raise ValueError(
                f"{folder} holds a run of {notebook.name} with {name} {before.get(name)!r}, not "
                f"{now.get(name)!r}: choose another folder by --out, or remove that run"
            )


def _move(partial: Path, folder: Path, stem: str, key: str, parameters: dict) -> None:
    """Move the files of a run to their place, and record them; keep edited files there."""
    files = {name: file_hash(path) for name, path in _files(partial).items()}
    try:
        old = read_record(folder, stem)
    except Unusable:
        old = Record("", {})
    known = {n: d for n, d in (old.earlier | old.files).items() if (folder / n).is_file()}
    write_record(folder, stem, Record("", parameters, files, known))  # if this stops half-way
    for name, digest in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        ours = (digest, old.files.get(name), old.earlier.get(name))
        if name in known and file_hash(target) not in ours:
            aside = _free_name(target)
            target.replace(aside)
            tqdm.write(f"{target} was changed since: kept as {aside.name}", file=sys.stderr)
        (partial / name).replace(target)
    shutil.rmtree(partial)
    earlier = {name: digest for name, digest in known.items() if name not in files}
    write_record(folder, stem, Record(key, parameters, files, earlier))


def _files(partial: Path) -> dict[str, Path]:
    """List all files of a run by relative path, without locks."""
    found = {p.relative_to(partial).as_posix(): p for p in partial.rglob("*") if p.is_file()}
    return {name: path for name, path in sorted(found.items()) if ".locks" not in path.parts}


def _free_name(path: Path) -> Path:
    """Find a free name beside an edited file."""
    number = 1
    while (free := path.with_name(f"{path.name}.edited-{number}")).exists():
        number += 1
    return free


def _from_here(path: Path) -> str:
    """Make a path relative to the working directory, so that the machine is not named."""
    try:
        return os.path.relpath(path)
    except ValueError:  # on another drive of Windows
        return str(path)


def _execute(notebook: Path, executed: Path, parameters: dict, log: TextIO | None) -> None:
    """Run a notebook here; save it as `executed`.

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
            progress_bar=not log and {"desc": notebook.stem, "leave": False},
            extra_arguments=["--IPKernelApp.log_level=50"],
            store_widget_state=False,  # explorers include a picture of themselves
            stderr_file=log or sys.stderr,  # progress bars of long cells
        )
    except PapermillExecutionError as error:
        said = " ".join(f"{error.ename}: {error.evalue}".split())
        raise ValueError(f"{notebook.name} failed, see {executed}: {said}") from error
    except RuntimeError as error:
        raise ValueError(
            f"{notebook.name}: its kernel did not start, or died ({in_a_line(error)}): see whether "
            "there is memory enough"
        ) from error


@dataclass(frozen=True)
class Task:
    """A notebook to run."""

    name: str  # in messages
    notebook: Path
    parameters: dict
    folder: Path  # of its outputs
    out: Path  # into which this and similar tasks write
    log: Path  # of progress, where several run at a time
    replaces: bool = False  # a run with other parameters in the same folder


def run_notebook(
    notebook: Path,
    folder: Path,
    parameters: dict,
    *,
    out: Path | None = None,
    log: TextIO | None = None,
    replaces: bool = False,
) -> bool:
    """Run one notebook into `folder`, in the caller's directory, unless it is done.

    Args:
        out: Folder into which this and similar runs write; default `folder`.
        log: Where progress goes; default standard error.
        replaces: Whether it may replace a run with other parameters.

    Returns:
        Whether it ran.

    Raises:
        ValueError: Before the run, on a bad parameter, if another process runs the notebook into
            that folder, or if files of others are in the way. Later, if a cell fails, or such
            files are in the way; `folder` stays as it was.
    """
    check_run(notebook, parameters)
    if (given := parameters.get("data_dir")) and Path(given).resolve() == folder.resolve():
        raise ValueError(f"{folder} holds the pictures: choose another folder for the outputs")
    with only_one(folder / notebook.stem):
        maker = made_by(notebook, parameters)
        before = states(notebook, parameters, out or folder)
        if is_done(folder, notebook, key_of(maker, before)):
            return False
        if not replaces:
            _keep_other_run(folder, notebook, parameters)
        executed = f"notebooks/{notebook.name}"
        certain = (executed, f"{notebook.stem}.csv", f"{notebook.stem}.json")
        _keep_strangers(folder, notebook, certain, "")
        partial = folder / ".partial" / notebook.stem
        if partial.exists():
            shutil.rmtree(partial)
        (partial / "notebooks").mkdir(parents=True)
        place = {"out_dir": _from_here(partial)}
        told = place if "out_dir" in declared_parameters(notebook) else {}
        _execute(notebook, partial / executed, parameters | told, log)
        _tidy(partial / executed)
        _keep_strangers(folder, notebook, _files(partial), f"; what was made is in {partial}")
        # What the run itself made is hashed as it is now; all else, as it was at the start.
        after = states(notebook, parameters, out or folder)
        key = key_of(maker, {name: state or after[name] for name, state in before.items()})
        _move(partial, folder, notebook.stem, key, parameters)
    return True


def run_tasks(tasks: Sequence[Task], at_once: int) -> list[str]:
    """Run notebooks, each in its own kernel; return the names of those that failed.

    A kernel ends with the process that started it, however that ends. On an interrupt, all
    kernels are ended first, and nothing is left half-written.

    Args:
        at_once: Notebooks at a time. Several share the cores, and write progress into logs.
    """
    if at_once > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    failed = []
    with ThreadPoolExecutor(at_once) as pool:
        coming = {pool.submit(_run_task, task, logged=at_once > 1): task for task in tasks}
        try:
            for future in tqdm(as_completed(coming), total=len(tasks), unit="notebook"):
                task = coming[future]
                try:
                    said = "done" if future.result() else "up to date"
                except (ValueError, OSError) as error:
                    failed.append(task.name)
                    said = f"failed: {error}"
                tqdm.write(f"{task.name}: {said}", file=sys.stderr)
        except BaseException:
            _end_kernels(pool, coming)
            raise
    return failed


def _run_task(task: Task, *, logged: bool) -> bool:
    from jupyter_core.utils import ensure_event_loop

    try:
        with ExitStack() as opened:
            log = None
            if logged:
                task.log.parent.mkdir(parents=True, exist_ok=True)
                log = opened.enter_context(task.log.open("a", encoding="utf-8"))
            return run_notebook(
                task.notebook,
                task.folder,
                task.parameters,
                out=task.out,
                log=log,
                replaces=task.replaces,
            )
    finally:
        ensure_event_loop().close()  # Jupyter makes one per thread


def _end_kernels(pool: ThreadPoolExecutor, coming: Iterable[Future]) -> None:
    """Start nothing more, and kill all kernels; later rounds find those just being started.

    A notebook without its kernel fails within a second.
    """
    pool.shutdown(wait=False, cancel_futures=True)
    while not all(future.done() for future in coming):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        time.sleep(0.1)


def run(chosen: Run) -> None:
    """Run `weclip run`: check the request, then run it.

    Raises:
        ValueError: It names what cannot be done, or what failed.
    """
    preset = dict(PRESETS[chosen.preset])
    if chosen.profile:
        preset["profile"] = get_profile(chosen.profile).name
        if chosen.profile == "smoke":
            preset |= {"steps": 0, "pictures": 0}
    shorten = chosen.preset == "run" and preset["profile"] != "smoke"
    start = chosen.notebook.zfill(2) if chosen.notebook.isdecimal() else chosen.notebook
    found = NOTEBOOKS.glob(f"{start}*.ipynb")
    notebooks = sorted(path for path in found if path.stem[0].isdigit())
    if not notebooks:
        raise ValueError(f"no notebook starts with {chosen.notebook!r} in {NOTEBOOKS}")
    settings = read_pairs(get_profile(preset["profile"]), chosen.s)
    for name, text in chosen.p:
        if name == "profile":
            raise ValueError(f"-p profile {text}: give --profile {text}")
        if name == "settings":
            raise ValueError("-p settings: give -s NAME VALUE for every setting")
    default = preset["profile"] if chosen.preset == "run" else chosen.preset
    asked = {**dict(chosen.p), **settings}
    usual = f"{default},{run_name(asked)}" if asked else default
    folder = outside_results(chosen.out or ROOT / "runs" / usual)
    tasks = []
    for notebook in notebooks:
        declared = declared_parameters(notebook)
        budget = preset | (about(notebook).get("short", {}) if shorten else {})
        parameters = {k: v for k, v in budget.items() if k in declared and k not in settings}
        parameters |= read_parameters(notebook, chosen.p)
        if settings:
            parameters["settings"] = settings
        check_run(notebook, parameters)
        log = folder / ".runner" / f"{notebook.stem}.log"
        new = chosen.out is None and not asked  # a preset may change with the library
        tasks.append(Task(notebook.stem, notebook, parameters, folder, folder, log, new))
    check_writable(folder)
    if failed := run_tasks(tasks, chosen.processes):
        raise ValueError(f"{', '.join(failed)} failed; what has finished in {folder} is as it was")
    tqdm.write(f"results are in {_from_here(folder)}", file=sys.stderr)
