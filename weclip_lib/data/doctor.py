"""This module reports, in one run, what a data set has, what it lacks, and what is wrong."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from weclip_lib.commands import Doctor
from weclip_lib.data.agreement import check_masks
from weclip_lib.data.layouts import (
    data_root,
    is_own,
    own_labels,
    read_listing,
    splits_of,
    without_row,
)
from weclip_lib.data.profiles import get_profile
from weclip_lib.labels import LabelSet
from weclip_lib.storage.pictures import picture_problem

EXPECTED = {  # pictures a split, in the published data sets
    "VOC 2012": {"train": 1464, "val": 1449, "trainval": 2913, "train_aug": 10_582},
    "COCO 2014": {"train": 82_783, "val": 40_504},
}
REMEDIES = {
    "VOC 2012": "VOC: `make data DATASET=voc`, then train_aug by `make data DATASET=sbd`",
    "COCO 2014": "COCO: `make data DATASET=coco`",
}


@dataclass
class Report:
    """The result of `examine`."""

    splits: list[str] = field(default_factory=list)  # a line each: pictures, masks, classes
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # to look at; these are no faults

    def text(self) -> str:
        """Return the report as text for the user."""
        found = [f"- {problem}" for problem in self.problems]
        remarks = [f"- remark: {remark}" for remark in self.remarks]
        problems = [f"{len(found) or 'No'} problem{'s' * (len(found) != 1)} found", *found]
        return "\n".join([*self.splits, *problems, *remarks])

    def tell(self) -> None:
        """Print the report; end the command with status 1 if something is wrong."""
        sys.stdout.write(f"{self.text()}\n")
        if self.problems:
            raise SystemExit(1)


def examine(folder: Path, labels: LabelSet, *, min_size: int = 1, complete: bool = True) -> Report:
    """Read all lists, decode all pictures and masks, and collect what is wrong.

    Args:
        min_size: Smallest side of a picture, in pixels: one patch.
        complete: Whether a published data set has to have all its splits and pictures.
    """
    report = Report()
    if not folder.is_dir():
        remedy = REMEDIES.get(labels.name, "give a folder with images/ and labels.csv")
        report.problems.append(f"{folder} is not there: {remedy}")
        return report
    expected = EXPECTED.get(labels.name, {}) if complete else {}
    pictures, masks, own = {}, {}, is_own(folder)
    splits, known = splits_of(folder), set()

    def note(problem: str) -> None:
        """Add a problem once, though several splits may have it."""
        if problem not in known:
            known.add(problem)
            report.problems.append(problem)

    for split in splits:
        try:
            listing = read_listing(folder, split, labels.classes, note, with_masks=True)
        except ValueError as error:
            note(str(error))
            continue
        with_mask = [os.path.lexists(mask) for mask in listing.masks]
        tagged = {tag for tags in listing.tags for tag in tags}
        report.splits.append(
            f"{split}: {len(listing.names)} pictures, {sum(with_mask)} masks, "
            f"{len(tagged)} of {len(labels.classes)} classes"
        )
        if split in expected and len(listing.names) != expected[split]:
            note(f"{split} has {len(listing.names)} pictures; everybody's has {expected[split]}")
        pictures |= dict.fromkeys(listing.images)
        about = zip(listing.masks, listing.images, listing.tags, with_mask, strict=True)
        masks |= {mask: (image, tags) for mask, image, tags, there in about if there}
    missing = [split for split in expected if split not in splits]
    if missing or not splits:
        what = ", ".join(missing) or "any"
        report.problems.append(
            f"{folder} has no list of {what}: {REMEDIES.get(labels.name, 'see data/README.md')}"
        )
    with ThreadPoolExecutor() as pool:
        look = partial(picture_problem, min_size=min_size, thorough=True)
        found = list(tqdm(pool.map(look, pictures), total=len(pictures), desc="pictures"))
        broken = {path for path, problem in zip(pictures, found, strict=True) if problem}
    sound = {mask: about for mask, about in masks.items() if about[0] not in broken}
    images, tags = ([about[place] for about in sound.values()] for place in (0, 1))
    judged = check_masks(list(sound), images, tags, labels.classes, strict=own)
    report.problems += [problem for problem in found if problem] + judged.problems
    report.remarks += judged.remarks + (without_row(folder) if own else [])
    return report


def run(chosen: Doctor) -> None:
    """Run `weclip doctor`.

    Raises:
        ValueError: If a fault ends the check; the message adds the faults in the classes.
    """
    folder, words = data_root(chosen.folder), []
    try:
        if folder.is_dir() and is_own(folder):
            labels = own_labels(folder, words.append)
        else:
            labels = get_profile(chosen.profile).labels
        report = examine(folder, labels)
    except ValueError as error:
        raise ValueError("\n- ".join([str(error), *words])) from error
    report.problems = list(dict.fromkeys([*words, *report.problems]))
    report.tell()
