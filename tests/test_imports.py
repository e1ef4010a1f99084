"""The direction of imports: maths sees no data, the model sees no masks."""

import ast

import pytest

from weclip_lib.repro import ROOT

LEAVES = {"labels", "config", "files", "lists", "options"}
MATHS = {"affinity", "par", "losses", "metrics", "crf"}
ALLOWED = {
    "labels": set(),
    "config": {"labels", "options"},
    "files": set(),
    "lists": {"files"},
    "options": set(),
    **dict.fromkeys(MATHS, LEAVES),
    "backbone": LEAVES | MATHS | {"weights"},
    "archive": {"files"},
    "weights": {"archive", "checkpoint", "files"},
    "decoder": LEAVES | MATHS,
    "checkpoint": LEAVES | {"archive"},
    "last_block": {"backbone"},
    "cam": LEAVES | MATHS | {"backbone", "last_block"},
    "rfm": LEAVES | MATHS,
    "records": {"config", "files", "repro"},
    "model": LEAVES | MATHS | {"backbone", "decoder", "cam", "rfm"},
    "minivoc": LEAVES | {"pictures"},
    "pictures": {"files", "labels"},
    "agreement": {"files", "labels", "pictures"},
    "layouts": {"files", "labels", "lists", "pictures"},
    "instances": {"files", "labels", "lists"},
    "prepare": LEAVES | {"instances", "layouts", "pictures"},
    "doctor": LEAVES | {"agreement", "layouts", "pictures"},
    "download": LEAVES | {"doctor", "layouts", "prepare", "repro"},
    "datasets": LEAVES | {"agreement", "layouts", "minivoc", "pictures"},
    "pretrain": LEAVES | {"minivoc", "backbone", "weights"},
    "cache": LEAVES | {"datasets", "model", "repro"},
    "distributed": {"options"},
    "sources": {"cache", "datasets", "files", "labels", "model"},
    "state": LEAVES | {"checkpoint", "distributed"},
    "probe": LEAVES | MATHS | {"backbone"},
    "stages": LEAVES | MATHS | {"backbone", "cam", "datasets", "probe", "rfm"},
    "ties": {"affinity", "config", "decoder", "probe", "rfm", "stages"},
    "watch": LEAVES | {"backbone", "checkpoint", "datasets", "decoder", "evaluate", "model"},
    "judge": LEAVES | MATHS,
    "panels": {"labels", "plotting"},
    "parts": {"panels", "pictures", "plotting", "stages"},
    "explore": {"config", "panels", "parts", "plotting", "stages", "ties"},
    "viewer": {"datasets", "judge", "labels", "metrics", "panels", "parts", "plotting", "watch"},
    "loop": LEAVES | {"cache", "datasets", "distributed", "model", "sources", "state"},
    "train": LEAVES
    | {"backbone", "cache", "checkpoint", "datasets", "distributed", "evaluate", "loop", "metrics"}
    | {"model", "plan", "repro", "sources", "state", "watch"},
    "evaluate": LEAVES | MATHS | {"backbone", "datasets", "decoder"},
    "plan": LEAVES | {"layouts", "pictures"},
    "inference": LEAVES
    | {"backbone", "checkpoint", "datasets", "decoder", "evaluate", "metrics", "pictures"}
    | {"plan", "plotting"},
    "study": LEAVES
    | {"backbone", "cache", "datasets", "evaluate", "loop", "metrics", "model", "repro", "sources"}
    | {"train", "watch"},
    "repro": LEAVES,
    "results": LEAVES | {"records", "repro", "runner"},
    "plotting": LEAVES,
    "bench": LEAVES | {"weights", "backbone", "cam", "evaluate", "loop", "model", "results"},
    "tried": LEAVES | {"backbone", "bench", "par", "results"},
    "processes": set(),
    "runner": LEAVES | {"processes", "records", "repro"},
    "site": {"files", "repro", "runner"},
    "sweep": LEAVES | {"processes", "records", "repro", "runner"},
}
WIDGETS = {"parts", "explore", "viewer"}
ONLY = {"matplotlib": {"plotting"}, "papermill": {"runner"}, "ipywidgets": WIDGETS}


def imported(module: str) -> set[str]:
    tree = ast.parse((ROOT / "weclip_lib" / f"{module}.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = sorted(p.stem for p in (ROOT / "weclip_lib").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module) -> None:
    own = {name.split(".")[1] for name in imported(module) if name.startswith("weclip_lib.")}
    assert own <= ALLOWED[module]


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_have_one_home(module) -> None:
    outside = {name.split(".")[0] for name in imported(module)}
    assert {
        package for package in ONLY if package in outside and module not in ONLY[package]
    } == set()
