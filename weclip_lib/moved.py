"""Old names of modules, from before they moved into sub-packages; they still work, with a warning.

`import weclip_lib.metrics` gives `weclip_lib.ops.metrics`, and `python -m weclip_lib.train` runs
`weclip train`. Version 0.3 removes all of this.
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
COMMANDS = {"inference": [], "results": ["publish"], "runner": ["run"]}  # others keep their names


class _Loader(InspectLoader):
    """Gives the module under its new name, or runs its command."""

    def __init__(self, old: str) -> None:
        self.old, self.new = old, f"weclip_lib.{MOVED[old]}"

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is now {self.new}", DeprecationWarning, stacklevel=2)
        module = import_module(self.new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import has set the old name's spec

    def get_source(self, fullname: str) -> str:
        command = COMMANDS.get(self.old, [self.old])
        lines = (
            "import sys, warnings",
            "from weclip_lib.__main__ import main",
            "if __name__ == '__main__':  # processes that are started import this, too",
            f"    warnings.warn('this is now weclip {' '.join(command)}', DeprecationWarning)",
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
    """Make the old names importable; a second call does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
