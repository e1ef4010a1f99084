import json

import pandas as pd
import pytest

from weclip_lib import results


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


def test_unknown_columns_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="columns"):
        results.write_table(tmp_path, "one", [{"variant": "a", "value": 1}])
    assert not list(tmp_path.iterdir())


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


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A complete run of one notebook, and an empty results folder with a page."""
    source, root = tmp_path / "runs", tmp_path / "root"
    (source / "notebooks").mkdir(parents=True)
    (root / "results" / "mini").mkdir(parents=True)
    (root / "results" / "mini" / "old.csv").write_text("kept")
    monkeypatch.setattr(results, "ROOT", root)
    monkeypatch.setattr(results, "RESULTS", root / "results")
    for page in (root / "README.md", root / "results" / "README.md"):
        page.write_text("# x\n<!-- table: mini/01_x -->\n<!-- end -->\nend\n")
    results.write_table(source, "01_x", [row("a", 0, 1.0), row("a", 1, 3.0)])
    about = {
        "clean": True,
        "commit": "c" * 40,
        "library": "l",
        "constraints": "n",
        "machine": "m",
        "versions": {"torch": "2"},
        "parameters": {"profile": "mini"},
    }
    (source / "01_x.json").write_text(json.dumps(about))
    (source / "notebooks" / "01_x.ipynb").write_text("{}")
    return source, root


def test_publish_copies_and_renders(finished) -> None:
    source, root = finished
    results.publish(source, "mini", ["01_x"])
    assert (root / "results/mini/01_x.csv").read_text() == (source / "01_x.csv").read_text()
    assert not (root / "results/mini/old.csv").exists()  # replaced as a whole
    page = (root / "README.md").read_text()
    assert "2.00 ± 1.41" in page and page.endswith("<!-- end -->\nend\n")
    results.publish(source, "mini", ["01_x"])
    assert (root / "README.md").read_text() == page


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: (s / "notebooks/01_x.ipynb").unlink(), "is missing"),
        (lambda s: edit(s, clean=False), "uncommitted code"),
        (lambda s: edit(s, parameters={"profile": "smoke"}), "profile smoke"),
    ],
)
def test_incomplete_runs_are_not_published(finished, spoil, message) -> None:
    source, root = finished
    spoil(source)
    with pytest.raises(ValueError, match=message):
        results.publish(source, "mini", ["01_x"])
    assert (root / "results/mini/old.csv").read_text() == "kept"


def test_runs_of_different_libraries_are_not_published_together(finished) -> None:
    source, _ = finished
    about = json.loads((source / "01_x.json").read_text())
    (source / "02_y.json").write_text(json.dumps(about | {"library": "changed"}))
    (source / "notebooks" / "02_y.ipynb").write_text("{}")
    with pytest.raises(ValueError, match=r"\['01_x'\], \['02_y'\].* different code"):
        results.publish(source, "mini", ["01_x", "02_y"])


def edit(source, **changes):
    path = source / "01_x.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_pages_show_the_published_tables(page) -> None:
    text = (results.ROOT / page).read_text(encoding="utf-8")
    assert results.MARKER.search(text)
    assert results.render(text) == text
