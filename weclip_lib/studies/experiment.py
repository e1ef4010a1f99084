"""The first and the last cell of every notebook: check what was given, find folders, write tables.

experiment = begin("03_rfm_ablation", globals())
...
experiment.finish()
"""

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from weclip_lib.backbone import Backbone, find_device, load_backbone
from weclip_lib.config import Budget
from weclip_lib.data.datasets import MaskedImages, open_profile
from weclip_lib.data.profiles import Profile, get_profile, official
from weclip_lib.data.settings import as_text, effective, with_settings
from weclip_lib.evaluation.kept import SUFFIX, Row, write_counts
from weclip_lib.evaluation.quality import ImageCounts
from weclip_lib.storage.files import check_writable
from weclip_lib.storage.provenance import ROOT, seed_everything, write_provenance
from weclip_lib.studies.parameters import (
    NOTEBOOKS,
    about,
    check_parameters,
    declared_parameters,
    injected,
)
from weclip_lib.studies.results import output_folder, write_table
from weclip_lib.studies.study import Study

PLACES = ("out_dir", "work_dir")  # parameters that no result depends on
PARTIAL = ".partial"  # the runner's folder for a notebook that has not finished


@dataclass(frozen=True)
class Experiment:
    """What a notebook runs with."""

    notebook: str
    setting: Profile  # with all that was set
    parameters: dict  # of the notebook, without output folders
    data: Path  # folder of the data set
    out: Path  # folder of the tables
    work: Path  # folder of cached features and finished decoders
    device: torch.device
    began: float  # on time.perf_counter

    @property
    def budget(self) -> Budget:
        """Return the budget of the decoders."""
        return self.setting.budget

    @property
    def seeds(self) -> range:
        """Return the seeds of the decoders."""
        first = self.parameters["seed"]
        return range(first, first + self.parameters["seed_count"])

    @property
    def settings(self) -> dict:
        """Return what was set."""
        return self.parameters["settings"]

    def backbone(self) -> Backbone:
        """Load the frozen CLIP, on the device."""
        setting = self.setting
        found = load_backbone(setting.backbone, setting.weights, setting.statistics)
        return found.to(self.device)

    def study(self, **changes: object) -> Study:
        """Make a study of the profile with some fields changed; seed everything random."""
        seed_everything(self.parameters["seed"])
        setting, pictures = replace(self.setting, **changes), self.parameters["pictures"]
        return Study(setting, self.data, self.work, pictures=pictures, device=self.device)

    def write_table(self, rows: Iterable[dict], kind: str = "") -> pd.DataFrame:
        """Write a table of the notebook (`results.write_table`); return it."""
        return write_table(self.out, self.notebook, rows, kind, self.settings)

    def finish(self, order: Sequence[str] = (), counts: Mapping[Row, ImageCounts] = {}) -> None:
        """Write what somebody needs to repeat the run, and print where its results are.

        Args:
            order: Of the variants in tables.
            counts: Pixels behind the scores, for `weclip verify`.
        """
        if counts:
            told = f" [{as_text(self.settings)}]" if self.settings else ""
            rows = {row._replace(variant=row.variant + told): c for row, c in counts.items()}
            names = ("background", *self.setting.labels.classes)
            write_counts(self.out / f"{self.notebook}{SUFFIX}", rows, names)
        written = write_provenance(
            self.out / f"{self.notebook}.json",
            self.notebook,
            self.parameters,
            self.device,
            order=list(order),
            effective=effective(self.setting),
        )
        versions = ", ".join(f"{name} {version}" for name, version in written["versions"].items())
        seconds = time.perf_counter() - self.began
        sys.stdout.write(
            f"commit {written['commit']} (clean: {written['clean']}), Python {written['python']}\n"
            f"{versions}\n"
            f"{written['machine']}, device {written['device']}; {seconds:.0f} s\n"
            f"results are in {os.path.relpath(_final(self.out))}\n"
        )


def _final(out: Path) -> Path:
    """Return the folder that the results move to when the runner ends."""
    return out.parent.parent if out.parent.name == PARTIAL else out


def begin(notebook: str, kernel: Mapping[str, object]) -> Experiment:
    """Check the parameters of a notebook, before anything long; find folders and device; seed.

    Args:
        notebook: Its name, without ending.
        kernel: `globals()` of the notebook, with its parameters.

    Raises:
        ValueError: If a parameter is unknown, or has a wrong type or range; if a folder, the data
            or the device cannot be used. The message names it.
    """
    began, path = time.perf_counter(), NOTEBOOKS / f"{notebook}.ipynb"
    declared = declared_parameters(path)
    given = {name: kernel.get(name, about.default) for name, about in declared.items()}
    strange = injected(kernel.get("In", ())) - declared.keys()
    check_parameters(path, given | {name: kernel.get(name) for name in sorted(strange)})
    device = find_device(given["device"])
    own = about(path).get("makes_data")  # the notebook makes pictures, if none are given
    name, data_dir = given["profile"], given["data_dir"]
    weights = given.get("weights", "")
    if own:
        base = get_profile(name)
        base = official(base) if given.get("preset") == "official" else base
        setting, data = with_settings(base, given["settings"]), Path(data_dir)
        setting = replace(setting, weights=weights or setting.weights)
    else:
        setting, data = open_profile(name, data_dir, weights, given["settings"])
    steps = given.get("steps", 0) or setting.budget.steps
    setting = replace(setting, budget=replace(setting.budget, steps=steps))
    parameters = {name: value for name, value in given.items() if name not in PLACES}
    out = output_folder(given["out_dir"], notebook, parameters)
    work = Path(given.get("work_dir", "") or ROOT / "runs")
    for folder in (out, work):
        check_writable(folder)
    if "scored_splits" in given["settings"] and not own:
        for split in setting.scored_splits:
            MaskedImages(data, split, setting.labels, limit=1)
    seed_everything(given["seed"])
    changed = f", with {as_text(given['settings'])}" if given["settings"] else ""
    place = os.path.relpath(_final(out))
    sys.stdout.write(f"profile {setting.name}{changed}, on {device}; results go to {place}\n")
    return Experiment(notebook, setting, parameters, data, out, work, device, began)
