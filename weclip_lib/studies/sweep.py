"""Run one notebook with a grid of parameters: `make sweep GRID=FILE`.

A grid is a YAML file with a notebook, its parameters, and settings (`data.settings`). Every value
of a list is run; of several lists, every combination. A setting that is a list itself, such as
`scales`, is written as a list of lists. Settings below `each` are changed one at a time. Each run
is a papermill job with its own kernel and its own folder. So a failed job does not affect the
others, and a finished one is not repeated. A workflow engine can run the same jobs by the steps
`list`, `waiting`, `job` and `collect`. Paths in the file are relative to the caller's working
directory.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tqdm import tqdm

from weclip_lib.commands import Sweep
from weclip_lib.data.settings import as_text, as_value
from weclip_lib.storage.files import check_writable, whole
from weclip_lib.storage.lists import read_yaml
from weclip_lib.storage.provenance import ROOT, outside_results
from weclip_lib.studies.parameters import NOTEBOOKS, check_run, run_name
from weclip_lib.studies.records import is_done, run_key
from weclip_lib.studies.runner import Task, run_tasks

KEYS = ("notebook", "parameters", "settings", "each")


@dataclass(frozen=True)
class Job:
    """One run of the grid."""

    name: str  # of its folder: the values that vary
    parameters: dict  # of the notebook
    varied: dict  # parameters and settings that the grid varies


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
        raise ValueError(
            f"{path} has {found}: it takes `notebook`, `parameters`, `settings` and `each`"
        )
    known = sorted(p.stem for p in NOTEBOOKS.glob("[0-9]*.ipynb"))
    if grid["notebook"] not in known:
        raise ValueError(
            f"{path}: there is no notebook {grid['notebook']!r}: choose of {', '.join(known)}"
        )
    notebook = NOTEBOOKS / f"{grid['notebook']}.ipynb"
    parameters, settings, each = (_lists(path, grid, key) for key in KEYS[1:])
    alone = [{}, *({name: value} for name, values in each.items() for value in values)]
    if "settings" in parameters:
        raise ValueError(f"{path}: write `settings` beside `parameters`, not below it")
    if both := [name for name in each if name in settings]:
        raise ValueError(f"{path}: {both[0]} is in `settings` and in `each`: leave one out")
    jobs = []
    for *values, one in product(*parameters.values(), *settings.values(), alone):
        chosen = dict(zip(parameters, values, strict=False))
        changed = dict(zip(settings, values[len(parameters) :], strict=True)) | one
        told = chosen | ({"settings": changed} if changed else {})
        try:
            check_run(notebook, told)
        except ValueError as error:
            more = " (a list of lists, since every item is one run)" * ("give a list" in str(error))
            raise ValueError(f"{path}: {error}{more}") from error
        lists = parameters | settings
        varied = {n: v for n, v in (chosen | changed).items() if len(lists.get(n, ())) > 1}
        if each:
            varied["changed"] = as_text(one) or "nothing"
        jobs.append(Job(run_name(varied), told, varied))
    twice = [job.name for number, job in enumerate(jobs) if job in jobs[:number]]
    if twice:
        raise ValueError(f"{path}: {twice[0]} comes a second time: name every value once")
    folder = outside_results(out or ROOT / "runs" / "sweeps" / path.stem)
    return Grid(path, notebook, tuple(jobs), folder)


def _lists(path: Path, grid: dict, key: str) -> dict[str, list]:
    """Read the values of each name below a key of a grid: one, or a list.

    Raises:
        ValueError: If it is something else.
    """
    found = {} if grid.get(key) is None else grid[key]
    if not isinstance(found, dict):
        raise ValueError(f"{path}: `{key}` is to be names with values, not {found!r}")
    lists = {name: value if isinstance(value, list) else [value] for name, value in found.items()}
    empty = [name for name, values in lists.items() if not values]
    if empty:
        raise ValueError(f"{path}: {key[:-1]} {empty[0]} has an empty list: give values")
    return lists


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
            varied = {n: as_value(v) for n, v in job.varied.items() if n not in table}
            tables.append(table.assign(**varied))
    if not tables:
        raise ValueError(f"no job of {grid.folder} has finished: run `weclip sweep run` first")
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
