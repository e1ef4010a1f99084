"""What a kept result was computed by: modules, and all that they import."""

import ast
import subprocess
import sys

import pytest

from weclip_lib.storage import provenance as repro


@pytest.fixture
def package(tmp_path):
    """A library of five modules and a part, of which `a` needs all but `alone`."""
    folder = tmp_path / "lib"
    files = {
        "__init__": "",
        "a": "import os\nfrom lib.b import f\nfrom lib import c, VERSION\n",
        "b": "def f():\n    import lib.part.deep\n",
        "c": "from lib import a\n",  # round in a circle
        "alone": "",
        "part/__init__": "from . import beside\n",
        "part/deep": "from ..shared import x\n",
        "part/beside": "",
        "shared": "x = 1\n",
    }
    (folder / "part").mkdir(parents=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_all_that_a_module_imports_belongs_to_it(package) -> None:
    names = ["lib", "lib.a", "lib.b", "lib.c", "lib.part", "lib.part.beside", "lib.part.deep"]
    assert list(repro.needed_by("a", package=package)) == [*names, "lib.shared"]
    assert list(repro.needed_by("alone", package=package)) == ["lib", "lib.alone"]
    assert list(repro.needed_by("alone", "shared", package=package)) == [
        "lib",
        "lib.alone",
        "lib.shared",
    ]
    with pytest.raises(ValueError, match="has no module 'd'"):
        repro.needed_by("a", "d", package=package)


@pytest.mark.parametrize(("changed", "stale"), [("part/deep", True), ("alone", False)])
def test_what_is_imported_indirectly_changes_the_hash(package, changed, stale) -> None:
    before = repro.source_hash("a", package=package)
    (package / f"{changed}.py").write_text("y = 2\n")
    assert repro.source_hash("a", package=package) == before  # once per process
    repro.source_hash.cache_clear()
    assert (repro.source_hash("a", package=package) != before) == stale


def test_of_the_library_as_python_imports_it() -> None:
    """What Python has loaded for a module is what the hash is of."""
    loaded = "[m for m in sys.modules if m[:10] == 'weclip_lib']"
    code = f"import sys, weclip_lib.studies.sweep; print({loaded})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(ast.literal_eval(done.stdout)) == set(repro.needed_by("studies.sweep"))
