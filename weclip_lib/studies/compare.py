"""List runs, and compare settings and scores of several: `weclip runs` and `weclip compare`.

A run is what a notebook, `weclip train` or `weclip score` left in a folder. All three are read into
one form: facts about the run, and a table of scores with the columns of a notebook's.
"""

import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from weclip_lib.commands import Compare, Runs
from weclip_lib.storage.files import Unusable, check_writable, in_a_line, reading, whole
from weclip_lib.storage.provenance import RESULTS, ROOT, outside_results
from weclip_lib.studies.parameters import NOTEBOOKS, declared_parameters
from weclip_lib.studies.results import SCHEMAS, as_text, over_seeds

TABLE = re.compile(r"\d\d_.+\.(csv|json)")
TRAIN, SCORE = "train", "score"  # runs of these commands, in the place of a notebook's name
FILES = {"trained.safetensors": TRAIN, "curve.csv": TRAIN, "scores.csv": SCORE}
KEPT = ("cache", "decoders", "watched_runs")  # folders in runs/ with what studies use again
AGAIN = "run the notebook again"
GROUPS = ("given", "effective", "parameter", "note", "setting", "run", "version")  # of facts
WHOLE = {"effective": "effective settings", "setting": "settings"}  # a run has all of these or none
APART = ("notebook", "parameters", "effective", "versions", "finished", "clean", "order")
NO_SEED, UNKNOWN_SEED = -1, -2  # a stage without randomness; nobody recorded it
NOTHING = "-"
LISTED = ("run", "notebook", "profile", "seeds", "set", "device", "commit", "finished, UTC")
KEYS = ["variant", "split", "metric", "unit"]  # of a score
COLUMNS = [*KEYS, "run", "mean", "spread", "seeds", "pictures", "profile"]
COLUMNS += ["difference", "lowest", "highest", "pairs", "note"]


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


def runs_in(folder: Path) -> list[str]:
    """Name the runs in a folder, finished or not: notebooks, `train`, `score`."""
    files = {path.name for path in folder.iterdir()}
    notebooks = [
        stem
        for stem in sorted({_stem(name) for name in files if TABLE.fullmatch(name)})
        if (NOTEBOOKS / f"{stem}.ipynb").exists() or {f"{stem}.csv", f"{stem}.json"} <= files
    ]
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
        run = {key: value for key, value in about.items() if key not in APART}
        if run.get("commit"):
            run["commit"] = run["commit"][:10] + " (changed)" * (about.get("clean") is False)
        facts = _grouped(
            given=settings,
            effective=_names(about.get("effective", {})),
            parameter=parameters,
            run=run,
            version=_names(about.get("versions", {})),
        )
        order = [_without(settings, variant) for variant in about.get("order", [])]
        when = _written(path)
        if "finished" in about:
            when = datetime.fromisoformat(about["finished"]).astimezone(UTC)
    usual = _defaults(name)
    chosen = {key: v for key, v in parameters.items() if key not in usual or usual[key] != v}
    return Finished(facts, settings | chosen, _read_table(table, settings), order, when)


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


def _written(path: Path) -> datetime:
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
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        table = _checked(table[list(SCHEMAS[""])])
        if table["profile"].nunique() > 1:
            raise ValueError("it mixes profiles, or is cut")
        table["variant"] = [_without(settings, variant) for variant in table["variant"]]
        twice = table[table.duplicated([*KEYS, "seed"])]
        if len(twice):
            raise ValueError(f"{' '.join(twice.iloc[0][KEYS])} is there twice for a seed")
    return table


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
        points = pd.read_csv(curve).groupby("metric", sort=False).tail(1)
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
    return Finished(_grouped(note=note, setting=settings), chosen, table, [], _written(path))


def _read_scores(folder: Path) -> Finished:
    """Read what `weclip score` wrote; it records neither settings nor a seed."""
    path, metrics = folder / "scores.csv", ["miou", "pixel accuracy"]
    with reading(path, "give its `weclip score` again"):
        table = pd.read_csv(path).melt(["prediction", "split", "pictures"], metrics, "metric")
        table = table.rename(columns={"prediction": "variant", "pictures": "n_images"})
        table = table.assign(unit="percent", seed=UNKNOWN_SEED, profile="")
        table = _checked(table[list(SCHEMAS[""])])
        chosen = {"split": table["split"].iloc[0], "pictures": int(table["n_images"].iloc[0])}
    return Finished({}, chosen, table, list(table["variant"].unique()), _written(path))


def _shown(value: object) -> str:
    """Write a value on one line; hashes are shortened, and `...` is a value that is not there."""
    if value is ... or value is None:
        return NOTHING
    if isinstance(value, str):
        short = value[:10] if re.fullmatch("[0-9a-f]{20,}", value) else value
        return " ".join(short.split()) or "''"
    return json.dumps(value)


def _spans(seeds: Collection[int]) -> str:
    """Write seeds as `0-2` if they follow each other, else as `0, 2`."""
    found = sorted(seed for seed in seeds if seed >= 0)
    if len(found) > 2 and found[-1] - found[0] == len(found) - 1:
        return f"{found[0]}-{found[-1]}"
    return ", ".join(map(str, found)) or ("unknown" if UNKNOWN_SEED in seeds else "none")


def _from_here(path: Path) -> str:
    with suppress(ValueError):  # on another drive of Windows
        return os.path.relpath(path)
    return str(path)


def _lines(columns: Sequence[str], rows: Iterable[Sequence[str]], style: str = "pipe") -> str:
    """Write rows as a table of text; `pipe` is Markdown."""
    table = pd.DataFrame(list(rows), columns=columns)
    return f"{table.to_markdown(index=False, disable_numparse=True, tablefmt=style)}\n"


def _starts(name: str, wanted: str) -> bool:
    """Whether a run is of the wanted notebook: `3`, `03` or the beginning of its name."""
    return name.startswith(wanted.zfill(2) if wanted.isdecimal() else wanted)


def list_runs(chosen: Runs) -> None:
    """Run `weclip runs`; a line also names each run that did not finish or is damaged.

    Raises:
        ValueError: If a given path is no folder.
    """
    for place in chosen.folders:
        if not place.is_dir():
            raise ValueError(f"{place} is no folder: give one with runs in it or below it")
    places = chosen.folders or [p for p in (ROOT / "runs", RESULTS) if p.is_dir()]
    lines = [
        _line(folder, name)
        for folder in _folders(places)
        for name in runs_in(folder)
        if _starts(name, chosen.notebook)
    ]
    if lines:
        rows = [row for _, row in sorted(lines, key=lambda line: line[0])]
        sys.stdout.write(_lines(LISTED, rows, "plain"))
    else:
        tqdm.write(f"no such run in {', '.join(map(_from_here, places))}", file=sys.stderr)


def _folders(places: Iterable[Path]) -> Iterator[Path]:
    """Yield folders and all below them once, without hidden ones and what studies keep.

    A folder that cannot be read is named on standard error.
    """

    def say(error: OSError) -> None:
        tqdm.write(f"{error.filename} cannot be read: {in_a_line(error)}", file=sys.stderr)

    seen = set()
    for place in places:
        for where, inside, _ in os.walk(place, onerror=say):
            inside[:] = sorted(n for n in inside if not n.startswith(".") and n not in KEPT)
            if (real := os.path.realpath(where)) not in seen:
                seen.add(real)
                yield Path(where)


def _line(folder: Path, name: str) -> tuple[datetime, list[str]]:
    """Describe a run, or say what is wrong with it; with the time that decides its place."""
    start = [_from_here(folder), name]
    try:
        run = read_run(folder, name)
    except (Unusable, OSError) as error:
        said = str(error).replace(f"{folder}{os.sep}", "")
        return _written(folder), [*start, *(NOTHING for _ in LISTED[3:]), said]
    told = {key: v for key, v in run.chosen.items() if key not in ("profile", "seed", "seed_count")}
    about = (
        run.table["profile"].iloc[0],
        _spans(set(run.table["seed"])),
        ", ".join(f"{key}={_shown(value)}" for key, value in told.items()),
        run.facts.get(("run", "device")),
        run.facts.get(("run", "commit")),
        f"{run.when:%Y-%m-%d %H:%M}",
    )
    return run.when, [*start, *(str(value or NOTHING) for value in about)]


def compare_runs(chosen: Compare) -> None:
    """Run `weclip compare`.

    Raises:
        ValueError: If a path is no run, the runs are not of one notebook, one is damaged, or the
            comparison cannot be written.
    """
    found = {path: _found(path, chosen.notebook) for path in chosen.runs}
    name = _shared({path: names for path, (_, names) in found.items()})
    folders = [folder for folder, _ in found.values()]
    if len({os.path.realpath(folder) for folder in folders}) < len(chosen.runs):
        raise ValueError(f"a run is given twice ({', '.join(map(str, chosen.runs))}): give others")
    labels = short_names(folders)
    runs = {label: read_run(folder, name) for label, folder in zip(labels, folders, strict=True)}
    if chosen.out:
        _check_out(chosen.out)
    compared = compare_scores(runs)
    sys.stdout.write(f"{name}: {', '.join(labels)}\n\n{_facts_text(runs)}\n")
    sys.stdout.write(_scores_text(compared, labels))
    if chosen.out:
        with whole(chosen.out) as partial:
            compared.to_csv(partial, index=False, lineterminator="\n")
        tqdm.write(f"wrote {chosen.out}", file=sys.stderr)


def _check_out(path: Path) -> None:
    """Refuse to replace anything but a comparison.

    Raises:
        ValueError: If something else is there, or the folder cannot be written.
    """
    outside_results(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file, such as {path / 'compared.csv'}")
    if path.exists():
        with reading(path, "choose another --out"), path.open(encoding="utf-8") as file:
            if file.readline() != ",".join(COLUMNS) + "\n":
                raise Unusable(f"{path} is there, and is no comparison: choose another --out")
    check_writable(path.parent)


def _found(path: Path, wanted: str) -> tuple[Path, list[str]]:
    """Find the folder of a run, and what the run can be in there.

    Raises:
        ValueError: If there is no run.
    """
    if not path.exists():
        raise ValueError(f"{path} is not there: `weclip runs` lists all runs")
    if path.is_dir():
        folder, names = path, runs_in(path)
    elif path.name in FILES:
        folder, names = path.parent, [FILES[path.name]]
    elif TABLE.fullmatch(path.name):
        folder, names = path.parent, [_stem(path.name)]
    else:
        raise ValueError(f"{path} is no table of a run: give the run's folder")
    if not names:
        below = any(runs_in(inside) for inside in _folders([path]))
        listed = f" {path}` lists those below it" if below else "` lists all runs"
        raise ValueError(f"{path} holds no table of a run: `weclip runs{listed}")
    fitting = [name for name in names if _starts(name, wanted)]
    if not fitting:
        raise ValueError(f"{path} holds {', '.join(names)}: change --notebook {wanted}")
    return folder, fitting


def _shared(found: Mapping[Path, Sequence[str]]) -> str:
    """Return the one notebook that all runs are of.

    Raises:
        ValueError: If there is none, or several.
    """
    common = sorted(set.intersection(*(set(names) for names in found.values())))
    if len(common) > 1:
        first = common[0].partition("_")[0]
        raise ValueError(f"all hold {', '.join(common)}: choose one, such as --notebook {first}")
    if not common:
        held = "; ".join(f"{path} holds {', '.join(names)}" for path, names in found.items())
        raise ValueError(f"these are not runs of one notebook: {held}: leave out the others")
    return common[0]


def short_names(folders: Sequence[Path]) -> list[str]:
    """Shorten different folders to their last parts, as far as these differ."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]  # noqa: PTH100
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        lengths = range(1, len(own))
        fitting = (n for n in lengths if all(own[-n:] != other[-n:] for other in others))
        names.append(Path(*own[-next(fitting, len(own)) :]).as_posix())
    return names


def _facts_text(runs: Mapping[str, Finished]) -> str:
    """Write a table of the facts that differ, a column a run."""
    groups = {label: {group for group, _ in run.facts} for label, run in runs.items()}
    recorded = set.union(*groups.values())
    if not recorded:
        return "Nothing is recorded about how these runs were made.\n"
    notes, rows = [], []
    for group in recorded & WHOLE.keys():
        if without := [label for label in runs if group not in groups[label]]:
            notes.append(f"\nNo {WHOLE[group]} are recorded in {', '.join(without)}.\n")
    facts = dict.fromkeys(fact for run in runs.values() for fact in run.facts)
    for group, name in sorted(facts, key=lambda fact: GROUPS.index(fact[0])):
        values = {
            label: run.facts.get((group, name), ...)
            for label, run in runs.items()
            if group not in WHOLE or group in groups[label]
        }
        if any(value != next(iter(values.values())) for value in values.values()):
            rows.append([group, name, *(_shown(values.get(label, ...)) for label in runs)])
    table = f"What differs:\n\n{_lines(['kind', 'what', *runs], rows)}"
    return "".join([table if rows else "All that is recorded is the same.\n", *notes])


def compare_scores(runs: Mapping[str, Finished]) -> pd.DataFrame:
    """Compare every score of every run with that of the first run, paired by seed.

    Returns:
        A row for a score and a run: mean, spread (sample standard deviation), number of seeds;
        then mean, lowest and highest difference over `pairs` seeds, empty in the first run and
        where scores are not comparable; and `note`, the difference in words.
    """
    parts = {label: dict(list(run.table.groupby(KEYS, sort=False))) for label, run in runs.items()}
    order = list(dict.fromkeys(variant for run in runs.values() for variant in run.order))
    place = {variant: number for number, variant in enumerate(order)}
    keys = dict.fromkeys(key for found in parts.values() for key in found)
    first, rows = parts[next(iter(runs))], []
    for key in sorted(keys, key=lambda key: place.get(key[0], len(place))):
        for label, found in parts.items():
            if key in found:
                row = dict(zip(KEYS, key, strict=True)) | {"run": label, "note": ""}
                row |= _summary(found[key])
                if found is not first and key in first:
                    row |= _difference(first[key], found[key])
                rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS).astype({"pairs": "Int64"})


def _summary(part: pd.DataFrame) -> dict[str, object]:
    """Summarise one score of one run over its seeds."""
    pictures = ", ".join(str(count) for count in sorted(set(part["n_images"])) if count)
    return {
        "mean": round(part["value"].mean(), 6),
        "spread": round(part["value"].std(), 6),
        "seeds": len(part),
        "pictures": pictures or NOTHING,
        "profile": part["profile"].iloc[0],
    }


def _difference(first: pd.DataFrame, other: pd.DataFrame) -> dict[str, object]:
    """Compare a score of two runs, paired by seed."""
    there, here = (
        f"{summary['pictures']} pictures, profile {summary['profile'] or NOTHING}"
        for summary in map(_summary, (first, other))
    )
    if here != there:
        return {"pairs": 0, "note": f"not comparable: {here}; in the first run, {there}"}
    before, after = (part.set_index("seed")["value"] for part in (first, other))
    changes = (after - before).dropna().round(6) + 0.0  # without a negative zero
    if changes.empty:
        seeds = f"{_spans(set(after.index))} here, {_spans(set(before.index))} in the first run"
        return {"pairs": 0, "note": f"no seed in common: {seeds}"}
    words = over_seeds(changes)
    if list(changes.index) == [NO_SEED]:
        words = f"{changes.iloc[0]:+.2f} (a stage without randomness)"
    if apart := set(before.index) ^ set(after.index):
        words += f"; unpaired seeds: {_spans(apart)}"
    return {
        "difference": round(changes.mean(), 6),
        "lowest": changes.min(),
        "highest": changes.max(),
        "pairs": len(changes),
        "note": words,
    }


def _scores_text(compared: pd.DataFrame, labels: Sequence[str]) -> str:
    """Write the scores that the first run shares with another, and list those of some runs."""
    rows, lonely = [], []
    for key, part in compared.groupby(KEYS, sort=False):
        names, held = key[:-1], list(part["run"])
        if len(held) < len(labels):
            lonely.append([*names, ", ".join(held)])
        if held[0] != labels[0] or len(held) == 1:
            continue
        for row in part.itertuples():
            shown = names if row.run == labels[0] else [""] * len(names)
            score = as_text(row.mean, row.spread, row.seeds)
            rows.append([*shown, row.run, score, str(row.seeds), row.pictures, row.note])
    text = "No score is in the first run and in another one.\n"
    if rows:
        columns = [*KEYS[:-1], "run", "score", "seeds", "pictures", f"difference to {labels[0]}"]
        text = "Scores, mean ± standard deviation over seeds; differences are paired by seed:\n\n"
        text += _lines(columns, rows)
    if lonely:
        text += f"\nScores of some runs only:\n\n{_lines([*KEYS[:-1], 'runs'], lonely)}"
    return text
