"""Make the devkits of VOC 2012, SBD and COCO-2014 readable by `layouts`, without copying pictures.

New files lie beside the devkit's own: `labels.csv`, split lists, and masks if the devkit has none
as pictures. Files that are there already are kept, so a second run goes on. Lists are written last,
and only if all their sources could be read.
"""

import csv
import io
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from jaxtyping import UInt8
from scipy.io import loadmat
from tqdm import tqdm

from weclip_lib.data.instances import JSON_AGAIN, Instances, load_pycocotools, paint, read_instances
from weclip_lib.data.layouts import SBD_PLACES, VOC_HEADER, VOC_PLACES, find_place
from weclip_lib.labels import COCO_CLASSES, IGNORE_INDEX, VOC_CLASSES
from weclip_lib.storage.files import Unusable, reading, write_text
from weclip_lib.storage.lists import read_names, read_text
from weclip_lib.storage.pictures import picture_size, read_mask, write_mask

COCO_SPLITS = {"train": "train2014", "val": "val2014"}
AGAIN = "remove it and unpack SBD again"
AT_ONCE = 4  # masks that a process gets at a time; few, so that a failure ends all soon


def _says_nothing(path: Path, header: str = "") -> bool:
    """Return whether a list is missing or empty; older versions left tables with only a header."""
    return not path.exists() or read_text(path).strip() in ("", header)


def _write_labels(folder: Path, tags: Mapping[str, Iterable[str]], classes: Sequence[str]) -> None:
    """Write labels.csv, with a picture's classes in the order of their ids."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(VOC_HEADER)
    for name in sorted(tags):
        found = set(tags[name])
        rows.writerow((name, ";".join(c for c in classes if c in found)))
    write_text(folder / "labels.csv", table.getvalue())


def _write_names(path: Path, names: Iterable[str]) -> None:
    """Write a list of names, one a line; keep an old list, unless it is empty."""
    if _says_nothing(path):
        write_text(path, "".join(f"{name}\n" for name in names))


def _names(path: Path, known: Iterable[str]) -> list[str]:
    """Read the names in a devkit's list."""
    if _says_nothing(path):
        state = "is empty: remove it and" if path.exists() else "is missing:"
        raise Unusable(f"{path} {state} unpack the devkit again")
    return read_names(path, set(known))


def _files(folder: Path, ending: str) -> dict[str, Path]:
    """Return the files of a folder by their stem, without the hidden ones that macOS leaves."""
    return {path.stem: path for path in sorted(folder.glob(f"[!.]*{ending}"))}


def _tell_of_hidden(folder: Path, ending: str) -> None:
    hidden = sorted(folder.glob(f".*{ending}"))
    if hidden:
        said = f"{hidden[0]} is hidden and passed over ({len(hidden)} such files)"
        tqdm.write(said, file=sys.stderr)


def objects_of(path: Path) -> list[str]:
    """Read the class names in a picture's annotation in XML, also of objects marked difficult.

    Raises:
        Unusable: If it cannot be read, is no annotation, or names an unknown class.
    """
    with reading(path, "remove it and unpack the devkit again"):
        root = ElementTree.parse(path).getroot()  # expat limits the growth of entities
    if root.tag != "annotation":
        raise Unusable(
            f"{path} is no annotation of VOC: its root is <{root.tag}>, not <annotation>"
        )
    names = [(found.findtext("name") or "").strip() for found in root.iterfind("object")]
    for name in names:
        if name not in VOC_CLASSES:
            raise Unusable(f"{path} names {name[:40]!r}, which is no class of VOC: correct it")
    return names


def classes_in(path: Path) -> list[str]:
    """Read the class names in a picture's mask."""
    ids = np.unique(read_mask(path, 1 + len(VOC_CLASSES)))
    return [VOC_CLASSES[i - 1] for i in ids if i not in (0, IGNORE_INDEX)]


SOURCES: dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...], str]] = {
    "xml": (objects_of, ("Annotations",), ".xml"),
    "masks": (classes_in, ("SegmentationClassAug", "SegmentationClass"), ".png"),
}


def _of_all(read: Callable[[Path], list[str]], files: Mapping[str, Path]) -> dict[str, list[str]]:
    with ThreadPoolExecutor() as pool:
        found = tqdm(pool.map(read, files.values()), total=len(files), desc="labels", unit="file")
        return dict(zip(files, found, strict=True))


def _in_processes(work: Callable, tasks: Sequence[tuple], name: str) -> None:
    """Do the work for every task, in several processes; the first failure ends them all.

    If a process dies, because a file crashes its decoder or memory runs out, the others end, too.
    The rest is then done one by one, so that the message can name the file.

    Raises:
        Unusable: If a task ended its process; the message names the task's first argument.
    """
    context, count = get_context("spawn"), 0
    with tqdm(total=len(tasks), desc=name, unit="mask") as bar:
        try:
            with ProcessPoolExecutor(mp_context=context) as pool:
                for _ in pool.map(work, *zip(*tasks, strict=True), chunksize=AT_ONCE):
                    count += 1
                    bar.update()
        except BrokenProcessPool:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                for task in tasks[count:]:
                    try:
                        pool.submit(work, *task).result()
                    except BrokenProcessPool as error:
                        raise Unusable(
                            f"{task[0]} ended the process that worked on it: it is damaged, or "
                            "needs more memory than there is; replace or remove it"
                        ) from error
                    bar.update()


def prepare_voc(folder: Path, *, labels: str = "xml") -> Path:
    """Write the image-level labels of VOC 2012 to labels.csv, and `train_aug` if its masks exist.

    Args:
        folder: The devkit, or where it was unpacked.
        labels: The source of the labels: `xml` (objects of the annotations) or `masks` (only some
            pictures have one). An old labels.csv is kept.

    Raises:
        ValueError: If the devkit is missing or damaged, lacks the labels of a picture in its
            lists, or names a class that VOC does not have. No list is written then.
    """
    if labels not in SOURCES:
        raise ValueError(f"labels is {labels!r}: choose one of {', '.join(SOURCES)}")
    folder = find_place(folder, VOC_PLACES, "JPEGImages")
    lists = folder / "ImageSets" / "Segmentation"
    read, places, ending = SOURCES[labels]
    sources: dict[str, Path] = {}
    for place in places:
        _tell_of_hidden(folder / place, ending)
        sources |= _files(folder / place, ending)
    known = {*_files(folder / "JPEGImages", ".*"), *sources}
    splits = {split: _names(lists / f"{split}.txt", known) for split in ("train", "val")}
    for split in ("trainval", "train_aug"):
        if not _says_nothing(lists / f"{split}.txt"):
            splits[split] = read_names(lists / f"{split}.txt", known)
    if _says_nothing(folder / "labels.csv", ",".join(VOC_HEADER)):
        bare = [n for n in dict.fromkeys(chain(*splits.values())) if n not in sources]
        if bare:
            other = next(name for name in SOURCES if name != labels)
            raise Unusable(
                f"{folder / places[-1]} has no {bare[0]}{ending} ({len(bare)} such pictures in the "
                f"lists of splits): unpack the devkit again, or try --labels {other}"
            )
        _write_labels(folder, _of_all(read, sources), VOC_CLASSES)
    augmented = _files(folder / "SegmentationClassAug", ".png")
    if augmented.keys() >= set(splits["train"]):  # a folder with SBD's and VOC's masks
        _write_names(lists / "train_aug.txt", sorted(augmented.keys() - set(splits["val"])))
    return folder


def _sbd_mask(path: Path) -> UInt8[np.ndarray, "height width"]:
    """Read the class ids of an SBD file, which may have any numeric type.

    Raises:
        Unusable: If the file cannot be read, is not SBD's, or holds an id of no class.
    """
    with reading(path, AGAIN):
        content = loadmat(path, simplify_cells=True)
    about = content.get("GTcls")
    mask = about.get("Segmentation") if isinstance(about, dict) else None
    numbers = isinstance(mask, np.ndarray) and mask.dtype.kind in "iuf"
    if not numbers or mask.ndim != 2 or not mask.size:
        raise Unusable(f"{path} holds no map of numbers GTcls.Segmentation: {AGAIN}")
    known = np.isin(mask, (*range(1 + len(VOC_CLASSES)), IGNORE_INDEX))
    if not known.all():
        raise Unusable(
            f"{path} holds class id {mask[~known][0]}: ids are 0 to {len(VOC_CLASSES)} "
            f"and {IGNORE_INDEX} for void; {AGAIN}"
        )
    return np.ascontiguousarray(mask, np.uint8)


def _from_sbd(source: Path, picture: Path, target: Path) -> None:
    mask = _sbd_mask(source)
    if picture.exists() and picture_size(picture) != mask.shape:
        (height, width), (high, wide) = mask.shape, picture_size(picture)
        raise Unusable(
            f"{source} is {width}x{height} pixels, its picture {picture} is {wide}x{high}: "
            "remove both and unpack both again"
        )
    write_mask(target, mask)


def prepare_sbd(folder: Path, voc: Path) -> Path:
    """Write SBD's masks as pictures beside VOC's, and the list `train_aug` of 10,582 pictures.

    The list has SBD's train and val, and VOC's train, without VOC's val. If VOC has its own mask
    of a picture, that one is used.

    Args:
        folder: SBD, or where it was unpacked.
        voc: VOC's devkit, or where it was unpacked.

    Raises:
        ValueError: If one of them is missing or damaged. The list is not written then.
    """
    folder, voc = find_place(folder, SBD_PLACES, "cls"), find_place(voc, VOC_PLACES, "JPEGImages")
    lists, target = voc / "ImageSets" / "Segmentation", voc / "SegmentationClassAug"
    _tell_of_hidden(folder / "cls", ".mat")
    pictures, masks = voc / "JPEGImages", _files(folder / "cls", ".mat")
    known = {*_files(pictures, ".*"), *masks}
    train, val = (_names(lists / f"{split}.txt", known) for split in ("train", "val"))
    names = {n for split in ("train", "val") for n in _names(folder / f"{split}.txt", known)}
    names -= set(val)
    there = {*_files(voc / "SegmentationClass", ".png"), *_files(target, ".png")}
    wanted = sorted(names - there)
    absent = [name for name in wanted if name not in masks]
    if absent:
        raise Unusable(
            f"{folder / 'cls' / absent[0]}.mat is not there ({len(absent)} such masks in SBD's "
            "lists): unpack SBD again"
        )
    tasks = [(masks[n], pictures / f"{n}.jpg", target / f"{n}.png") for n in wanted]
    _in_processes(_from_sbd, tasks, "masks")
    _write_names(lists / "train_aug.txt", sorted({*names, *train} - set(val)))
    return voc


def _paint_to(path: Path, shape: tuple[int, int], annotations: list, ids: dict[int, int]) -> None:
    write_mask(path, paint(shape, annotations, ids))


def prepare_coco(folder: Path) -> Path:
    """Write image-level labels, split lists and masks of COCO-2014 from its instances in JSON.

    Pictures stay in train2014/ and val2014/. Training on labels needs none of the masks, but they
    are always written (about an hour on two cores; a second run goes on). Old lists are kept.

    Raises:
        ValueError: If an annotation file is missing, damaged or not COCO's, or pycocotools cannot
            be imported. Nothing is written then.
    """
    load_pycocotools()
    found: dict[str, Instances] = {}
    for split, place in COCO_SPLITS.items():
        path = folder / "annotations" / f"instances_{place}.json"
        if not path.exists():
            raise ValueError(f"{path} is missing: unpack annotations_trainval2014.zip in {folder}")
        found[split] = read_instances(path, place)
    for split, about in found.items():
        if not about.annotations:
            path = folder / "annotations" / f"instances_{COCO_SPLITS[split]}.json"
            raise Unusable(f"{path} has no annotations: {JSON_AGAIN}")
    masks, lists = folder / "SegmentationClass", folder / "ImageSets" / "Segmentation"
    tasks = [
        (masks / f"{name}.png", about.shapes[number], about.annotations[number], about.ids)
        for about in found.values()
        for number, name in about.names.items()
        if not (masks / f"{name}.png").exists()
    ]
    _in_processes(_paint_to, tasks, "masks")
    for split, about in found.items():
        _write_names(lists / f"{split}.txt", about.names.values())
    if _says_nothing(folder / "labels.csv", ",".join(VOC_HEADER)):
        tags = {
            name: about.tags(number)
            for about in found.values()
            for number, name in about.names.items()
        }
        _write_labels(folder, tags, COCO_CLASSES)
    return folder
