"""Commands as processes of their own, so many at a time; failures are apart."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from weclip_lib.repro import ROOT


@dataclass(frozen=True)
class Command:
    """A module of the library with its arguments, and where its output goes."""

    name: str
    arguments: tuple[str, ...]  # weclip_lib.runner, run, ...
    log: Path


def _start(command: Command, threads: int) -> subprocess.Popen:
    """A command as a process of its own session, writing its log."""
    command.log.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", *command.arguments]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with command.log.open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            line, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def run_commands(commands: Sequence[Command], processes: int, *, finished: int = 0) -> list[str]:
    """Run them, so many at a time, on all cores together; returns the names of those that failed.

    When interrupted, every running one is ended.

    Args:
        finished: How many others have been done before: the progress bar counts them, too.

    Raises:
        ValueError: If `processes` is no number of processes.
    """
    if processes < 1:
        raise ValueError(f"{processes} processes: give 1 or more")
    threads = max(1, (os.cpu_count() or 1) // processes)
    running: dict[str, subprocess.Popen] = {}
    failed = []

    def run(command: Command) -> bool:
        running[command.name] = _start(command, threads)
        return running[command.name].wait() == 0

    with ThreadPoolExecutor(processes) as pool:
        futures = {pool.submit(run, command): command for command in commands}
        bar = tqdm(total=finished + len(commands), initial=finished, unit="run")
        try:
            for future in as_completed(futures):
                command = futures[future]
                if not future.result():
                    failed.append(command.name)
                    tqdm.write(f"{command.name}: failed, see {command.log}")
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
            raise
        finally:
            bar.close()
    return failed
