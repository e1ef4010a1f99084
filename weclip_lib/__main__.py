"""The start and the end of every command: `weclip COMMAND` or `python -m weclip_lib COMMAND`."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from itertools import pairwise

import tyro

from weclip_lib import commands

# Imports of a command take seconds. So modules are only named here, and imported when needed.
COMMANDS = {
    "train": (commands.Train, "training.train", "run"),
    "score": (commands.Score, "evaluation.inference", "run_score"),
    "verify": (commands.Verify, "studies.verify", "run"),
    "predict": (commands.Predict, "evaluation.inference", "run_predict"),
    "doctor": (commands.Doctor, "data.doctor", "run"),
    "download": (commands.Download, "data.download", "run"),
    "prepare": (commands.Prepare, "data.download", "prepare"),
    "run": (commands.Run, "studies.runner", "run"),
    "settings": (commands.ListSettings, "data.settings", "run"),
    "sweep": (commands.Sweep, "studies.sweep", "run"),
    "runs": (commands.Runs, "studies.compare", "list_runs"),
    "compare": (commands.Compare, "studies.compare", "compare_runs"),
    "publish": (commands.Publish, "studies.results", "run"),
    "bench": (commands.Bench, "tools.bench", "run"),
    "pretrain": (commands.Pretrain, "world.pretrain", "run"),
    "site": (commands.Site, "tools.site", "run"),
}


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGTERM interrupt the block as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse_empty_paths(arguments: Sequence[str]) -> None:
    """Refuse `--out ""`, which would mean the current folder; a script's variable is unset then."""
    if not arguments or arguments[0] not in COMMANDS:
        return
    settings = fields(COMMANDS[arguments[0]][0])
    paths = {field.name for field in settings if "Path" in str(field.type)}
    for option, value in pairwise(arguments):
        if value == "" and option.removeprefix("--") in paths:
            raise ValueError(f"{option} is empty: give a path")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; an expected error prints one line with `error:` and no traceback."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        _refuse_empty_paths(given)
        with _interruptible():
            chosen = tyro.extras.subcommand_cli_from_dict(
                {name: settings for name, (settings, _, _) in COMMANDS.items()},
                prog="weclip",
                description="Weakly supervised segmentation with a frozen CLIP.",
                args=given,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
            _, module, function = COMMANDS[given[0]]
            getattr(import_module(f"weclip_lib.{module}"), function)(chosen)
    except (ValueError, FloatingPointError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted: start it again, and what has finished is kept") from None


if __name__ == "__main__":
    main()
