"""The direction of imports: every floor sees only those below it, and no forward pass a mask."""

import ast
from functools import cache

import pytest

from weclip_lib.storage.provenance import PACKAGE, ROOT

FLOORS = (  # from the ground up; a name is a module at the top, or a wing
    ("moved", "machine"),
    ("labels",),
    ("storage",),
    ("config",),
    ("commands",),
    ("ops",),
    ("backbone",),
    ("cam", "decoder", "rfm"),
    ("model",),
    ("world",),
    ("data",),
    ("figures",),
    ("evaluation",),
    ("training",),
    ("studies", "explore"),
    ("tools",),
)
BELOW = {
    name: {other for lower in FLOORS[:number] for other in lower}
    for number, floor in enumerate(FLOORS)
    for name in floor
}
WIDGETS = {"explore.widgets", "explore.explorers", "explore.viewer"}
ONLY = {
    "matplotlib": {"figures.plotting"},
    "papermill": {"studies.runner"},
    "ipywidgets": WIDGETS,
    "tyro": {"__main__", "commands"},
}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@cache
def imported(module: str) -> frozenset[str]:
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def test_every_module_has_a_floor() -> None:
    assert {name.split(".")[0] for name in MODULES} - {"__init__", "__main__"} == set(BELOW)


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("__")])
def test_imports_point_down(module) -> None:
    place = module.split(".")[0]
    own = {name.split(".")[1] for name in imported(module) if name.startswith("weclip_lib.")}
    assert own - {place} <= BELOW[place]


def test_within_a_wing_imports_make_no_circle() -> None:
    needed = {
        name: {other for other in MODULES if f"weclip_lib.{other}" in _with_parents(name)}
        for name in MODULES
    }
    while needed:
        free = [name for name, others in needed.items() if not others & set(needed) - {name}]
        assert free, f"a circle among {sorted(needed)}"
        for name in free:
            del needed[name]


def _with_parents(module: str) -> set[str]:
    names = imported(module)
    return names | {name.rpartition(".")[0] for name in names}


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_have_one_home(module) -> None:
    outside = {name.split(".")[0] for name in imported(module)}
    assert {
        package for package in ONLY if package in outside and module not in ONLY[package]
    } == set()


@pytest.mark.parametrize("module", ["cam", "decoder", "rfm", "model", "backbone"])
def test_no_forward_pass_can_read_a_mask(module) -> None:
    assert not {name for name in imported(module) if name.startswith("weclip_lib.data")}
    assert (ROOT / "weclip_lib" / f"{module}.py").is_file()
