"""Make the devkits of VOC 2012, SBD and COCO-2014 readable by `layouts`, without copying pictures.

What is written lies beside the devkit's own files: `labels.csv`, split lists, and masks where the
devkit has none as pictures. Whatever is there already is kept, so that a second run goes on.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from jaxtyping import UInt8
from scipy.io import loadmat
from tqdm import tqdm

from weclip_lib.files import write_text
from weclip_lib.labels import COCO_CLASSES, IGNORE_INDEX, VOC_CLASSES
from weclip_lib.layouts import SBD_PLACES, VOC_PLACES, find_place
from weclip_lib.pictures import read_mask, write_mask

COCO_SPLITS = {"train": "train2014", "val": "val2014"}


def _write_labels(folder: Path, tags: Mapping[str, Iterable[str]], classes: Sequence[str]) -> None:
    """labels.csv: a picture's classes in the order of their ids."""
    lines = ["name,labels\n"]
    for name in sorted(tags):
        found = set(tags[name])
        lines.append(f"{name},{';'.join(c for c in classes if c in found)}\n")
    write_text(folder / "labels.csv", "".join(lines))


def _names(path: Path) -> list[str]:
    if not path.exists():
        raise ValueError(f"{path} is missing: it comes with the devkit")
    return path.read_text().split()


def objects_of(path: Path) -> list[str]:
    """Class names in a picture's annotation in XML; objects marked difficult are counted, too."""
    names = [found.text or "" for found in ElementTree.parse(path).iterfind("object/name")]
    unknown = sorted(set(names) - set(VOC_CLASSES))
    if unknown:
        raise ValueError(f"{path} names {unknown[0]!r}, which is no class of VOC")
    return names


def classes_in(path: Path) -> list[str]:
    """Class names in a picture's mask."""
    ids = np.unique(read_mask(path, 1 + len(VOC_CLASSES)))
    return [VOC_CLASSES[i - 1] for i in ids if i not in (0, IGNORE_INDEX)]


def _of_all(
    read: Callable[[Path], list[str]], paths: Sequence[Path], name: str
) -> dict[str, list[str]]:
    with ThreadPoolExecutor() as pool:
        found = tqdm(pool.map(read, paths), total=len(paths), desc=name, unit="file")
        return dict(zip((path.stem for path in paths), found, strict=True))


def prepare_voc(folder: Path, *, labels: str = "xml") -> Path:
    """Image-level labels of VOC 2012, written once to labels.csv.

    Args:
        folder: The devkit, or where it was unpacked.
        labels: What they are read from: `xml` (objects of the annotations) or `masks` (which
            exist for a part of the pictures). A labels.csv that is there is kept.

    Raises:
        ValueError: If the devkit is not there, or names a class that VOC does not have.
    """
    folder = find_place(folder, VOC_PLACES, "JPEGImages")
    if not (folder / "labels.csv").exists():
        if labels == "xml":
            tags = _of_all(objects_of, sorted((folder / "Annotations").glob("*.xml")), "labels")
        else:
            masks = {p.stem: p for place in ("SegmentationClassAug", "SegmentationClass")
                     for p in sorted((folder / place).glob("*.png"))}  # fmt: skip
            tags = _of_all(classes_in, list(masks.values()), "labels")
        _write_labels(folder, tags, VOC_CLASSES)
    lists = folder / "ImageSets" / "Segmentation"
    augmented = {path.stem for path in (folder / "SegmentationClassAug").glob("*.png")}
    if augmented.issuperset(_names(lists / "train.txt")):  # SBD's and VOC's, as they are passed on
        _write_train_aug(lists, augmented)
    return folder


def _write_train_aug(lists: Path, names: Iterable[str]) -> None:
    """The list of training pictures with SBD's: VOC's val is taken out. One that is there stays."""
    if not (lists / "train_aug.txt").exists():
        kept = {*names, *_names(lists / "train.txt")} - set(_names(lists / "val.txt"))
        write_text(lists / "train_aug.txt", "".join(f"{name}\n" for name in sorted(kept)))


def _from_sbd(source: Path, target: Path) -> None:
    mask = loadmat(source, simplify_cells=True)["GTcls"]["Segmentation"]
    write_mask(target, np.ascontiguousarray(mask, np.uint8))


def prepare_sbd(folder: Path, voc: Path) -> Path:
    """SBD's masks as pictures beside VOC's, and the list `train_aug` of 10,582 pictures.

    That is SBD's train and val, and VOC's train, without VOC's val. Where VOC has a mask of its
    own, that one is used.

    Args:
        folder: SBD, or where it was unpacked.
        voc: VOC's devkit, or where it was unpacked.

    Raises:
        ValueError: If one of them is not there.
    """
    folder, voc = find_place(folder, SBD_PLACES, "cls"), find_place(voc, VOC_PLACES, "JPEGImages")
    names = {name for split in ("train", "val") for name in _names(folder / f"{split}.txt")}
    val = set(_names(voc / "ImageSets" / "Segmentation" / "val.txt"))
    target = voc / "SegmentationClassAug"
    wanted = [n for n in sorted(names - val)
              if not (voc / "SegmentationClass" / f"{n}.png").exists()
              and not (target / f"{n}.png").exists()]  # fmt: skip
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        sources = [folder / "cls" / f"{name}.mat" for name in wanted]
        targets = [target / f"{name}.png" for name in wanted]
        done = pool.map(_from_sbd, sources, targets, chunksize=32)
        for _ in tqdm(done, total=len(wanted), desc="masks", unit="mask"):
            pass
    _write_train_aug(voc / "ImageSets" / "Segmentation", names)
    return voc


def paint(
    shape: tuple[int, int], annotations: Sequence[dict], ids: Mapping[int, int]
) -> UInt8[np.ndarray, "height width"]:
    """One map of class ids from COCO's annotations; the smaller object lies in front.

    Args:
        annotations: Of one picture: `segmentation`, `area`, `category_id`; crowds included.
        ids: Class ids by category.
    """
    from pycocotools import mask as coder

    found = np.zeros(shape, np.uint8)
    for about in sorted(annotations, key=lambda about: -about["area"]):
        outline = about["segmentation"]
        if isinstance(outline, list):
            code = coder.merge(coder.frPyObjects(outline, *shape))
        elif isinstance(outline["counts"], list):
            code = coder.frPyObjects(outline, *shape)
        else:
            code = outline
        found[coder.decode(code) == 1] = ids[about["category_id"]]
    return found


def _paint_to(path: Path, shape: tuple[int, int], annotations: list, ids: dict[int, int]) -> None:
    write_mask(path, paint(shape, annotations, ids))


def prepare_coco(folder: Path) -> Path:
    """Image-level labels, split lists and masks of COCO-2014 from its instances in JSON.

    Pictures stay where they are, in train2014/ and val2014/. Training on labels needs none of
    the masks; they are written all the same (about an hour on two cores, resumable).

    Raises:
        ValueError: If an annotation file is not there or not COCO's.
        ModuleNotFoundError: If pycocotools is not installed.
    """
    tags: dict[str, list[str]] = {}
    for split, place in COCO_SPLITS.items():
        path = folder / "annotations" / f"instances_{place}.json"
        if not path.exists():
            raise ValueError(f"{path} is missing: unpack annotations_trainval2014.zip in {folder}")
        content = json.loads(path.read_text())
        if [found["name"] for found in content["categories"]] != list(COCO_CLASSES):
            raise ValueError(f"{path} has other categories than COCO's 80")
        ids = {found["id"]: i + 1 for i, found in enumerate(content["categories"])}
        of_image = defaultdict(list)
        for about in content["annotations"]:
            of_image[about["image_id"]].append(
                {key: about[key] for key in ("segmentation", "area", "category_id")}
            )
        names = {
            found["id"]: f"{place}/{found['file_name'].removesuffix('.jpg')}"
            for found in content["images"]
        }
        for number, name in names.items():
            tags[name] = [COCO_CLASSES[ids[a["category_id"]] - 1] for a in of_image[number]]
        listing = "".join(f"{name}\n" for name in names.values())
        write_text(folder / "ImageSets" / "Segmentation" / f"{split}.txt", listing)
        masks = {n: folder / "SegmentationClass" / f"{name}.png" for n, name in names.items()}
        left = [found for found in content["images"] if not masks[found["id"]].exists()]
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            done = pool.map(
                _paint_to,
                [masks[found["id"]] for found in left],
                [(found["height"], found["width"]) for found in left],
                [of_image[found["id"]] for found in left],
                repeat(ids),
                chunksize=64,
            )
            for _ in tqdm(done, total=len(left), desc=f"masks of {split}", unit="mask"):
                pass
    _write_labels(folder, tags, COCO_CLASSES)
    return folder
