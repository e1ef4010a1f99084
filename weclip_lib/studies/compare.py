"""List runs, and compare settings and scores of several: `weclip runs` and `weclip compare`."""

import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from weclip_lib.commands import Compare, Runs
from weclip_lib.storage.files import Unusable, check_writable, in_a_line, reading, whole
from weclip_lib.storage.provenance import RESULTS, ROOT, outside_results
from weclip_lib.studies.finished import (
    KEYS,
    NO_SEED,
    UNKNOWN_SEED,
    Finished,
    read_run,
    run_of,
    runs_in,
    written_at,
)
from weclip_lib.studies.results import mean_text, over_seeds

KEPT = ("cache", "decoders", "watched_runs")  # folders in runs/ with what studies use again
GROUPS = ("given", "effective", "parameter", "note", "setting", "run", "version")  # of facts
WHOLE = {"effective": "effective settings", "setting": "settings"}  # a run has all of these or none
NOTHING = "-"
LISTED = ("run", "notebook", "profile", "seeds", "set", "device", "commit", "finished, UTC")
COLUMNS = [*KEYS, "run", "mean", "spread", "seeds", "pictures", "profile"]
COLUMNS += ["difference", "lowest", "highest", "pairs", "note"]


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
        return written_at(folder), [*start, *(NOTHING for _ in LISTED[3:]), said]
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
    elif name := run_of(path.name):
        folder, names = path.parent, [name]
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
            score = mean_text(row.mean, row.spread, row.seeds)
            rows.append([*shown, row.run, score, str(row.seeds), row.pictures, row.note])
    text = "No score is in the first run and in another one.\n"
    if rows:
        columns = [*KEYS[:-1], "run", "score", "seeds", "pictures", f"difference to {labels[0]}"]
        text = "Scores, mean ± standard deviation over seeds; differences are paired by seed:\n\n"
        text += _lines(columns, rows)
    if lonely:
        text += f"\nScores of some runs only:\n\n{_lines([*KEYS[:-1], 'runs'], lonely)}"
    return text
