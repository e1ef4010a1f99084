import json

import numpy as np
import pandas as pd
import pytest

from weclip_lib.studies import records, results


def row(variant, seed, value, split="val"):
    return {
        "variant": variant,
        "split": split,
        "metric": "miou",
        "value": value,
        "unit": "percent",
        "n_images": 7,
        "seed": seed,
        "profile": "smoke",
    }


def test_table_is_the_same_file_whatever_the_order(tmp_path) -> None:
    rows = [row("b", 1, 2.0), row("a", 0, 1 / 3), row("b", 0, 4.0)]
    results.write_table(tmp_path, "one", rows)
    results.write_table(tmp_path, "two", rows[::-1])
    text = (tmp_path / "one.csv").read_text()
    assert text == (tmp_path / "two.csv").read_text()
    assert text.splitlines()[1] == "a,val,miou,0.33,percent,7,0,smoke"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"variant": "a", "value": 1}],
            r"one.csv takes the columns .*: not \['variant'",
        ),
        ([row("a", 0, 1.0), row("a", 1, 1.0) | {"more": 1}], "one.csv takes the columns"),
        ([], "one.csv would have no rows: nothing was measured"),
        ([row("a", 0, 1.0), row("b", 3, np.nan)], "value of variant b, .* seed 3, .* is nan"),
        ([row("b", 3, np.inf)], "is inf: no number was measured"),
        ([row("b", 3, "high")], "is high: no number"),
        ([row("b", 3, None)], "is None: no number"),
    ],
)
def test_bad_rows_are_refused(tmp_path, rows, message) -> None:
    with pytest.raises(ValueError, match=message):
        results.write_table(tmp_path, "one", rows)
    assert not list(tmp_path.iterdir())


def test_the_iou_of_a_class_that_is_nowhere_is_none(tmp_path) -> None:
    iou = {"variant": "a", "split": "val", "class": "cat", "iou": float("nan"), "seed": 0}
    assert results.write_table(tmp_path, "one", [iou], "_per_class")["iou"].isna().all()
    with pytest.raises(ValueError, match="iou of variant a"):
        results.write_table(tmp_path, "one", [iou | {"iou": np.inf}], "_per_class")


def test_mean_and_spread_by_hand() -> None:
    table = pd.DataFrame([row("a", 0, 1.0), row("a", 1, 3.0), row("b", 0, 5.0)])
    summary = results.summarise(table).set_index("variant")
    assert summary.loc["a", ["mean", "seeds"]].tolist() == [2.0, 2]
    assert summary.loc["a", "spread"] == pytest.approx(2**0.5)
    wide = results.score_table(table, ("b", "a"))
    assert wide["variant"].tolist() == ["b", "a"]
    assert wide["val miou"].tolist() == ["5.00", "2.00 ± 1.41"]


def test_differences_in_words() -> None:
    """A verdict needs a second seed."""
    said = [results.over_seeds(pd.Series(v)) for v in ([1.0, 2.0], [-1.0, 2.0], [1.0])]
    assert said == [
        "+1.50 (+1.00 to +2.00): the same sign for every seed",
        "+0.50 (-1.00 to +2.00): no difference was seen",
        "+1.00 (one seed, which may be chance)",
    ]
    assert results.beside_spread(-0.8, 0.2, 0.7) == "more than the spread between seeds, 0.7"
    assert results.beside_spread(0.6, 0.7, 0.2) == "not more than the spread between seeds, 0.7"
    assert results.beside_spread(0.6, 0.7, float("nan")) == "of one seed, which may be chance"


def test_variants_that_nobody_ordered_are_sorted_by_their_numbers() -> None:
    names = ["maps=11", "maps=2", "blocks=3", "maps=2, labels", "plain"]
    table = results.score_table(pd.DataFrame([row(name, 0, 1.0) for name in names]), ("plain",))
    expected = ["plain", "blocks=3", "maps=2", "maps=2, labels", "maps=11"]
    assert table["variant"].tolist() == expected


def test_only_publish_writes_into_results() -> None:
    with pytest.raises(ValueError, match="only `make publish` writes there"):
        results.output_folder(str(results.RESULTS / "mini"), "x", {})


def test_a_folder_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/x cannot be written"):
        results.output_folder(str(tmp_path / "file" / "x"), "x", {})


ABOUT = {
    "clean": True,
    "commit": "c" * 40,
    "library": "l",
    "constraints": "n",
    "machine": "m",
    "versions": {"torch": "2"},
}
GIVEN = {"profile": "mini", "seed": 0, "seed_count": 3, "steps": 0, "pictures": 0}


def run_of(source, notebook, given=GIVEN, **about):
    """What a run of a notebook leaves in a folder: files, and their record."""
    lines = ["seed: int = 0", "profile: str = 'mini'", "seed_count: int = 1", "steps: int = 0"]
    lines += ["pictures: int = 200", "data_dir: str = ''", "out_dir: str = ''"]
    cell = {"metadata": {"tags": ["parameters"]}, "source": "\n".join(lines)}
    (source / "notebooks").mkdir(parents=True, exist_ok=True)
    (source / f"notebooks/{notebook}.ipynb").write_text(json.dumps({"cells": [cell]}))
    results.write_table(source, notebook, [row("a", 0, 1.0), row("a", 1, 3.0)])
    (source / f"{notebook}.json").write_text(json.dumps(ABOUT | about))
    (source / f"{notebook}.png").write_bytes(b"figure")
    (source / "masks").mkdir(exist_ok=True)
    (source / "masks/a.png").write_bytes(b"mask")
    names = [f"notebooks/{notebook}.ipynb", f"{notebook}.csv", f"{notebook}.json"]
    names += [f"{notebook}.png", "masks/a.png"]
    hashes = {name: records.file_hash(source / name) for name in names}
    records.write_record(source, notebook, records.Record("key", given, hashes))


def all_below(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A complete run of one notebook, and earlier results with pages."""
    source, root = tmp_path / "runs", tmp_path / "root"
    (root / "results" / "mini").mkdir(parents=True)
    (root / "results" / "mini" / "old.csv").write_text("kept")
    monkeypatch.setattr(results, "ROOT", root)
    monkeypatch.setattr(results, "RESULTS", root / "results")
    for page in (root / "README.md", root / "results" / "README.md"):
        page.write_text("# x\n<!-- table: mini/01_x -->\n<!-- end -->\nend\n")
    run_of(source, "01_x")
    return source, root


def test_publish_copies_what_was_recorded_and_renders(finished) -> None:
    source, root = finished
    for name in ("01_x_notes.csv", "01_x_more.csv", "01_x_old.png"):
        (source / name).write_text("lies beside")
    results.publish(source, "mini", ["01_x"])
    published = root / "results" / "mini"
    assert {str(name) for name in all_below(published)} == {
        "01_x.csv",
        "01_x.json",
        "01_x.png",
        "notebooks/01_x.ipynb",
    }  # replaced as a whole
    assert (published / "01_x.csv").read_text() == (source / "01_x.csv").read_text()
    assert [p.name for p in published.parent.iterdir() if p.name.startswith(".")] == []
    page = (root / "README.md").read_text()
    assert "2.00 ± 1.41" in page and page.endswith("<!-- end -->\nend\n")
    results.publish(source, "mini", ["01_x"])
    assert (root / "README.md").read_text() == page


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: (s / "notebooks/01_x.ipynb").unlink(), "01_x.ipynb is not as the run wrote it"),
        (lambda s: (s / "01_x.csv").write_text("better"), "01_x.csv is not as the run wrote it"),
        (lambda s: (s / "masks/a.png").unlink(), "a.png is not as the run wrote it"),
        (lambda s: (s / ".runner/01_x.json").unlink(), "01_x.json is not there"),
        (lambda s: (s / ".runner/01_x.json").write_text("{"), "01_x.json cannot be read"),
        (lambda s: run_of(s, "01_x", clean=False), "uncommitted code"),
        (lambda s: run_of(s, "01_x", GIVEN | {"profile": "smoke"}), "profile is 'smoke' and not"),
        (
            lambda s: run_of(s, "01_x", {"profile": "mini"}),
            "seed_count is 1 .* pictures is 200 ",
        ),
        (lambda s: run_of(s, "01_x", GIVEN | {"steps": 5}), ": steps is 5 and not 0$"),
        (lambda s: run_of(s, "01_x", GIVEN | {"data_dir": "x"}), "data_dir is 'x' and not ''"),
    ],
)
def test_incomplete_runs_are_not_published(finished, spoil, message) -> None:
    source, root = finished
    before = all_below(root)
    spoil(source)
    with pytest.raises(ValueError, match=message):
        results.publish(source, "mini", ["01_x"])
    assert all_below(root) == before


def test_runs_of_different_libraries_are_not_published_together(finished) -> None:
    source, _ = finished
    run_of(source, "02_y", library="changed")
    with pytest.raises(ValueError, match=r"\['01_x'\], \['02_y'\].* different code"):
        results.publish(source, "mini", ["01_x", "02_y"])


@pytest.mark.parametrize("where", ["copy2", "render_pages"])
def test_earlier_results_stay_when_it_fails_on_the_way(finished, monkeypatch, where) -> None:
    source, root = finished
    before = all_below(root)

    def fail(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr(results.shutil if where == "copy2" else results, where, fail)
    with pytest.raises(OSError, match="full"):
        results.publish(source, "mini", ["01_x"])
    assert all_below(root) == before


def test_earlier_results_are_there_again_after_a_kill(finished) -> None:
    source, root = finished
    (root / "results" / "mini").rename(root / "results" / ".mini.old")
    results.publish(source, "mini", ["01_x"])
    assert [p.name for p in (root / "results").iterdir() if p.is_dir()] == ["mini"]


def published() -> pd.DataFrame:
    return pd.read_csv(results.RESULTS / "published.csv", dtype=str, keep_default_na=False)


def test_every_figure_of_others_is_finite_and_says_where_it_is_from() -> None:
    table = published()
    assert table["result"].is_unique  # notebooks and the benchmark look figures up by it
    assert np.isfinite(table["figure"].astype(float)).all()
    for column in ("result", "what", "method", "unit", "source"):
        assert table[column].str.strip().all(), column
    assert set(table["read"]) == {"source", "reported", "measured", "derived"}
    assert set(table["crf"]) == {"yes", "no", ""}
    scores = table["unit"].str.startswith("mIoU")
    assert set(table.loc[scores, "dataset"]) == {"VOC", "COCO"}
    assert set(table.loc[scores, "split"]) == {"train", "val", "test"}
    assert (table.loc[~scores, ["dataset", "split", "crf"]] == "").all(axis=None)
    assert (table.loc[~scores, "what"] == "cost").all()


def test_a_published_score_can_be_picked_by_machine() -> None:
    """The paper's own scores and its gain belong together."""
    table = published()
    ours = table[(table["method"] == "WeCLIP") & (table["dataset"] == "VOC")]
    val = ours[ours["split"] == "val"].set_index(["what", "crf"])["figure"].astype(float)
    assert val["decoder, RFM", "yes"] == 76.4
    gain = val["decoder, RFM", "no"] - val["decoder, static labels", "no"]
    assert gain == pytest.approx(val["gain of the RFM", ""])


def test_scores_of_others_are_rendered_from_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (tmp_path / "published.csv").write_text(
        "result,dataset,split,what,method,crf,figure,unit,read,source\n"
        "a,VOC,train,initial CAM,one,no,58.60,mIoU %,source,its README\n"
        "b,COCO,val,decoder,two,,47.1,mIoU %,reported,a tracker\n"
        "c,VOC,val,gain,one,,6.2,mIoU points,source,its paper\n"
    )
    page = results.render("x\n<!-- published: VOC -->\nstale\n<!-- end -->\ny\n")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in rows[2]] == [
        "initial CAM", "one", "train", "no", "58.60", "source", "its README",
    ]  # fmt: skip
    assert len(rows) == 3 and "stale" not in page and page.endswith("<!-- end -->\ny\n")
    assert results.render(page) == page
    with pytest.raises(ValueError, match="'ADE20K': choose one of VOC, COCO"):
        results.rendered_published("ADE20K")


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_pages_show_the_published_tables(page) -> None:
    text = (results.ROOT / page).read_text(encoding="utf-8")
    assert results.MARKER.search(text)
    assert results.render(text) == text
