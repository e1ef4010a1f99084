"""Commands as processes of their own, so many at a time; failures are apart.

Each child holds one end of a pipe. When the parent closes the other end, or dies in whatever way,
the child interrupts itself; so nothing goes on without the parent, on any system. On Windows the
child then ends at once, elsewhere as after Ctrl-C. A kernel ends with the process that started it:
ipykernel looks for it every second.
"""

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

PATIENCE = 15.0  # seconds in which an interrupted process has to end; a kernel takes up to 5


@dataclass(frozen=True)
class Command:
    """A module of the library with its arguments, and where its output goes."""

    name: str
    arguments: tuple[str, ...]  # weclip_lib.studies.runner, run, ...
    log: Path


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM interrupt the block as Ctrl-C does; then say so, and how to go on."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("interrupted: start it again, and what has finished is kept") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_with_parent() -> None:
    """Wait for the parent's end, then interrupt this process."""
    while os.read(0, 1):  # not by sys.stdin, which Python locks when it ends
        pass
    if os.name != "nt":
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        time.sleep(PATIENCE)
    os._exit(1)


def _start(command: Command, threads: int) -> subprocess.Popen:
    """A command as a process of its own session, where the caller stands, adding to its log."""
    command.log.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "weclip_lib.studies.processes", *command.arguments]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with command.log.open("a", encoding="utf-8") as log:  # another's may be going on
        return subprocess.Popen(
            line,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _end(running: Sequence[subprocess.Popen]) -> None:
    """Have all of them interrupt themselves, and wait for it."""
    for process in running:
        process.stdin.close()
    until = time.monotonic() + PATIENCE + 5
    for process in running:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(log: Path) -> str:
    """What a command said last: why it failed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")


def run_commands(commands: Sequence[Command], processes: int, *, finished: int = 0) -> list[str]:
    """Run them, so many at a time, on all cores together; returns the names of those that failed.

    When interrupted, every running one is ended first.

    Args:
        finished: How many others have been done before: the progress bar counts them, too.

    Raises:
        ValueError: If `processes` is no number of processes.
    """
    if processes < 1:
        raise ValueError(f"{processes} processes: give 1 or more")
    threads = max(1, (os.cpu_count() or 1) // processes)
    waiting = list(commands)
    running: dict[subprocess.Popen, Command] = {}
    failed = []
    bar = tqdm(total=finished + len(commands), initial=finished, unit="run")
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                command = waiting.pop(0)
                running[_start(command, threads)] = command
            ended = [process for process in running if process.poll() is not None]
            for process in ended:
                command = running.pop(process)
                process.stdin.close()
                if process.returncode:
                    failed.append(command.name)
                    said = _last_line(command.log)
                    tqdm.write(f"{command.name}: failed, see {command.log}\n  {said}")
                bar.update()
            if not ended:
                time.sleep(0.05)
    finally:
        _end(list(running))
        bar.close()
    return failed


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
