"""Every notebook: the house style, and a run in profile smoke."""

import importlib
import re
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from weclip_lib.data.profiles import PROFILES
from weclip_lib.storage.pictures import write_mask
from weclip_lib.storage.provenance import ROOT
from weclip_lib.studies import runner
from weclip_lib.studies.records import read_record
from weclip_lib.studies.results import SCHEMAS

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
EXERCISES = sorted((ROOT / "notebooks" / "exercises").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS[:3]] == ["00", "01", "02"]


@each
def test_anatomy(path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = notebook.cells
    assert re.match(r"# \d\d · ", cells[0].source)
    for word in ("Question", "Paper reference", "Needs", "Writes", "Time"):
        assert f"**{word}.**" in cells[0].source
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(len(cell.source.splitlines()) <= 25 for cell in code)
    assert not any(re.search(r"^class ", cell.source, re.MULTILINE) for cell in code)
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    code = code[1:] if "install" in code[0].metadata.get("tags", []) else code
    assert tagged == [code[1]]
    assert all(re.match(r"\w+: \w+ = .+  # ", line) for line in tagged[0].source.splitlines())
    assert {"seed", "profile", "out_dir"} <= set(runner.declared_parameters(path))
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for title in ("## Checks", "## What we saw"):
        assert re.search(f"^{title}$", prose, re.MULTILINE)
    assert code[-1].source.startswith("experiment.finish(")
    assert "begin(NAME, globals())" in code[2].source
    assert {"settings", "device"} <= set(runner.declared_parameters(path))
    assert all(cell.get("outputs") == [] and cell.execution_count is None for cell in code)


def test_every_behaviour_of_the_official_code_has_a_row() -> None:
    """The last column names what does it here: things that exist."""
    notebook = nbformat.read(ROOT / "notebooks" / "07_official_vs_intended.ipynb", as_version=4)
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    rows = [line.split(" | ") for line in source.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[0].strip("| ")) for row in rows] == list(range(1, 45))
    for row in rows:
        for name in re.findall(r"`([\w./]+)`", row[-1]):
            if name.startswith("tests/"):
                assert (ROOT / name).exists()
                continue
            found = importlib.import_module("weclip_lib")
            for part in name.split("."):
                fields = getattr(found, "__dataclass_fields__", {})
                if isinstance(found, ModuleType) and hasattr(found, "__path__"):
                    found = importlib.import_module(f"{found.__name__}.{part}")
                else:
                    found = fields[part] if part in fields else getattr(found, part)


def test_every_lesson_has_exercises_and_the_index_names_all() -> None:
    assert [path.stem for path in EXERCISES] == [path.stem for path in NOTEBOOKS]
    index = nbformat.read(ROOT / "notebooks" / "index.ipynb", as_version=4)
    links = re.findall(r"\]\((\S+\.ipynb)\)", "\n".join(cell.source for cell in index.cells))
    assert {str(path.relative_to(ROOT / "notebooks")) for path in (*NOTEBOOKS, *EXERCISES)} <= set(
        links
    )
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        assert any(f"exercises/{path.name}" in cell.source for cell in cells)


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.stem)
def test_every_exercise_has_a_folded_solution_that_can_fail(path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    numbers = []
    for cell, following in pairwise(cells):
        if asked := re.search(r"^## (\d) · ", cell.source, re.MULTILINE):
            numbers.append(int(asked[1]))
            assert following.metadata["jupyter"]["source_hidden"] and "assert" in following.source
    assert numbers == list(range(1, len(numbers) + 1)) and 3 <= len(numbers) <= 5


@pytest.mark.notebook
@pytest.mark.parametrize(
    "path", [*EXERCISES, ROOT / "notebooks" / "index.ipynb"], ids=lambda path: path.stem
)
def test_solutions_hold(path, smoke_study) -> None:
    """Cell by cell, in this process: a kernel for each would take longer than the solutions do."""
    told = f'\nprofile, data_dir = "smoke", {str(smoke_study.folder)!r}\n'
    names: dict = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            more = told if "parameters" in cell.metadata.get("tags", []) else ""
            exec(compile(cell.source + more, f"{path.name}, {cell.source[:40]!r}", "exec"), names)
    plt.close("all")


def small_folder(folder, tags: list[str], *, masks: bool) -> None:
    """Pictures of one's own with these tags, and perhaps masks of them."""
    classes = sorted({tag for tagged in tags for tag in tagged.split(";") if tag})
    (folder / "images").mkdir(parents=True)
    rows = ["file,tags\n"]
    for number, tagged in enumerate(tags):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 72, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"p{number}.jpg")
        rows.append(f"p{number}.jpg,{tagged}\n")
        mask = np.zeros((64, 72), np.uint8)
        for tag in filter(None, tagged.split(";")):
            mask[:, 9 * classes.index(tag) : 9 + 9 * classes.index(tag)] = 1 + classes.index(tag)
        if masks:
            write_mask(folder / "masks" / f"p{number}.png", mask)
    (folder / "labels.csv").write_text("".join(rows))
    (folder / "backgrounds.txt").write_text("grass\nsky\nwater\n")


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("tags", "masks"),
    [
        (["boat", "cat", "boat;cat", "", "boat", "cat"], False),
        (["boat"] * 6, True),  # one class, in every picture
        (["boat;cat", "boat", "boat;cat;dog", "boat"], False),  # one class in every picture
    ],
)
@pytest.mark.parametrize("name", ["01_cam_generation", "08_your_own_images"])
def test_on_folders_as_people_have_them(name, tags, masks, tmp_path, monkeypatch, capsys) -> None:
    smoke = PROFILES["smoke"]
    small = replace(smoke.budget, crop=64, steps=1)
    own = replace(PROFILES["folder"], backbone="MiniCLIP", weights="miniclip-v2", long_side=64,
                  statistics="own", decoder=smoke.decoder, budget=small)  # fmt: skip
    monkeypatch.setitem(PROFILES, "folder", own)
    small_folder(tmp_path / "own", tags, masks=masks)
    told = {"profile": "folder", "data_dir": str(tmp_path / "own"), "out_dir": str(tmp_path / "o")}
    names: dict = {}
    for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            more = f"\nglobals().update({told})" * ("parameters" in cell.metadata.get("tags", []))
            exec(compile(cell.source + more, f"{name}, {cell.source[:40]!r}", "exec"), names)
    plt.close("all")
    assert (tmp_path / "o" / f"{name}.csv").exists() == masks
    if name.startswith("08"):
        everywhere = "boat" if all("boat" in tagged for tagged in tags) else ""
        assert ("in every picture" in capsys.readouterr().out) == bool(everywhere)
        assert names["known"].between(0, 1).all()
        assert not (everywhere and everywhere in names["known"])
        assert len(list((tmp_path / "o" / "masks").rglob("*.png"))) == len(tags)


@pytest.mark.notebook
@each
def test_runs_in_smoke(path, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    places = {name: str(tmp_path / name) for name in ("data_dir", "work_dir")}
    declared = runner.declared_parameters(path)
    parameters = {"profile": "smoke"} | {k: v for k, v in places.items() if k in declared}
    (tmp_path / "data_dir").mkdir()
    assert runner.run_notebook(path, tmp_path, parameters)
    table = pd.read_csv(tmp_path / f"{path.stem}.csv")
    assert tuple(table.columns) == SCHEMAS[""]
    assert (table["profile"] == "smoke").all()
    assert table["value"].between(0, 100).all()
    own = ("photos", "masks", "predicted.csv") if path.stem.startswith("08") else ()
    for name in read_record(tmp_path, path.stem).files:  # all notebooks write into one folder
        first = name.split("/")[0]
        assert first.startswith(path.stem) or first in own or name == f"notebooks/{path.name}"
    assert not runner.run_notebook(path, tmp_path, parameters)
