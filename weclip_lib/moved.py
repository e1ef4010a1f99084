"""Names that modules had before they moved into sub-packages: they go on working, with a warning.

`import weclip_lib.metrics` gives `weclip_lib.ops.metrics`, and `python -m weclip_lib.train` runs
`weclip train`. All of this goes with version 0.3.
"""

import sys
import warnings
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

WINGS = {
    "ops": ("affinity", "crf", "losses", "metrics", "par"),
    "storage": ("archive", "files", "lists", "pictures", "weights"),
    "data": ("agreement", "datasets", "doctor", "download", "instances", "layouts", "prepare"),
    "world": ("minivoc", "pretrain"),
    "figures": ("panels", "plotting"),
    "evaluation": ("inference", "plan"),
    "training": ("distributed", "loop", "sources", "train", "watch"),
    "studies": ("records", "results", "runner", "study", "sweep"),
    "explore": ("stages", "viewer"),
    "tools": ("bench", "site"),
}
MOVED = {name: f"{wing}.{name}" for wing, names in WINGS.items() for name in names} | {
    "cache": "training.features",
    "checkpoint": "storage.tensors",
    "evaluate": "evaluation.scores",
    "judge": "evaluation.errors",
    "parts": "explore.widgets",
    "repro": "storage.provenance",
    "state": "training.checkpoints",
    "ties": "explore.affinities",
}
COMMANDS = {"inference": [], "results": ["publish"], "runner": ["run"]}  # others: by their names


class _Loader(InspectLoader):
    """Gives the module of today, or the command that it used to run."""

    def __init__(self, old: str) -> None:
        self.old, self.new = old, f"weclip_lib.{MOVED[old]}"

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is now {self.new}", DeprecationWarning, stacklevel=2)
        module = import_module(self.new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # import has given it the old name's

    def get_source(self, fullname: str) -> str:
        command = COMMANDS.get(self.old, [self.old])
        lines = (
            "import sys",
            "from weclip_lib.__main__ import main",
            "if __name__ == '__main__':  # processes that are started import this, too",
            f"    main([*{command}, *sys.argv[1:]])",
        )
        return "\n".join(lines)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: object, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package == "weclip_lib" and name in MOVED:
            return ModuleSpec(fullname, _Loader(name))
        return None


def keep_old_names() -> None:
    """Let old names be found, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
