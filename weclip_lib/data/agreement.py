"""This module compares masks with their pictures and tags, before training or scores use them.

A mask can be read without an error and still be wrong: it has 255 for "object", shifted ids or
colours in another order; it belongs to another picture, or was drawn before the picture was
turned upright. So each mask is compared with the tags.
"""

from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from weclip_lib.labels import IGNORE_INDEX
from weclip_lib.storage.files import Unusable, reading
from weclip_lib.storage.pictures import ON_ITS_SIDE, ORIENTATION, UPRIGHT, picture_size, read_mask

LIMIT = 0.25  # the share of a devkit's masks that may disagree with the annotations
MANY = 500  # for so many masks or more, a bar is shown
CORRECT = "correct the mask or the tags, or remove the mask"


@dataclass(frozen=True)
class Checked:
    """The faults of masks."""

    problems: list[str]  # they make scores or supervision wrong
    remarks: list[str]  # the user should look at them


@dataclass(frozen=True)
class _Seen:
    """One mask that was read: its fault, or its classes."""

    problem: str = ""
    ids: frozenset[int] = frozenset()
    mirrored: bool = False  # EXIF data mirror or turn the picture, and keep its size


def _look(mask: Path, image: Path, class_count: int) -> _Seen:
    try:
        with reading(image), Image.open(image) as opened:
            orientation = opened.getexif().get(ORIENTATION, 1)
        ids, size = read_mask(mask, class_count), picture_size(image)
    except Unusable as error:
        return _Seen(problem=str(error))
    if ids.shape != size:
        about = f"{mask} is {ids.shape[1]}x{ids.shape[0]} pixels, its picture {size[1]}x{size[0]}"
        remedy = "make them the same size (masks by nearest neighbour)"
        if ids.shape == size[::-1] and orientation in ON_ITS_SIDE:
            turn = f".transpose(Image.Transpose.{UPRIGHT[orientation]})"
            about += ", turned upright by its EXIF data"
            remedy = f"turn the mask, too: Image.open(path){turn}.save(path)"
        elif ids.shape == size[::-1]:
            remedy = "the mask is turned: turn it back, or take the picture that it was drawn on"
        return _Seen(problem=f"{about}: {remedy}")
    square = size[0] == size[1] and orientation in ON_ITS_SIDE
    found = frozenset(np.unique(ids).tolist())
    return _Seen(ids=found, mirrored=square or orientation in (2, 3, 4))


def _named(ids: Set[int], classes: Sequence[str]) -> str:
    return " and ".join(repr(classes[i - 1]) for i in sorted(ids)) or "background alone"


def _disagreement(
    masks: Sequence[Path],
    found: Sequence[frozenset[int]],
    wanted: Sequence[Set[int]],
    classes: Sequence[str],
    *,
    others_fit: bool,
) -> str:
    """Describe the first mask whose classes are not the tags, and name the cause."""
    known = [ids - {0, IGNORE_INDEX} for ids in found]
    many = f" ({len(masks)} such masks)" if len(masks) > 1 else ""
    about = (
        f"{masks[0]} holds {_named(known[0], classes)}, "
        f"its picture is tagged {_named(wanted[0], classes)}{many}"
    )
    void = [IGNORE_INDEX in ids and not objects for ids, objects in zip(found, known, strict=True)]
    shifted = [{i - 1 for i in ids} - {0} == tags for ids, tags in zip(known, wanted, strict=True)]
    if all(void):
        cause = f"{IGNORE_INDEX} is void and counts as nothing: write class ids of 1 and more"
    elif all(shifted) and not others_fit and not any(1 in ids for ids in known):
        cause = f"the ids are one too high: 0 is background, and 1 is {classes[0]!r}"
    else:
        cause = (
            f"an id is the class's place in the list ({', '.join(classes[:4])}, ...) and no number "
            f"of an object: {CORRECT}"
        )
    return f"{about}: {cause}"


def check_masks(
    masks: Sequence[Path],
    images: Sequence[Path],
    tags: Sequence[Sequence[str]],
    classes: Sequence[str],
    *,
    strict: bool,
) -> Checked:
    """Read masks, and compare each with its picture's size and tags.

    Args:
        classes: Foreground, in the order of their ids.
        strict: Whether every disagreement with the tags is a problem, as in a user's own folder.
            A devkit usually has a few; they become a remark.
    """
    with ThreadPoolExecutor() as pool:
        found = pool.map(partial(_look, class_count=1 + len(classes)), masks, images)
        seen = list(tqdm(found, total=len(masks), desc="masks", disable=len(masks) < MANY))
    problems = [one.problem for one in seen if one.problem]
    remarks = []
    numbers = {name: number for number, name in enumerate(classes, 1)}
    wanted = [{numbers[tag] for tag in tagged} for tagged in tags]
    wrong = [
        row
        for row, (one, ids) in enumerate(zip(seen, wanted, strict=True))
        if not one.problem and one.ids - {0, IGNORE_INDEX} != ids
    ]
    if wrong:
        rows = zip(*((masks[row], seen[row].ids, wanted[row]) for row in wrong), strict=True)
        right = set(range(len(seen))) - set(wrong)
        others_fit = any(seen[row].ids - {0, IGNORE_INDEX} and wanted[row] for row in right)
        about = _disagreement(*rows, classes, others_fit=others_fit)
        (problems if strict or len(wrong) > LIMIT * len(masks) else remarks).append(about)
    mirrored = [mask for mask, one in zip(masks, seen, strict=True) if one.mirrored]
    if mirrored:
        remarks.append(
            f"{mirrored[0]} belongs to a picture that its EXIF data turn or mirror "
            f"({len(mirrored)} such masks): nothing tells whether the mask is, too; look at it"
        )
    return Checked(problems, remarks)
