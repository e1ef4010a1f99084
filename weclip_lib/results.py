"""Tables with provenance: written by notebooks into a run's folder, published into results/.

The only writer into results/. Schemas: README of results/.
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import pandas as pd

from weclip_lib.files import whole, write_text
from weclip_lib.repro import ROOT, provenance

RESULTS = ROOT / "results"
SCHEMAS = {
    "": ("variant", "split", "metric", "value", "unit", "n_images", "seed", "profile"),
    "_curve": ("variant", "seed", "iteration", "metric", "value"),
    "_per_class": ("variant", "split", "class", "iou", "seed"),
    "_cost": ("variant", "metric", "value", "unit", "profile"),
}
DECIMALS = {"": 2, "_curve": 5, "_per_class": 2, "_cost": 1}
MARKER = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def outside_results(folder: Path) -> Path:
    """The folder, resolved.

    Raises:
        ValueError: If it is inside results/, which only `make publish` writes.
    """
    folder = folder.resolve()
    if folder.is_relative_to(RESULTS):
        raise ValueError(f"{folder} is inside results/: only `make publish` writes there")
    return folder


def output_folder(out_dir: str, notebook: str, parameters: dict) -> Path:
    """Where a notebook writes: `out_dir`, or runs/adhoc/<hash of the parameters>.

    Raises:
        ValueError: If `out_dir` is inside results/.
    """
    if not out_dir:
        key = sha256(json.dumps([notebook, parameters], sort_keys=True).encode()).hexdigest()
        out_dir = str(ROOT / "runs" / "adhoc" / key[:12])
    folder = outside_results(Path(out_dir))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_table(folder: Path, notebook: str, rows: Iterable[dict], kind: str = "") -> pd.DataFrame:
    """Write `<notebook><kind>.csv`: fixed columns, order and decimals; returns it.

    Args:
        kind: "" for scores, "_curve", "_per_class" or "_cost".

    Raises:
        ValueError: If a row has other columns than the schema.
    """
    columns = list(SCHEMAS[kind])
    table = pd.DataFrame(list(rows))
    if set(table.columns) != set(columns):
        raise ValueError(f"{notebook}{kind}.csv has columns {sorted(table.columns)}: {columns}")
    value = "iou" if kind == "_per_class" else "value"
    table = table[columns].sort_values([c for c in columns if c != value], kind="stable")
    table = table.reset_index(drop=True)
    text = table.assign(**{value: table[value].map(f"{{:.{DECIMALS[kind]}f}}".format)})
    write_text(folder / f"{notebook}{kind}.csv", text.to_csv(index=False, lineterminator="\n"))
    return table


def write_provenance(folder: Path, notebook: str, parameters: dict, **more: object) -> dict:
    """Write `<notebook>.json`: parameters, commit, versions, device; returns it."""
    about = {"notebook": notebook, "parameters": parameters, **provenance(), **more}
    write_text(folder / f"{notebook}.json", json.dumps(about, indent=1, sort_keys=True) + "\n")
    return about


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean, spread (sample standard deviation over seeds) and number of seeds of every score."""
    keys = ["variant", "split", "metric", "unit", "n_images"]
    grouped = table.groupby(keys, sort=False)["value"]
    return grouped.agg(mean="mean", spread="std", seeds="count").reset_index()


def as_text(mean: float, spread: float, seeds: int) -> str:
    """`61.23 ± 0.40`, or the mean alone where there is one value."""
    return f"{mean:.2f} ± {spread:.2f}" if seeds > 1 else f"{mean:.2f}"


def over_seeds(changes: pd.Series) -> str:
    """A difference of every seed, in words: mean, range, and whether all have the same sign."""
    mean, low, high = changes.mean(), changes.min(), changes.max()
    if len(changes) == 1:
        return f"{mean:+.2f} (one seed, which may be chance)"
    verdict = "no difference was seen" if low <= 0 <= high else "the same sign for every seed"
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f}): {verdict}"


def beside_spread(difference: float, *spreads: float) -> str:
    """Whether a difference of means is more than the larger spread; NaN where one seed has none."""
    if any(map(pd.isna, spreads)):
        return "of one seed, which may be chance"
    noise = max(spreads)
    verdict = "more" if abs(difference) > noise else "not more"
    return f"{verdict} than the spread between seeds, {noise:.1f}"


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """Sorts names by their words, and by the numbers in them: `layers=2` before `layers=11`."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def score_table(table: pd.DataFrame, order: Sequence[str] = ()) -> pd.DataFrame:
    """One row a variant, one column a split and metric, as text; `order` lists variants first."""
    summary = summarise(table)
    summary["text"] = [
        as_text(*row) for row in summary[["mean", "spread", "seeds"]].itertuples(index=False)
    ]
    summary["column"] = summary["split"] + " " + summary["metric"]
    wide = summary.pivot(index="variant", columns="column", values="text").fillna("")
    known = [name for name in order if name in wide.index]
    wide = wide.loc[known + sorted(set(wide.index) - set(known), key=_by_number)]
    seeds = summary.groupby("variant")["seeds"].max()
    wide["seeds"] = seeds[wide.index]
    return wide.reset_index()


def published_step(bench: pd.DataFrame) -> pd.DataFrame:
    """Of a table of `make bench`: the first case's parts, with bfloat16 in the same unit beside.

    Ratios are to the first part, or for inference to its own, in single precision.
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
    """Markdown of a table of `make bench`."""
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
    """Markdown of a published table, `<profile>/<notebook>`, with its seeds and commit."""
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


def render(text: str) -> str:
    """Fill every `<!-- table: profile/notebook -->` ... `<!-- end -->` of a page."""
    return MARKER.sub(lambda m: f"{m[1]}{rendered_table(m[2])}{m[3]}", text)


def render_pages() -> None:
    """Render the tables of all pages anew."""
    for page in (ROOT / "README.md", RESULTS / "README.md"):
        write_text(page, render(page.read_text(encoding="utf-8")))


def publish(source: Path, profile: str, notebooks: Sequence[str]) -> None:
    """Copy a complete run of all notebooks into results/<profile>/ and render the pages.

    Raises:
        ValueError: If a notebook's output is missing, the code was not a clean commit, or
            notebooks were run with different libraries or versions.
    """
    sources = {}
    for notebook in notebooks:
        record = source / f"{notebook}.json"
        executed = source / "notebooks" / f"{notebook}.ipynb"
        for path in (record, executed):
            if not path.exists():
                raise ValueError(f"{path} is missing: run `make studies` to its end first")
        about = json.loads(record.read_text())
        if not about["clean"]:
            raise ValueError(f"{record} comes from uncommitted code: commit, then `make studies`")
        if about["parameters"]["profile"] != profile:
            raise ValueError(
                f"{record} has profile {about['parameters']['profile']}: not {profile}"
            )
        sources.setdefault((about["library"], about["constraints"]), []).append(notebook)
    if len(sources) > 1:
        raise ValueError(
            f"in {source}, {sorted(sources.values())} were run with different code or versions "
            "of the library: run `make studies` again"
        )
    with whole(RESULTS / profile) as partial:
        (partial / "notebooks").mkdir(parents=True)
        for notebook in notebooks:
            files = [source / f"{notebook}.json", *source.glob(f"{notebook}*.csv")]
            for path in (*files, *source.glob(f"{notebook}*.png")):
                shutil.copy2(path, partial / path.name)
            executed = source / "notebooks" / f"{notebook}.ipynb"
            shutil.copy2(executed, partial / "notebooks" / executed.name)
        shutil.rmtree(RESULTS / profile, ignore_errors=True)
    render_pages()


def main() -> None:
    """`make publish`."""
    parser = argparse.ArgumentParser(description="Publish a complete run into results/.")
    parser.add_argument("--source", type=Path, default=ROOT / "runs" / "studies")
    parser.add_argument("--profile", default="mini")
    arguments = parser.parse_args()
    notebooks = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
    try:
        publish(arguments.source, arguments.profile, notebooks)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
