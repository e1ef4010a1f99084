"""Write tables with provenance into a run's folder, and publish them into results/.

Only this module writes into results/. Its README describes the schemas.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd

from weclip_lib.commands import Publish
from weclip_lib.config import one_of
from weclip_lib.data.profiles import get_profile
from weclip_lib.data.settings import as_text
from weclip_lib.storage.files import check_writable, reading, whole, write_text
from weclip_lib.storage.provenance import RESULTS, ROOT, outside_results
from weclip_lib.studies.parameters import declared_parameters
from weclip_lib.studies.records import file_hash, read_record
from weclip_lib.studies.runner import PRESETS

SCHEMAS = {
    "": ("variant", "split", "metric", "value", "unit", "n_images", "seed", "profile"),
    "_curve": ("variant", "seed", "iteration", "metric", "value"),
    "_per_class": ("variant", "split", "class", "iou", "seed"),
    "_cost": ("variant", "metric", "value", "unit", "profile"),
}
DECIMALS = {"": 2, "_curve": 5, "_per_class": 2, "_cost": 1}
MARKER = re.compile(r"(<!-- (table|published): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_OURS = (
    "None of these scores was measured here. `source`: read where those who measured it published "
    "it. `reported`: told by others, or in a tracker. `derived`: from other figures. An empty "
    "`crf`: it is not said."
)


def output_folder(out_dir: str, notebook: str, parameters: Mapping[str, object]) -> Path:
    """Return `out_dir`, or runs/adhoc/<hash of the parameters>; make it if it is not there.

    Raises:
        ValueError: If `out_dir` is inside results/, or cannot be written.
    """
    if not out_dir:
        if parameters.get("data_dir"):
            parameters = {**parameters, "data_dir": str(Path(parameters["data_dir"]).resolve())}
        key = sha256(json.dumps([notebook, parameters], sort_keys=True).encode()).hexdigest()
        out_dir = str(ROOT / "runs" / "adhoc" / key[:12])
    folder = outside_results(Path(out_dir))
    check_writable(folder)
    return folder


def write_table(
    folder: Path,
    notebook: str,
    rows: Iterable[dict],
    kind: str = "",
    settings: Mapping[str, object] = {},
) -> pd.DataFrame:
    """Write `<notebook><kind>.csv`: fixed columns, order and decimals; return it.

    Args:
        kind: "" for scores, "_curve", "_per_class" or "_cost".
        settings: Changed ones; the file has them behind the name of each variant, in brackets.

    Raises:
        ValueError: If there is no row, columns differ from the schema, or a value is no number.
            An IoU may be NaN, for a class that is in no picture.
    """
    name, columns = f"{notebook}{kind}.csv", list(SCHEMAS[kind])
    rows = list(rows)
    if not rows:
        raise ValueError(f"{name} would have no rows: nothing was measured")
    value = "iou" if kind == "_per_class" else "value"
    for row in rows:
        if set(row) != set(columns):
            raise ValueError(f"{name} takes the columns {columns}: not {list(row)}")
        number = np.asarray(row[value]).item()
        fits = isinstance(number, int | float) and not np.isinf(number)
        if not fits or (np.isnan(number) and kind != "_per_class"):
            where = ", ".join(f"{c} {row[c]}" for c in columns if c != value)
            raise ValueError(f"{name}: the {value} of {where} is {number}: no number was measured")
    table = pd.DataFrame(rows)
    table = table[columns].sort_values([c for c in columns if c != value], kind="stable")
    table = table.reset_index(drop=True)
    text = table.assign(**{value: table[value].map(f"{{:.{DECIMALS[kind]}f}}".format)})
    if settings:
        text["variant"] += f" [{as_text(settings)}]"
    write_text(folder / name, text.to_csv(index=False, lineterminator="\n"))
    return table


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Return mean, spread (sample standard deviation) and number of seeds of every score."""
    keys = ["variant", "split", "metric", "unit", "n_images"]
    grouped = table.groupby(keys, sort=False)["value"]
    return grouped.agg(mean="mean", spread="std", seeds="count").reset_index()


def mean_text(mean: float, spread: float, seeds: int) -> str:
    """Format as `61.23 ± 0.40`, or the mean alone for one seed."""
    return f"{mean:.2f} ± {spread:.2f}" if seeds > 1 else f"{mean:.2f}"


def over_seeds(changes: pd.Series) -> str:
    """Describe a difference over seeds: mean, range, and whether all have the same sign."""
    mean, low, high = changes.mean(), changes.min(), changes.max()
    if len(changes) == 1:
        return f"{round(mean, 2) + 0.0:+.2f} (one seed, which may be chance)"
    verdict = "no difference was seen" if low <= 0 <= high else "the same sign for every seed"
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f}): {verdict}"


def beside_spread(difference: float, *spreads: float) -> str:
    """Say whether a difference of means is more than the larger spread; NaN: one seed."""
    if any(map(pd.isna, spreads)):
        return "of one seed, which may be chance"
    noise = max(spreads)
    verdict = "more" if abs(difference) > noise else "not more"
    return f"{verdict} than the spread between seeds, {noise:.1f}"


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """Make a key that sorts names by words and numbers: `layers=2` before `layers=11`."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def score_table(table: pd.DataFrame, order: Sequence[str] = ()) -> pd.DataFrame:
    """Make a text table: a row a variant, a column a split and metric; `order` comes first."""
    summary = summarise(table)
    summary["text"] = [
        mean_text(*row) for row in summary[["mean", "spread", "seeds"]].itertuples(index=False)
    ]
    summary["column"] = summary["split"] + " " + summary["metric"]
    wide = summary.pivot(index="variant", columns="column", values="text").fillna("")
    known = [name for name in order if name in wide.index]
    wide = wide.loc[known + sorted(set(wide.index) - set(known), key=_by_number)]
    seeds = summary.groupby("variant")["seeds"].max()
    wide["seeds"] = seeds[wide.index]
    return wide.reset_index().rename_axis(columns=None)


def published_step(bench: pd.DataFrame) -> pd.DataFrame:
    """Take the parts of the first case of `make bench`, with a column for bfloat16.

    Ratios are to the first part, or to inference's first part, in single precision.
    """
    case = ["backbone", "batch", "crop", "classes", "device"]
    chosen = bench[(bench[case] == bench[case].iloc[0]).all(axis=1)]
    single, half = (chosen[chosen["bf16"] == bf16].set_index("part") for bf16 in (False, True))
    columns = ["cpu_s", "ratio", "official_ratio", "gflop", "share", "memory_mib"]
    table = single[columns].copy()
    clock = "cpu_s" if single["device"].iloc[0] == "cpu" else "wall_s"
    table.insert(2, "ratio_bf16", half[clock] / single[clock] * single["ratio"])
    return table


def rendered_bench(path: Path) -> str:
    """Render a table of `make bench` as Markdown."""
    about = json.loads(path.with_suffix(".json").read_text())
    table = pd.read_csv(path)
    if "tried" in table:
        rows = table.round(3).to_markdown(index=False)
    else:
        rows = published_step(table).round(2).astype(object).fillna("").to_markdown()
    note = (
        f"Commit {about['commit'][:10]}, {path.stem}, {about['parameters']['threads']} thread(s)."
    )
    return f"{rows}\n\n{note}\n"


def rendered_table(name: str) -> str:
    """Render a published table, `<profile>/<notebook>`, as Markdown, with its commit."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return "*Not measured yet.*\n"
    if path.parent.name == "bench":
        return rendered_bench(path)
    table = pd.read_csv(path)
    about = json.loads(path.with_suffix(".json").read_text())
    order = about.get("order", [])
    images = table.groupby("split")["n_images"].max()
    counts = ", ".join(f"{split} {number}" for split, number in images.items())
    note = (
        f"In percent, mean ± standard deviation over seeds. Pictures: {counts}. "
        f"Commit {about['commit'][:10]}, {about['machine']}, torch {about['versions']['torch']}."
    )
    markdown = score_table(table, order).to_markdown(index=False, disable_numparse=True)
    return f"{markdown}\n\n{note}\n"


def rendered_published(dataset: str) -> str:
    """Render the scores of others on `dataset` (VOC, COCO) as Markdown, in the file's order.

    Raises:
        ValueError: If there are none.
    """
    table = pd.read_csv(RESULTS / "published.csv", dtype=str, keep_default_na=False)
    scores = table[table["unit"] == "mIoU %"].rename(columns={"figure": "mIoU %"})
    one_of("data set of published scores", dataset, tuple(scores["dataset"].unique()))
    columns = ["what", "method", "split", "crf", "mIoU %", "read", "source"]
    shown = scores.loc[scores["dataset"] == dataset, columns]
    return f"{shown.to_markdown(index=False, disable_numparse=True)}\n\n{NOT_OURS}\n"


def render(text: str) -> str:
    """Fill every `<!-- table: profile/notebook -->` ... `<!-- end -->` of a page.

    `<!-- published: VOC -->` takes the scores of others on that data set.
    """
    by_kind = {"table": rendered_table, "published": rendered_published}
    return MARKER.sub(lambda m: f"{m[1]}{by_kind[m[2]](m[3])}{m[4]}", text)


def render_pages() -> None:
    """Render the tables of both READMEs again."""
    pages = (ROOT / "README.md", RESULTS / "README.md")
    rendered = {page: render(page.read_text(encoding="utf-8")) for page in pages}
    for page, text in rendered.items():
        write_text(page, text)


def _recorded(source: Path, profile: str, notebook: str) -> list[str]:
    """List the files of a notebook's complete run that are to be published.

    Raises:
        ValueError: If the run is not complete, or its files have changed.
    """
    record = read_record(source, notebook)
    executed = f"notebooks/{notebook}.ipynb"
    for name in (executed, f"{notebook}.csv", f"{notebook}.json", *record.files):
        path = source / name
        if not record.key or file_hash(path) != record.files.get(name):
            raise ValueError(f"{path} is not as the run wrote it: run `make studies` again")
    complete = PRESETS["studies"] | {"profile": profile}
    differences = []
    for name, parameter in declared_parameters(source / executed).items():
        given = record.parameters.get(name, parameter.default)
        meant = complete.get(name, parameter.default)
        if given != meant:
            differences.append(f"{name} is {given!r} and not {meant!r}")
    if differences:
        raise ValueError(
            f"{notebook} in {source} is no run of `make studies`: {', '.join(differences)}"
        )
    kinds = (".csv", ".json", ".png")
    tables = [n for n in record.files if "/" not in n and n.startswith(notebook)]
    return [executed, *(name for name in tables if Path(name).suffix in kinds)]


def _replace(folder: Path, source: Path, files: Sequence[str]) -> None:
    """Replace a folder by files, and render the pages; on failure, the folder stays."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists():  # a killed process left it
        shutil.rmtree(folder, ignore_errors=True)
        old.rename(folder)
    try:
        with whole(folder) as partial:
            for name in files:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / name, partial / name)
            if folder.exists():
                folder.rename(old)
        render_pages()
    except BaseException:
        if old.exists():
            shutil.rmtree(folder, ignore_errors=True)
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def publish(source: Path, profile: str, notebooks: Sequence[str]) -> None:
    """Copy a complete run of all notebooks into results/<profile>/, and render the pages.

    Only recorded files are copied. If anything is refused, results/ stays as it is.

    Raises:
        ValueError: If an output is missing or changed, a run is not of `make studies`, the code
            was not a clean commit, or notebooks were run with different libraries or
            versions.
    """
    sources: dict[tuple, list[str]] = {}
    files = []
    for notebook in notebooks:
        files += _recorded(source, profile, notebook)
        path = source / f"{notebook}.json"
        with reading(path):
            about = json.loads(path.read_bytes())
            clean, made_with = about["clean"], (about["library"], about["constraints"])
        if not clean:
            raise ValueError(f"{path} comes from uncommitted code: commit, then `make studies`")
        sources.setdefault(made_with, []).append(notebook)
    if len(sources) > 1:
        raise ValueError(
            f"in {source}, {sorted(sources.values())} were run with different code or versions "
            "of the library: run `make studies` again"
        )
    _replace(RESULTS / profile, source, files)


def run(chosen: Publish) -> None:
    """Run `weclip publish`.

    Raises:
        ValueError: If a run may not be published.
    """
    notebooks = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
    source = chosen.source or ROOT / "runs" / "studies"
    publish(source, get_profile(chosen.profile).name, notebooks)
