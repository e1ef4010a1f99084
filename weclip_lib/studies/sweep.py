"""Run one notebook with a grid of parameters: `make sweep GRID=FILE`.

A grid is a YAML file with a notebook and its parameters. Every value of a list is run; of several
lists, every combination. Each run is a papermill job with its own kernel and its own folder. So a
failed job does not affect the others, and a finished one is not repeated. A workflow engine can
run the same jobs by the steps `list`, `waiting`, `job` and `collect`. Paths in the file are
relative to the caller's working directory.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path

from tqdm import tqdm

from weclip_lib.commands import Sweep
from weclip_lib.storage.files import check_writable, whole
from weclip_lib.storage.lists import read_yaml
from weclip_lib.storage.provenance import ROOT, outside_results
from weclip_lib.studies.records import is_done, run_key
from weclip_lib.studies.runner import NOTEBOOKS, Task, check_parameters, run_tasks

KEYS = ("notebook", "parameters")
LONGEST_NAME = 120  # characters of a job's folder


@dataclass(frozen=True)
class Job:
    """One run of the grid."""

    name: str  # of its folder: the values that vary
    parameters: dict  # of the notebook
    varied: dict  # parameters that the grid varies


@dataclass(frozen=True)
class Grid:
    """The jobs of a grid file."""

    file: Path
    notebook: Path
    jobs: tuple[Job, ...]
    folder: Path  # of all its runs

    def job(self, name: str) -> Job:
        """Find a job by name.

        Raises:
            ValueError: If there is none.
        """
        found = [job for job in self.jobs if job.name == name]
        if not found:
            raise ValueError(
                f"no job {name!r}: this grid has {', '.join(j.name for j in self.jobs)}"
            )
        return found[0]

    def done(self, job: Job) -> bool:
        """Whether the job has finished, with the library and notebook as they are now."""
        key = run_key(self.notebook, job.parameters, self.folder)
        return is_done(self.folder / job.name, self.notebook, key)


def _job_name(varied: dict) -> str:
    """Make a folder name for any disk; a hash is added if characters are replaced."""
    text = ",".join(f"{name}={value}" for name, value in varied.items()) or "only"
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "=,._-") else "-" for c in text)
    # Some disks ignore case, or drop a full stop at the end.
    if safe == text.lower().removesuffix(".") and len(text) <= LONGEST_NAME:
        return text
    digest = sha256(json.dumps(varied, sort_keys=True).encode()).hexdigest()[:8]
    return f"{safe[: LONGEST_NAME - 9]}-{digest}"


def read_grid(path: Path, out: Path | None = None) -> Grid:
    """Read a grid file, and check every job before any runs.

    Args:
        out: Folder of the runs; default runs/sweeps/<name of the file>.

    Raises:
        ValueError: It names what is wrong in the file, or with the folder.
    """
    if not path.exists():
        raise ValueError(f"{path} is not there: give a grid file, such as workflow/grids/seeds.yml")
    grid = read_yaml(path)
    if not isinstance(grid, dict) or not set(grid) <= set(KEYS) or "notebook" not in grid:
        found = ", ".join(map(str, grid)) if isinstance(grid, dict) else type(grid).__name__
        raise ValueError(f"{path} has {found}: it takes `notebook` and `parameters`")
    known = sorted(p.stem for p in NOTEBOOKS.glob("[0-9]*.ipynb"))
    if grid["notebook"] not in known:
        raise ValueError(
            f"{path}: there is no notebook {grid['notebook']!r}: choose of {', '.join(known)}"
        )
    notebook = NOTEBOOKS / f"{grid['notebook']}.ipynb"
    parameters = {} if grid.get("parameters") is None else grid["parameters"]
    if not isinstance(parameters, dict):
        raise ValueError(f"{path}: `parameters` is to be names with values, not {parameters!r}")
    lists = {n: v if isinstance(v, list) else [v] for n, v in parameters.items()}
    empty = [name for name, values in lists.items() if not values]
    if empty:
        raise ValueError(f"{path}: parameter {empty[0]} has an empty list: give values")
    jobs = []
    for values in product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        try:
            check_parameters(notebook, chosen)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        varied = {name: value for name, value in chosen.items() if len(lists[name]) > 1}
        jobs.append(Job(_job_name(varied), chosen, varied))
    twice = [job.name for number, job in enumerate(jobs) if job in jobs[:number]]
    if twice:
        raise ValueError(f"{path}: {twice[0]} comes a second time: name every value once")
    folder = outside_results(out or ROOT / "runs" / "sweeps" / path.stem)
    return Grid(path, notebook, tuple(jobs), folder)


def run_jobs(grid: Grid, jobs: Sequence[Job], at_once: int) -> list[str]:
    """Run unfinished jobs, `at_once` at a time; return the names of failed ones."""
    tasks = []
    for job in jobs:
        folder = grid.folder / job.name
        log = folder / "log.txt"
        tasks.append(Task(job.name, grid.notebook, job.parameters, folder, grid.folder, log))
    return run_tasks(tasks, at_once)


def collect(grid: Grid) -> Path:
    """Join the score tables of all finished jobs; add a column for each varied parameter.

    Raises:
        ValueError: If no job has finished.
    """
    import pandas as pd

    tables = []
    for job in grid.jobs:
        if grid.done(job):
            table = pd.read_csv(grid.folder / job.name / f"{grid.notebook.stem}.csv")
            # The table has its own column `seed`; the notebook's first seed is dropped.
            varied = {name: value for name, value in job.varied.items() if name not in table}
            tables.append(table.assign(**varied))
    if not tables:
        raise ValueError(f"no job of {grid.folder} has finished: nothing to collect")
    path = grid.folder / "sweep.csv"
    with whole(path) as partial:
        pd.concat(tables, ignore_index=True).to_csv(partial, index=False, lineterminator="\n")
    return path


def run(chosen: Sweep) -> None:
    """Run `weclip sweep`.

    Raises:
        ValueError: It says what cannot be done, or how many runs failed.
    """
    grid = read_grid(chosen.grid.resolve(), chosen.out)
    if chosen.action in ("list", "waiting"):
        jobs = [job for job in grid.jobs if chosen.action == "list" or not grid.done(job)]
        sys.stdout.write("".join(f"{job.name}\n" for job in jobs))
        return
    check_writable(grid.folder)
    failed = []
    if chosen.action != "collect":
        jobs = [grid.job(chosen.name)] if chosen.action == "job" else grid.jobs
        failed = run_jobs(grid, jobs, chosen.processes)
    if chosen.action != "job" and len(failed) < len(grid.jobs):
        tqdm.write(f"wrote {collect(grid)}", file=sys.stderr)
    if failed:
        raise ValueError(f"{len(failed)} of {len(grid.jobs)} runs failed; see their logs")
