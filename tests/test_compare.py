"""Runs are listed, and compared by seed; every figure here is computed by hand."""

import json
import os
import re

import pandas as pd
import pytest
import torch

from weclip_lib.__main__ import main as weclip
from weclip_lib.storage.tensors import save_tensors
from weclip_lib.studies import compare

NAME = "03_rfm_ablation"
ABOUT = {
    "notebook": NAME,
    "commit": "c" * 40,
    "clean": True,
    "library": "a" * 64,
    "python": "3.11.7",
    "versions": {"torch": "2.6"},
    "device": "cpu",
    "order": ["RFM", "box"],
    "finished": "2026-01-02T10:00:00+00:00",
}


def run_of(folder, rows, *, name=NAME, settings=None, parameters=(), **about):
    """What a notebook leaves: rows are variant, split, metric, seed, value, n_images."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"profile": "mini", "seed": 0, "steps": 0} | dict(parameters)
    if settings is not None:
        given["settings"] = settings
    text = "variant,split,metric,value,unit,n_images,seed,profile\n"
    for variant, split, metric, seed, value, count in rows:
        text += f'"{variant}",{split},{metric},{value:.2f},percent,{count},{seed},mini\n'
    (folder / f"{name}.csv").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps(ABOUT | {"parameters": given} | about))
    return folder


def scores(variant, split, values, count=7):
    return [(variant, split, "miou", seed, value, count) for seed, value in values.items()]


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Runs a, b, c below runs/: b and c with settings."""
    monkeypatch.chdir(tmp_path)
    first = scores("box", "val", {-1: 60.0}) + scores("RFM", "val", {0: 70, 1: 72, 2: 74})
    first += scores("RFM", "test", {0: 50, 1: 51}) + scores("old", "val", {0: 40})
    run_of(tmp_path / "runs/a", first, effective={"box_threshold": 0.4, "dim": 256})
    second = scores("box [box_threshold=0.3]", "val", {-1: 60.5})
    second += scores("RFM [box_threshold=0.3]", "val", {1: 73, 2: 74.5, 3: 80})
    second += scores("RFM [box_threshold=0.3]", "test", {0: 55, 1: 56}, count=5)
    run_of(
        tmp_path / "runs/b",
        second,
        settings={"box_threshold": 0.3},
        parameters={"seed": 1},
        effective={"box_threshold": 0.3, "dim": 256},
        clean=False,
        finished="2026-01-02T12:30:00+02:00",
    )
    suffix = "[dim=64, scales=1/0.75]"
    third = scores(f"RFM {suffix}", "val", {0: 71, 1: 71, 2: 74})
    settings = {"scales": [1.0, 0.75], "dim": 64}
    run_of(tmp_path / "runs/c", third, settings=settings, finished="2026-01-01T10:00:00+00:00")
    return tmp_path / "runs"


def said(capsys, *arguments):
    weclip([str(argument) for argument in arguments])
    return capsys.readouterr().out


def cells(text):
    """The cells of all Markdown rows."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_scores_are_paired_by_seed(three, capsys) -> None:
    found = cells(said(capsys, "compare", three / "a", three / "b", three / "c"))
    assert ["RFM", "val", "miou", "a", "72.00 ± 2.00", "3", "7", ""] in found
    changes = "+0.75 (+0.50 to +1.00): the same sign for every seed; unpaired seeds: 0, 3"
    assert ["", "", "", "b", "75.83 ± 3.69", "3", "7", changes] in found
    changes = "+0.00 (-1.00 to +1.00): no difference was seen"
    assert ["", "", "", "c", "72.00 ± 1.73", "3", "7", changes] in found
    changes = "+0.50 (a stage without randomness)"
    assert ["", "", "", "b", "60.50", "1", "7", changes] in found


def test_scores_of_other_pictures_are_not_compared(three, capsys) -> None:
    text = said(capsys, "compare", three / "a", three / "b")
    note = "not comparable: 5 pictures, profile mini; in the first run, 7 pictures, profile mini"
    assert ["", "", "", "b", "55.50 ± 0.71", "2", "5", note] in cells(text)
    run_of(three / "d", scores("RFM", "val", {0: 1.0}))
    table = three / "d" / f"{NAME}.csv"
    table.write_text(table.read_text().replace("mini", "smoke"))
    assert "not comparable: 7 pictures, profile smoke" in said(
        capsys, "compare", three / "a", three / "d"
    )


def test_scores_of_some_runs_are_listed(three, capsys) -> None:
    text = said(capsys, "compare", three / "a", three / "b", three / "c")
    assert cells(text.partition("Scores of some runs only")[2])[2:] == [
        ["RFM", "test", "miou", "a, b"],
        ["box", "val", "miou", "a, b"],
        ["old", "val", "miou", "a"],
    ]
    run_of(three / "d", scores("else", "val", {0: 1.0}))
    text = said(capsys, "compare", three / "a", three / "d")
    assert "No score is in the first run and in another one." in text


def test_runs_without_a_common_seed(three, capsys) -> None:
    run_of(three / "d", scores("RFM", "val", {7: 1.0, 9: 1.0}))
    text = said(capsys, "compare", three / "a", three / "d")
    assert "no seed in common: 7, 9 here, 0-2 in the first run" in text


def test_facts_that_differ_are_shown_alone(three, capsys) -> None:
    text = said(capsys, "compare", three / "a", three / "b").partition("Scores")[0]
    assert cells(text) == [
        ["kind", "what", "a", "b"],
        [":----------", ":--------------", ":-----------", ":---------------------"],
        ["given", "box_threshold", "-", "0.3"],
        ["effective", "box_threshold", "0.4", "0.3"],
        ["parameter", "seed", "0", "1"],
        ["run", "commit", "cccccccccc", "cccccccccc (changed)"],
    ]
    text = said(capsys, "compare", three / "a", three / "c").partition("Scores")[0]
    assert "No effective settings are recorded in c." in text
    assert [row[:2] for row in cells(text)[2:]] == [["given", "scales"], ["given", "dim"]]
    run_of(three / "d", scores("RFM", "val", {0: 1.0}), library="b" * 64, versions={"torch": "3"})
    run_of(three / "e", scores("RFM", "val", {0: 1.0}), library="b" * 64, versions={"torch": "3"})
    text = said(capsys, "compare", three / "a", three / "d")
    assert ["run", "library", "aaaaaaaaaa", "bbbbbbbbbb"] in cells(text)
    assert ["version", "torch", "2.6", "3"] in cells(text)
    run_of(three / "f", scores("RFM", "val", {0: 1.0}), commit=None, clean=None)  # without git
    assert ["run", "commit", "cccccccccc", "-"] in cells(
        said(capsys, "compare", three / "a", three / "f")
    )
    assert "All that is recorded is the same." in said(
        capsys, "compare", three / "d", three / "e" / f"{NAME}.json"
    )


def test_the_whole_comparison_is_written(three, capsys) -> None:
    out = three / "new" / "compared.csv"
    for _ in range(2):  # it replaces its own file
        weclip(["compare", str(three / "a"), str(three / "b"), "--out", str(out)])
    table = pd.read_csv(out).set_index(["variant", "split", "run"]).sort_index()
    assert len(table) == 7
    row = table.loc[("RFM", "val", "b")]
    assert row["mean"] == pytest.approx(75.833333) and row["spread"] == pytest.approx(3.685557)
    assert row[["difference", "lowest", "highest", "pairs"]].tolist() == [0.75, 0.5, 1.0, 2]
    other = table.loc[("RFM", "test", "b")]
    assert pd.isna(other["difference"]) and other["pairs"] == 0
    for place, message in (
        (three / "a" / f"{NAME}.csv", "is no comparison: choose another --out"),
        (three, r"is a folder: give a file, such as .*runs/compared.csv"),
        (compare.RESULTS / "mini" / "x.csv", "only `make publish` writes there"),
    ):
        before = place.read_bytes() if place.is_file() else None
        with pytest.raises(SystemExit, match=message):
            weclip(["compare", str(three / "a"), str(three / "b"), "--out", str(place)])
        assert before is None or place.read_bytes() == before


def test_the_shared_notebook_is_found(three, capsys) -> None:
    rows = scores("RFM", "val", {0: 70})
    for folder, name in (("a", "02_decoder_training"), ("d", "02_decoder_training")):
        run_of(three / folder, rows, name=name, notebook=name)
    assert said(capsys, "compare", three / "a", three / "d").startswith("02_decoder_training: a, d")
    run_of(three / "d", rows)
    for wanted in ("03", "3", NAME):
        text = said(capsys, "compare", three / "a", three / "d", "--notebook", wanted)
        assert text.startswith(f"{NAME}: a, d")
    (three / "a" / f"{NAME}_curve.csv").write_text("")
    for file in (f"{NAME}.csv", f"{NAME}_curve.csv"):
        text = said(capsys, "compare", three / "a" / file, three / "d")
        assert text.startswith(f"{NAME}: a, d")


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["a"], r"1 run\(s\) given: give two or more"),
        ([], r"0 run\(s\) given"),
        (["a", "none"], "none is not there: `weclip runs` lists all runs"),
        (["a", "a/../a"], "a run is given twice"),
        (["a", "empty"], "empty holds no table of a run: `weclip runs` lists all runs"),
        (["a", "."], r"\. holds no table of a run: `weclip runs \.` lists those below it"),
        (["a", "a/log.txt"], "a/log.txt is no table of a run: give the run's folder"),
        (["a", "other"], "not runs of one notebook: a holds 03.*; other holds 02.*: leave out"),
        (["a", "both"], None),
        (["both", "both2"], "all hold 02_.*, 03_.*: choose one, such as --notebook 02"),
        (["a", "b", "--notebook", "4"], "a holds 03_rfm_ablation: change --notebook 4"),
    ],
)
def test_requests_that_cannot_be_right(three, monkeypatch, capsys, runs, message) -> None:
    monkeypatch.chdir(three)
    (three / "empty").mkdir()
    (three / "a/log.txt").write_text("")
    rows, other = scores("RFM", "val", {0: 70}), "02_decoder_training"
    run_of(three / "other", rows, name=other, notebook=other)
    for folder in ("both", "both2"):
        run_of(run_of(three / folder, rows), rows, name=other, notebook=other)
    if message is None:
        assert said(capsys, "compare", *runs).startswith(f"{NAME}: a, both")
        return
    with pytest.raises(SystemExit) as stopped:
        weclip(["compare", *runs])
    told = f"{stopped.value} {' '.join(capsys.readouterr().err.split())}"
    assert re.search(message, told)


@pytest.mark.parametrize(
    ("ending", "change", "message"),
    [
        ("csv", lambda text: text.replace(",metric", ",measure"), "metric.* not in index"),
        ("csv", lambda text: text.replace("70.00", "high"), "could not convert"),
        ("csv", lambda text: text.replace("70.00", "nan"), "a value is no number"),
        ("csv", lambda text: text.splitlines()[0] + "\n", "it is empty or cut"),
        ("csv", lambda text: text[:-12], "its last line is cut"),
        ("csv", lambda text: text[:-2] + "\n", "it mixes profiles, or is cut"),
        ("csv", lambda text: text + text.splitlines()[1] + "\n", "there twice for a seed"),
        ("csv", lambda text: "\0" * 9, r"\("),
        ("json", lambda text: text[:50], r"\("),
        ("json", lambda text: "[]", r"\("),
        ("json", lambda text: text.replace(NAME, "02_x"), "it is of 02_x"),
        ("json", lambda text: text.replace("2026-", "the 3rd of "), "Invalid isoformat"),
        ("json", lambda text: text.replace('"parameters": {', '"p": {'), "'parameters'"),
    ],
)
def test_damaged_runs_are_named(three, monkeypatch, capsys, ending, change, message) -> None:
    monkeypatch.chdir(three)
    path = three / "a" / f"{NAME}.{ending}"
    path.write_text(change(path.read_text()))
    with pytest.raises(
        SystemExit, match=f"error: a/{NAME}.{ending} cannot .*({message})"
    ) as stopped:
        weclip(["compare", "b", "a"])
    assert str(stopped.value).endswith(": run the notebook again")
    (line,) = [line for line in said(capsys, "runs", ".").splitlines() if line.startswith("a ")]
    assert f"{NAME}.{ending} cannot be read" in line and "a/03" not in line


def test_a_stopped_run_is_listed(three, monkeypatch, capsys) -> None:
    monkeypatch.chdir(three)
    (three / "d" / ".partial" / NAME / "notebooks").mkdir(parents=True)
    (line,) = [line for line in said(capsys, "runs", ".").splitlines() if line.startswith("d ")]
    assert "this run did not finish: run the notebook again" in line


def test_the_newest_run_is_listed_last(three, monkeypatch, capsys) -> None:
    run_of(three / "sweeps/grid/x=1", scores("RFM", "val", {5: 1.0}), parameters={"steps": 9})
    for hidden in (".partial", "watched_runs"):
        run_of(three / hidden / "x", scores("RFM", "val", {0: 1.0}))
    lines = said(capsys, "runs", "runs", "runs/a").splitlines()
    assert [line.split()[0] for line in lines] == [
        "run", "runs/c", "runs/a", "runs/sweeps/grid/x=1", "runs/b",
    ]  # fmt: skip
    found = [" ".join(line.split()[1:]) for line in lines[1:]]
    assert found == [
        f"{NAME} mini 0-2 scales=[1.0, 0.75], dim=64 cpu cccccccccc 2026-01-01 10:00",
        f"{NAME} mini 0-2 - cpu cccccccccc 2026-01-02 10:00",
        f"{NAME} mini 5 steps=9 cpu cccccccccc 2026-01-02 10:00",
        f"{NAME} mini 0-3 box_threshold=0.3 cpu cccccccccc (changed) 2026-01-02 10:30",
    ]
    monkeypatch.chdir(three / "sweeps")
    assert said(capsys, "runs", ".").splitlines()[1].split()[0] == "grid/x=1"


def test_runs_of_one_notebook_are_listed(three, capsys) -> None:
    other = "06_training_cost"  # a name that ends as a kind of table does
    run_of(three / "a", scores("RFM", "val", {-1: 1.0}), name=other, notebook=other)
    (three / "a" / f"{other}_cost.csv").write_text("variant\n")
    text = said(capsys, "runs", three, "--notebook", "6")
    assert len(text.splitlines()) == 2 and f"{other}  mini       none " in text
    weclip(["runs", str(three), "--notebook", "04"])
    assert "no such run in runs" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="none is no folder: give one with runs"):
        weclip(["runs", "none"])


def test_unfinished_runs_are_named(three, capsys) -> None:
    (three / "a" / f"{NAME}.json").unlink()
    (three / "b" / f"{NAME}.csv").rename(three / "b" / f"{NAME}_curve.csv")
    (three / "b" / f"{NAME}.json").unlink()
    (three / "c" / "checkpoint-0000002").mkdir()  # beside a notebook's tables
    (three / "t" / "checkpoint-0000002").mkdir(parents=True)
    lines = {line.split()[0]: line for line in said(capsys, "runs", three).splitlines()}
    assert f"{NAME}.json is not there, so this run did not finish: run the" in lines["runs/a"]
    assert f"{NAME}.csv is not there, so this run did not finish" in lines["runs/b"]
    assert "trained.safetensors is not there, so this run did not finish" in lines["runs/t"]
    assert lines["runs/c"].split()[1] == NAME and len(lines) == 5


def test_the_published_runs_are_listed_by_default(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    where = os.path.relpath(compare.RESULTS / "mini")
    lines = [line.split() for line in said(capsys, "runs").splitlines()]
    listed = {line[1] for line in lines if line[0] == where}
    assert listed == {path.stem for path in (compare.RESULTS / "mini" / "notebooks").iterdir()}


def trained(folder, *, steps=4, seed=0, loss=1.5):
    folder.mkdir(parents=True)
    note = {"profile": "voc", "backbone": "B", "steps": steps}
    save_tensors({"w": torch.zeros(1)}, folder / "trained.safetensors", note)
    points = [(2, "loss", 9.0), (4, "loss", loss), (2, "miou", 40.0)]
    lines = "".join(f"{step},{name},{value}\n" for step, name, value in points)
    (folder / "curve.csv").write_text(f"iteration,metric,value\n{lines}")
    for step, kept in ((2, {"seed": 99}), (10_000_000, {"seed": seed, "budget.batch": steps})):
        state = folder / f"checkpoint-{step:07d}" / "state.json"
        state.parent.mkdir()
        state.write_text(json.dumps({"settings": kept}))


def test_training_runs_are_listed_and_compared(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "a")
    trained(tmp_path / "b", steps=8, loss=1.25)
    trained(tmp_path / "c", seed=3)
    text = said(capsys, "compare", "a", "b", "c/curve.csv")
    found = cells(text)
    assert ["note", "steps", "4", "8", "4"] in found
    assert ["setting", "seed", "0", "0", "3"] in found
    assert ["step 4", "training", "loss", "a", "1.50", "1", "-", ""] in found
    assert ["", "", "", "b", "1.25", "1", "-", "-0.25 (one seed, which may be chance)"] in found
    assert ["step 2", "validation", "miou", "a", "40.00", "1", "-", ""] in found
    assert found[-1][-1] == "no seed in common: 3 here, 0 in the first run"
    (line,) = [line for line in said(capsys, "runs", ".").splitlines() if line.startswith("b ")]
    assert line.split()[:6] == ["b", "train", "voc", "0", "backbone=B,", "steps=8"]
    for path in (tmp_path / "b").glob("checkpoint-*/state.json"):
        path.unlink()
    made = {"parameters": {"seed": 0}, "commit": "0123456789abcdef", "device": "a GPU"}
    (tmp_path / "c/train.json").write_text(json.dumps(made))
    (line,) = [line for line in said(capsys, "runs", ".").splitlines() if line.startswith("c ")]
    assert re.search(r"a GPU +0123456789 ", line)
    (tmp_path / "c/train.json").write_text("{")
    with pytest.raises(SystemExit, match=r"c/train.json cannot be read .*give its `weclip train`"):
        weclip(["compare", "a", "c"])
    text = said(capsys, "compare", "a", "b")
    assert "No settings are recorded in b." in text
    assert "no seed in common: unknown here, 0 in the first run" in text
    whole = (tmp_path / "b/curve.csv").read_text()
    (tmp_path / "b/curve.csv").write_text(whole[:-3])
    with pytest.raises(SystemExit, match=r"b/curve.csv cannot be read \(its last line is cut\)"):
        weclip(["compare", "a", "b"])
    (tmp_path / "b/curve.csv").write_text(whole)
    (tmp_path / "b/trained.safetensors").write_bytes(b"cut")
    with pytest.raises(SystemExit, match=r"error: b/trained.safetensors cannot be read"):
        weclip(["compare", "a", "b"])


def test_scored_runs_are_listed_and_compared(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name, miou in (("a", 60.0), ("b", 61.5)):
        (tmp_path / name).mkdir()
        text = f"prediction,miou,pixel accuracy,split,pictures\nwith CRF,{miou},90.0,val,11\n"
        (tmp_path / name / "scores.csv").write_text(text)
    text = said(capsys, "compare", "a/scores.csv", "b")
    assert "Nothing is recorded about how these runs were made." in text
    assert ["with CRF", "val", "miou", "a", "60.00", "1", "11", ""] in cells(text)
    assert "+1.50 (one seed, which may be chance)" in text
    line = said(capsys, "runs", ".").splitlines()[1]
    assert line.split()[:6] == ["a", "score", "-", "unknown", "split=val,", "pictures=11"]
    trained(tmp_path / "t")
    with pytest.raises(SystemExit, match="not runs of one notebook: a holds score; t holds train"):
        weclip(["compare", "a", "t"])
    (tmp_path / "b/scores.csv").write_text("prediction,miou\n")
    with pytest.raises(SystemExit, match=r"b/scores.csv cannot be read .*`weclip score` again"):
        weclip(["compare", "a", "b"])


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/x/runs/a", "/x/runs/b"], ["a", "b"]),
        (["/x/runs/mini", "/x/results/mini", "/x/c"], ["runs/mini", "results/mini", "c"]),
        (["/a/x/m", "/b/x/m"], ["a/x/m", "b/x/m"]),
        (["/m", "/x/m"], ["/m", "x/m"]),
    ],
)
def test_names_are_as_short_as_they_can_be(folders, names) -> None:
    assert compare.short_names([compare.Path(folder) for folder in folders]) == names
