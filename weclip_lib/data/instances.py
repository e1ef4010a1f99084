"""This module reads and checks COCO's instances in JSON, and paints them as maps of class ids.

pycocotools draws polygons. It accepts much wrong input in silence: it takes four numbers for a box,
and an odd count of numbers. If run lengths end too early, it fills the other pixels with whatever
lay in memory. So this module checks everything first.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType

import numpy as np
from jaxtyping import Bool, UInt8

from weclip_lib.labels import COCO_CLASSES
from weclip_lib.storage.files import Unusable, in_a_line, reading
from weclip_lib.storage.lists import read_text

JSON_AGAIN = "remove it and unpack annotations_trainval2014.zip again"
MOST_SIDE = 65_535  # pixels: no JPEG has more


def _polygons(outline: list, shape: tuple[int, int]) -> list[np.ndarray]:
    """Return polygons as COCO lists them, x and y in turn; pycocotools would not check them.

    Raises:
        ValueError: If one is no list of numbers, has fewer than three points, or lies far outside.
    """
    if not outline:
        raise ValueError("an empty segmentation")
    found = []
    for polygon in outline:
        points = np.asarray(polygon)  # raises ValueError for lists of unequal length
        if points.ndim != 1 or points.dtype.kind not in "iuf" or not np.isfinite(points).all():
            raise ValueError("a polygon that is no list of numbers")
        if points.size < 6 or points.size % 2:
            raise ValueError(f"a polygon of {points.size} numbers, not x and y of 3 points or more")
        for values, side in zip((points[1::2], points[::2]), shape, strict=True):
            if values.min() < -side or values.max() > 2 * side:
                raise ValueError(
                    f"a polygon outside of its picture of {shape[1]}x{shape[0]} pixels"
                )
        found.append(points.astype(np.float64))
    return found


def _unpacked(counts: str | bytes) -> list[int]:
    """Decode run lengths, 5 bits a character; the fourth and later add to the last but one.

    Source: pycocotools, rleFrString in common/maskApi.c; its decoder does not check their sum.
    """
    found: list[int] = []
    value = shift = 0
    for code in counts.encode() if isinstance(counts, str) else counts:
        bits = code - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError("run lengths that are damaged")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of a number: its highest bit is the sign
            value -= (bits & 16) << shift - 4
            found.append(value + (found[-2] if len(found) > 2 else 0))
            value = shift = 0
    return found


def _runs(outline: object, shape: tuple[int, int]) -> list[int]:
    """Return the lengths of runs of pixels, outside and inside in turn, down the columns.

    Raises:
        ValueError: If they are damaged, or belong to another picture.
    """
    size, counts = (outline.get(k) if isinstance(outline, dict) else 0 for k in ("size", "counts"))
    if not isinstance(counts, (list, str, bytes)):
        raise ValueError("a segmentation that is neither polygons nor run lengths")
    if size != list(shape):
        raise ValueError(f"run lengths for a picture of the size {size}, not {list(shape)}")
    runs = counts if isinstance(counts, list) else _unpacked(counts)
    if any(type(run) is not int or run < 0 for run in runs) or sum(runs) != math.prod(shape):
        raise ValueError(f"run lengths that do not sum up to its {math.prod(shape)} pixels")
    return runs


def _inside(outline: object, shape: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """Return which pixels an object covers."""
    if isinstance(outline, list):
        coder = load_pycocotools()
        code = coder.merge(coder.frPyObjects(_polygons(outline, shape), *shape))
        return coder.decode(code) == 1
    runs = _runs(outline, shape)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(shape, order="F")


def load_pycocotools() -> ModuleType:
    """Return pycocotools' module for masks, which draws polygons.

    Raises:
        ValueError: If pycocotools cannot be imported.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ValueError(
            f"pycocotools cannot be used ({in_a_line(error)}): in the folder of this repository, "
            "run `pip install -e '.[coco]'`"
        ) from error
    return mask


def paint(
    shape: tuple[int, int], annotations: Sequence[dict], ids: Mapping[int, int]
) -> UInt8[np.ndarray, "height width"]:
    """Paint one map of class ids from COCO's annotations; the smaller object lies in front.

    Of two objects with equal areas, the later one lies in front.

    Args:
        annotations: `segmentation`, `area`, `category_id` of one picture's objects and crowds.
        ids: Class ids by category.

    Raises:
        ValueError: If a segmentation cannot be of this picture.
    """
    found = np.zeros(shape, np.uint8)
    for about in sorted(annotations, key=lambda about: -about["area"]):
        found[_inside(about["segmentation"], shape)] = ids[about["category_id"]]
    return found


@dataclass(frozen=True)
class Instances:
    """The content of one of COCO's annotation files, by the number of a picture or category."""

    names: dict[int, str]
    shapes: dict[int, tuple[int, int]]
    annotations: dict[int, list[dict]]
    ids: dict[int, int]

    def tags(self, number: int) -> list[str]:
        return [COCO_CLASSES[self.ids[a["category_id"]] - 1] for a in self.annotations[number]]


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object of JSON; refuse a key that comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"{twice!r} comes twice in one object")
    return found


def _called(about: dict, position: int) -> str:
    return repr(about["id"]) if "id" in about else f"at position {position} of its list"


def _check_picture(about: dict) -> None:
    if type(about.get("id")) is not int:
        raise ValueError("its id is no whole number")
    file = about.get("file_name")
    place = PurePosixPath(file if isinstance(file, str) else "")
    hidden = place.is_absolute() or any(part.startswith(".") for part in place.parts)
    odd = str(place) != file or not file.isprintable() or any(sign in file for sign in "\\:")
    if hidden or odd or place.suffix != ".jpg" or place.stem != place.stem.strip():
        raise ValueError(f"its file_name is {file!r}: it has to be NAME.jpg, inside the folder")
    for side in ("height", "width"):
        if type(about.get(side)) is not int or not 0 < about[side] <= MOST_SIDE:
            raise ValueError(f"its {side} is {about.get(side)!r}, not 1 to {MOST_SIDE} pixels")


def _check_annotation(about: dict, found: Instances) -> None:
    number, category, area = (about.get(key) for key in ("image_id", "category_id", "area"))
    if type(number) is not int or number not in found.names:
        raise ValueError(f"there is no picture of its image_id {number!r}")
    if type(category) is not int or category not in found.ids:
        raise ValueError(f"there is no category of its category_id {category!r}")
    if type(area) not in (int, float) or not 0 <= area < math.inf:
        raise ValueError(f"its area is {area!r}, not a number of 0 or more")
    outline, shape = about.get("segmentation"), found.shapes[number]
    (_polygons if isinstance(outline, list) else _runs)(outline, shape)


def read_instances(path: Path, place: str) -> Instances:
    """Read one of COCO's annotation files, and check everything in it.

    Raises:
        Unusable: If something in it cannot be used; the message names the first such thing.
    """
    with reading(path, JSON_AGAIN):
        content = json.loads(read_text(path), object_pairs_hook=_once)
    for key in ("categories", "images", "annotations"):
        listed = content.get(key) if isinstance(content, dict) else None
        if not isinstance(listed, list) or not all(isinstance(about, dict) for about in listed):
            raise Unusable(f"{path} has no list of objects {key!r}, as COCO's have: {JSON_AGAIN}")
    numbers = [about.get("id") for about in content["categories"]]
    if [about.get("name") for about in content["categories"]] != list(COCO_CLASSES):
        raise Unusable(f"{path} has other categories than COCO's 80: {JSON_AGAIN}")
    if any(type(n) is not int for n in numbers) or len(set(numbers)) < len(numbers):
        raise Unusable(
            f"{path} has categories whose id is no whole number, or comes twice: {JSON_AGAIN}"
        )
    ids = {number: class_id for class_id, number in enumerate(numbers, 1)}
    found, names = Instances({}, {}, defaultdict(list), ids), set()
    for position, about in enumerate(content["images"]):
        where = f"{path}: picture {_called(about, position)}"
        try:
            _check_picture(about)
        except ValueError as error:
            raise Unusable(f"{where}: {in_a_line(error)}; correct or remove it") from error
        number, name = about["id"], f"{place}/{about['file_name'].removesuffix('.jpg')}"
        if number in found.names or name in names:
            raise Unusable(f"{where} ({about['file_name']}) is listed twice: remove one")
        names.add(name)
        found.names[number], found.shapes[number] = name, (about["height"], about["width"])
    for position, about in enumerate(content["annotations"]):
        try:
            _check_annotation(about, found)
        except ValueError as error:
            which = f"annotation {_called(about, position)} of picture {about.get('image_id')!r}"
            raise Unusable(f"{path}: {which}: {in_a_line(error)}; correct or remove it") from error
        kept = {key: about[key] for key in ("segmentation", "area", "category_id")}
        found.annotations[about["image_id"]].append(kept)
    return found
