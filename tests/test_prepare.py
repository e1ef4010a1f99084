"""Devkits of VOC, SBD and COCO in miniature, made readable; the doctor who finds all at once."""

import json
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from weclip_lib import doctor, download, prepare
from weclip_lib.datasets import LabelledImages, MaskedImages
from weclip_lib.labels import COCO, COCO_CLASSES, VOC
from weclip_lib.pictures import write_mask

NAMES = ("2007_000001", "2007_000002", "2007_000003", "2008_000004", "2008_000005")


@pytest.fixture
def devkit(tmp_path):
    """VOC: 1 and 2 in train, 3 in val, all with masks; 4 and 5 are pictures with XML alone."""
    folder = tmp_path / "data" / "VOCdevkit" / "VOC2012"
    for place in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / place).mkdir(parents=True)
    for number, name in enumerate(NAMES):
        Image.new("RGB", (14, 10), (number * 40, 9, 9)).save(folder / f"JPEGImages/{name}.jpg")
        objects = "".join(f"<object><name>{n}</name></object>" for n in ("dog", "cat", "dog"))
        (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    for name in NAMES[:3]:
        write_mask(folder / f"SegmentationClass/{name}.png", np.full((10, 14), 3, np.uint8))
    for split, names in (("train", NAMES[:2]), ("val", NAMES[2:3])):
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture
def sbd(tmp_path):
    folder = tmp_path / "sbd" / "benchmark_RELEASE" / "dataset"
    (folder / "cls").mkdir(parents=True)
    for name in (NAMES[0], *NAMES[2:]):
        mask = np.full((10, 14), 7, np.uint8)
        savemat(folder / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": mask}})
    (folder / "train.txt").write_text("\n".join((NAMES[0], NAMES[3])))
    (folder / "val.txt").write_text("\n".join((NAMES[2], NAMES[4])))
    return folder


def test_voc_from_annotations(devkit) -> None:
    assert prepare.prepare_voc(devkit.parents[1]) == devkit
    assert (devkit / "labels.csv").read_text().splitlines()[:2] == [
        "name,labels",
        "2007_000001,cat;dog",
    ]
    train = MaskedImages(devkit, "train", VOC)
    assert train.names == list(NAMES[:2]) and (train.mask(0) == 3).all()
    assert train.image_labels.sum() == 4


def test_voc_from_masks_and_a_table_that_is_there(devkit) -> None:
    prepare.prepare_voc(devkit, labels="masks")
    assert (devkit / "labels.csv").read_text().count("bird") == 3  # class 3
    (devkit / "labels.csv").write_text("name,labels\nmine,cat\n")
    prepare.prepare_voc(devkit)
    assert "mine" in (devkit / "labels.csv").read_text()


def test_sbd_gives_train_aug(devkit, sbd) -> None:
    prepare.prepare_voc(devkit)
    prepare.prepare_sbd(sbd.parents[1], devkit)
    train = MaskedImages(devkit, "train_aug", VOC)
    assert train.names == [NAMES[0], NAMES[1], NAMES[3], NAMES[4]]  # without val
    assert [int(train.mask(row)[0, 0]) for row in range(4)] == [3, 3, 7, 7]  # VOC's own first
    stamp = (devkit / f"SegmentationClassAug/{NAMES[3]}.png").stat().st_mtime_ns
    prepare.prepare_sbd(sbd, devkit)
    assert (devkit / f"SegmentationClassAug/{NAMES[3]}.png").stat().st_mtime_ns == stamp


def test_masks_that_are_passed_on_give_train_aug(devkit) -> None:
    for name in NAMES:
        write_mask(devkit / f"SegmentationClassAug/{name}.png", np.full((10, 14), 9, np.uint8))
    prepare.prepare_voc(devkit)
    train = MaskedImages(devkit, "train_aug", VOC)
    assert train.names == [n for n in NAMES if n != NAMES[2]] and train.mask(3)[0, 0] == 9


def test_a_devkit_that_is_not_there(tmp_path) -> None:
    with pytest.raises(ValueError, match="has no JPEGImages, nor has one of VOCdevkit/VOC2012"):
        prepare.prepare_voc(tmp_path)
    with pytest.raises(ValueError, match=r"instances_train2014\.json is missing: unpack"):
        prepare.prepare_coco(tmp_path)


def square(left: int, top: int, side: int) -> list:
    right, low = left + side, top + side
    return [[left, top, right, top, right, low, left, low]]


@pytest.fixture
def coco(tmp_path):
    folder = tmp_path / "coco"
    numbers = (1, 2, 90)  # categories of COCO have gaps
    categories = [
        {"id": numbers[i] if i < 2 else 10 + i, "name": name} for i, name in enumerate(COCO_CLASSES)
    ]
    (folder / "annotations").mkdir(parents=True)
    for place in ("train2014", "val2014"):
        (folder / place).mkdir()
        Image.new("RGB", (20, 16)).save(folder / place / f"COCO_{place}_1.jpg")
        crowd = {"size": [16, 20], "counts": [0, 16, 304]}  # the first column
        annotations = [
            {"image_id": 1, "category_id": 1, "area": 16, "segmentation": square(4, 4, 4)},
            {"image_id": 1, "category_id": 2, "area": 100, "segmentation": square(2, 2, 10)},
            {"image_id": 1, "category_id": 12, "area": 16, "segmentation": crowd, "iscrowd": 1},
        ]
        images = [{"id": 1, "file_name": f"COCO_{place}_1.jpg", "height": 16, "width": 20}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{place}.json").write_text(json.dumps(content))
    return folder


def test_coco(coco) -> None:
    prepare.prepare_coco(coco)
    val = MaskedImages(coco, "val", COCO)
    assert val.names == ["val2014/COCO_val2014_1"] and val.image(0).shape == (16, 20, 3)
    assert val.image_labels[0].nonzero()[:, 0].tolist() == [0, 1, 2]
    mask = val.mask(0)
    assert (mask[:, 0] == 3).all() and mask[3, 3] == 2 and mask[15, 19] == 0
    assert (mask[5:7, 5:7] == 1).all()  # the smaller one lies in front
    path = coco / "annotations" / "instances_val2014.json"
    path.write_text(path.read_text().replace('"zebra"', '"okapi"'))
    with pytest.raises(ValueError, match="other categories than COCO's 80"):
        prepare.prepare_coco(coco)


def test_the_doctor_finds_everything_at_once(devkit, sbd, monkeypatch) -> None:
    prepare.prepare_voc(devkit)
    prepare.prepare_sbd(sbd, devkit)
    counts = {"train": 2, "val": 1, "train_aug": 4}
    monkeypatch.setitem(doctor.EXPECTED, "VOC 2012", counts)
    report = doctor.examine(devkit, VOC)
    assert report.problems == [] and "No problem(s) found" in report.text()
    assert report.splits[0] == "train: 2 pictures, 2 masks, 2 of 20 classes"

    pictures, masks = devkit / "JPEGImages", devkit / "SegmentationClass"
    content = (pictures / f"{NAMES[0]}.jpg").read_bytes()
    (pictures / f"{NAMES[0]}.jpg").write_bytes(content[:200])
    Image.new("CMYK", (14, 10)).save(pictures / f"{NAMES[4]}.jpg")
    (pictures / f"{NAMES[3]}.jpg").unlink()
    write_mask(masks / f"{NAMES[1]}.png", np.zeros((10, 13), np.uint8))
    write_mask(masks / f"{NAMES[2]}.png", np.full((10, 14), 99, np.uint8))
    with (devkit / "labels.csv").open("a") as file:
        file.write(f"{NAMES[0]},zebra\n")
    (devkit / "ImageSets/Segmentation/val.txt").write_text("\n".join((NAMES[2], "2011_9")))
    found = "\n".join(doctor.examine(devkit, VOC).problems)
    for text in (
        f"{NAMES[0]}.jpg cannot be read",
        f"{NAMES[4]}.jpg is a picture of mode CMYK",
        f"names '{NAMES[3]}.jpg'",
        f"{NAMES[1]}.png is 13x10 pixels, its picture 14x10",
        f"{NAMES[2]}.png holds class id 99",
        "class 'zebra' does not exist",
        f"'{NAMES[0]}' comes a second time",
        "has no row for '2011_9'",
        "train_aug has 3 pictures; everybody's has 4",
    ):
        assert text in found
    assert found.count("zebra") == 1  # said once, though three splits read the table


def test_the_doctor_says_what_is_missing(tmp_path, devkit, capsys, monkeypatch) -> None:
    assert "make data DATASET=voc" in doctor.examine(tmp_path / "none", VOC).problems[0]
    prepare.prepare_voc(devkit)
    monkeypatch.setattr("sys.argv", ["doctor", str(devkit.parents[1])])
    with pytest.raises(SystemExit):
        doctor.main()
    out = capsys.readouterr().out
    assert "has no list of trainval, train_aug: VOC: `make data" in out
    assert "train has 2 pictures; everybody's has 1464" in out


def test_from_archives_that_are_there(devkit, sbd, coco, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(doctor.EXPECTED, "VOC 2012", {"train": 2, "val": 1, "train_aug": 4})
    monkeypatch.setitem(doctor.EXPECTED, "COCO 2014", {"train": 1, "val": 1})
    with tarfile.open(tmp_path / "VOCtrainval_11-May-2012.tar", "w") as file:
        file.add(devkit.parent, "VOCdevkit")
    with tarfile.open(tmp_path / "benchmark.tgz", "w:gz") as file:
        file.add(sbd.parent, "benchmark_RELEASE")
    with zipfile.ZipFile(tmp_path / "coco.zip", "w") as file:
        for path in sorted(coco.rglob("*.*")):
            file.write(path, path.relative_to(coco))
    to = ["--to", str(tmp_path / "to" / "voc"), "--archive"]
    with pytest.raises(SystemExit):  # train_aug is missing yet
        download.main(["voc", *to, str(tmp_path / "VOCtrainval_11-May-2012.tar")])
    download.main(["sbd", *to, str(tmp_path / "benchmark.tgz")])
    assert "train_aug: 4 pictures, 4 masks" in capsys.readouterr().out
    place = tmp_path / "to" / "coco"
    download.main(["coco", "--to", str(place), "--archive", str(tmp_path / "coco.zip")])
    assert "No problem(s) found" in capsys.readouterr().out
    assert LabelledImages(place, "train", COCO).names == ["train2014/COCO_train2014_1"]
    with pytest.raises(SystemExit, match="is not there: give an archive or a folder"):
        download.main(["voc", *to, str(tmp_path / "none.tar")])
