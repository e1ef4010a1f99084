"""Read finished runs: what a notebook, `weclip train` or `weclip score` left in a folder.

All three are read into one form: facts about the run, and a table of scores with the columns of a
notebook's.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from weclip_lib.storage.files import Unusable, reading
from weclip_lib.studies.parameters import NOTEBOOKS, declared_parameters
from weclip_lib.studies.results import SCHEMAS

TABLE = re.compile(r"\d\d_.+\.(csv|json)")
TRAIN, SCORE = "train", "score"  # runs of these commands, in the place of a notebook's name
FILES = {"trained.safetensors": TRAIN, "curve.csv": TRAIN, "scores.csv": SCORE}
AGAIN = "run the notebook again"
APART = ("notebook", "parameters", "effective", "versions", "finished", "clean", "order")
NO_SEED, UNKNOWN_SEED = -1, -2  # a stage without randomness; nobody recorded it
KEYS = ["variant", "split", "metric", "unit"]  # of a score


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    facts: dict[tuple[str, str], object]  # by group and name
    chosen: dict[str, object]  # what somebody set
    table: pd.DataFrame  # scores, as a notebook's; variants do not name settings
    order: list[str]  # variants that come first
    when: datetime  # when it finished, in UTC


def _stem(name: str) -> str:
    """Return the notebook that a table belongs to: without the `_curve` and so on of its kind."""
    stem = Path(name).stem
    for kind in filter(None, SCHEMAS):
        base = stem.removesuffix(kind)
        if base != stem and (NOTEBOOKS / f"{base}.ipynb").exists():
            return base
    return stem


def run_of(file: str) -> str:
    """Name the run that a file belongs to; empty if it is of none."""
    return FILES.get(file) or (_stem(file) if TABLE.fullmatch(file) else "")


def runs_in(folder: Path) -> list[str]:
    """Name the runs in a folder, finished or not: notebooks, `train`, `score`."""
    files = {path.name for path in folder.iterdir()}
    notebooks = [
        stem
        for stem in sorted({_stem(name) for name in files if TABLE.fullmatch(name)})
        if (NOTEBOOKS / f"{stem}.ipynb").exists() or {f"{stem}.csv", f"{stem}.json"} <= files
    ]
    partial = folder / ".partial"  # of notebooks that have not finished
    stopped = [path.name for path in partial.iterdir()] if partial.is_dir() else []
    stopped = sorted(name for name in stopped if re.match(r"\d\d_", name))
    notebooks += [name for name in stopped if name not in notebooks]
    kinds = {kind for name, kind in FILES.items() if name in files}
    kinds |= {TRAIN for name in files if re.fullmatch(r"checkpoint-\d+", name)}
    if notebooks:  # notebook 08 writes a decoder, too
        kinds.discard(TRAIN)
    return notebooks + sorted(kinds)


def read_run(folder: Path, name: str) -> Finished:
    """Read a finished run.

    Args:
        name: Of the notebook, or `train` or `score`.

    Raises:
        Unusable: If it did not finish, or a file is damaged.
    """
    if name in (TRAIN, SCORE):
        return _read_training(folder) if name == TRAIN else _read_scores(folder)
    table, path = folder / f"{name}.csv", folder / f"{name}.json"
    _all_there(table, path, remedy=AGAIN)
    with reading(path, AGAIN):
        about = json.loads(path.read_bytes())
        if about.get("notebook", name) != name:
            raise ValueError(f"it is of {about['notebook']}")
        parameters = dict(_names(about["parameters"]))
        settings = _names(parameters.pop("settings", {}))
        facts = _grouped(given=settings, parameter=parameters, **_made_by(about))
        order = [_without(settings, variant) for variant in about.get("order", [])]
        when = written_at(path)
        if "finished" in about:
            when = datetime.fromisoformat(about["finished"]).astimezone(UTC)
    usual = _defaults(name)
    chosen = {key: v for key, v in parameters.items() if key not in usual or usual[key] != v}
    return Finished(facts, settings | chosen, _read_table(table, settings), order, when)


def _made_by(about: dict) -> dict[str, dict]:
    """Return what a run's provenance says, in groups: settings in effect, the run, versions."""
    run = {key: value for key, value in about.items() if key not in APART}
    if run.get("commit"):
        run["commit"] = run["commit"][:10] + " (changed)" * (about.get("clean") is False)
    effective, versions = (_names(about.get(key, {})) for key in ("effective", "versions"))
    return {"effective": effective, "run": run, "version": versions}


def _of_command(path: Path, command: str) -> dict[str, dict]:
    """Read the provenance of a command's run; nothing if it is from before there was one."""
    if not path.exists():
        return {}
    with reading(path, f"give its `weclip {command}` again"):
        about = _names(json.loads(path.read_bytes()))
        return {"parameter": _names(about["parameters"]), **_made_by(about)}


def _all_there(*files: Path, remedy: str) -> None:
    for path in files:
        if not path.exists():
            raise Unusable(f"{path} is not there, so this run did not finish: {remedy}")


def _names(value: object) -> dict:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} where there have to be names")
    return value


def _grouped(**groups: Mapping[str, object]) -> dict[tuple[str, str], object]:
    return {(group, name): v for group, found in groups.items() for name, v in found.items()}


@cache
def _defaults(notebook: str) -> dict[str, object]:
    """Return the parameters' defaults; none of a notebook that is not there."""
    path = NOTEBOOKS / f"{notebook}.ipynb"
    found = declared_parameters(path) if path.exists() else {}
    return {name: parameter.default for name, parameter in found.items()}


def written_at(path: Path) -> datetime:
    """Return when a file was written last, in UTC."""
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def _without(settings: Iterable[str], variant: str) -> str:
    """Remove the settings at the end of a variant's name, such as ` [box_threshold=0.3]`."""
    told = ", ".join(f"{re.escape(name)}=.*" for name in sorted(settings))
    found = re.fullmatch(rf"(.*?) \[{told}\]", variant) if told else None
    return found[1] if found else variant


def _read_table(path: Path, settings: Iterable[str]) -> pd.DataFrame:
    """Read a notebook's scores, and remove the settings from the variants.

    Raises:
        Unusable: If the file is damaged.
    """
    with reading(path, AGAIN):
        table = _whole_csv(path, dtype=str, keep_default_na=False)
        table = _checked(table[list(SCHEMAS[""])])
        if table["profile"].nunique() > 1:
            raise ValueError("it mixes profiles, or is cut")
        table["variant"] = [_without(settings, variant) for variant in table["variant"]]
        twice = table[table.duplicated([*KEYS, "seed"])]
        if len(twice):
            raise ValueError(f"{' '.join(twice.iloc[0][KEYS])} is there twice for a seed")
    return table


def _whole_csv(path: Path, **how: object) -> pd.DataFrame:
    """Read a table; refuse a last line without an end, since its number may be a part of one."""
    if not path.read_bytes().endswith(b"\n"):
        raise ValueError("its last line is cut")
    return pd.read_csv(path, **how)


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    """Give columns their types, and refuse a table without rows, or with gaps."""
    if table.empty or table.isna().any(axis=None):
        raise ValueError("it is empty or cut")
    table = table.astype({"value": float, "n_images": int, "seed": int})
    if not np.isfinite(table["value"]).all():
        raise ValueError("a value is no number")
    return table


def _read_training(folder: Path) -> Finished:
    """Read what `weclip train` wrote; its scores are the last points of the curve.

    Seed and settings are known only while a checkpoint is there.
    """
    from weclip_lib.storage.tensors import read_note  # it imports torch

    path, curve = folder / "trained.safetensors", folder / "curve.csv"
    _all_there(path, curve, remedy="give its `weclip train` again")
    note, settings = read_note(path), {}
    states = folder.glob("checkpoint-*/state.json")
    if newest := max(states, key=lambda p: (len(p.parent.name), p.parent.name), default=None):
        with reading(newest, f"remove {newest.parent}"):
            settings = _names(json.loads(newest.read_bytes())["settings"])
    with reading(curve, "train again, into an empty folder"):
        points = _whole_csv(curve).groupby("metric", sort=False).tail(1)
        validated = points["metric"] == "miou"
        table = points.assign(
            variant=[f"step {step}" for step in points["iteration"]],
            split=np.where(validated, "validation", "training"),
            unit=np.where(validated, "percent", ""),
            n_images=0,
            seed=settings.get("seed", UNKNOWN_SEED),
            profile=str(note.get("profile", "")),
        )
        table = _checked(table[list(SCHEMAS[""])])
    chosen = {name: note[name] for name in ("backbone", "steps") if name in note}
    facts = _grouped(note=note, setting=settings, **_of_command(folder / "train.json", TRAIN))
    return Finished(facts, chosen, table, [], written_at(path))


def _read_scores(folder: Path) -> Finished:
    """Read what `weclip score` wrote; it has no seed."""
    path, metrics = folder / "scores.csv", ["miou", "pixel accuracy"]
    with reading(path, "give its `weclip score` again"):
        table = _whole_csv(path).melt(["prediction", "split", "pictures"], metrics, "metric")
        table = table.rename(columns={"prediction": "variant", "pictures": "n_images"})
        table = table.assign(unit="percent", seed=UNKNOWN_SEED, profile="")
        table = _checked(table[list(SCHEMAS[""])])
        chosen = {"split": table["split"].iloc[0], "pictures": int(table["n_images"].iloc[0])}
    facts = _grouped(**_of_command(folder / "score.json", SCORE))
    return Finished(facts, chosen, table, list(table["variant"].unique()), written_at(path))
