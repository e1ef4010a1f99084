"""Devkits of VOC, SBD and COCO in miniature, made readable or refused by name."""

import json
import shutil
import tarfile
import tomllib
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from weclip_lib.__main__ import main as weclip
from weclip_lib.data import doctor, prepare
from weclip_lib.data.datasets import LabelledImages, MaskedImages
from weclip_lib.data.instances import load_pycocotools
from weclip_lib.labels import COCO, COCO_CLASSES, VOC
from weclip_lib.storage.files import Unusable
from weclip_lib.storage.pictures import write_mask
from weclip_lib.storage.provenance import ROOT

NAMES = ("2007_000001", "2007_000002", "2007_000003", "2008_000004", "2008_000005")
CAT, DOG = 8, 12
VOC_MASK = np.repeat(np.uint8([CAT, DOG]), 7)[None].repeat(10, 0)  # the cat on the left
SBD_MASK = np.ascontiguousarray(VOC_MASK[:, ::-1])  # the dog on the left


def xml_of(*classes: str) -> str:
    objects = "".join(f"<object><name>{name}</name></object>" for name in classes)
    return f"<annotation>{objects}</annotation>"


@pytest.fixture
def one_process(monkeypatch):
    """Processes take a second to start."""

    def work(do, tasks, name) -> None:
        for task in tasks:
            do(*task)

    monkeypatch.setattr(prepare, "_in_processes", work)


@pytest.fixture
def devkit(tmp_path):
    """VOC: 1 and 2 in train, 3 in val, all with masks; 4 and 5 are pictures with XML alone."""
    folder = tmp_path / "data" / "VOCdevkit" / "VOC2012"
    for place in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / place).mkdir(parents=True)
    for number, name in enumerate(NAMES):
        Image.new("RGB", (14, 10), (number * 40, 9, 9)).save(folder / f"JPEGImages/{name}.jpg")
        (folder / f"Annotations/{name}.xml").write_text(xml_of("dog", "cat", "dog"))
    for name in NAMES[:3]:
        write_mask(folder / f"SegmentationClass/{name}.png", VOC_MASK)
    for split, names in (("train", NAMES[:2]), ("val", NAMES[2:3])):
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture
def sbd(tmp_path):
    folder = tmp_path / "sbd" / "benchmark_RELEASE" / "dataset"
    (folder / "cls").mkdir(parents=True)
    for name in (NAMES[0], *NAMES[2:]):
        savemat(folder / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": SBD_MASK}})
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
    assert train.names == list(NAMES[:2]) and (train.mask(0) == VOC_MASK).all()
    assert train.image_labels.sum() == 4


def test_voc_from_masks_and_a_table_that_is_there(devkit) -> None:
    prepare.prepare_voc(devkit, labels="masks")
    assert (devkit / "labels.csv").read_text().count("cat;dog") == 3
    (devkit / "labels.csv").write_text("name,labels\nmine,cat\n")
    prepare.prepare_voc(devkit)
    assert "mine" in (devkit / "labels.csv").read_text()


def test_sbd_gives_train_aug(devkit, sbd, one_process) -> None:
    prepare.prepare_voc(devkit)
    prepare.prepare_sbd(sbd.parents[1], devkit)
    train = MaskedImages(devkit, "train_aug", VOC)
    assert train.names == [NAMES[0], NAMES[1], NAMES[3], NAMES[4]]  # without val
    assert [int(train.mask(row)[0, 0]) for row in range(4)] == [CAT, CAT, DOG, DOG]
    stamp = (devkit / f"SegmentationClassAug/{NAMES[3]}.png").stat().st_mtime_ns
    prepare.prepare_sbd(sbd, devkit)
    assert (devkit / f"SegmentationClassAug/{NAMES[3]}.png").stat().st_mtime_ns == stamp


def test_masks_that_are_passed_on_give_train_aug(devkit) -> None:
    for name in NAMES:
        write_mask(devkit / f"SegmentationClassAug/{name}.png", SBD_MASK)
    prepare.prepare_voc(devkit)
    train = MaskedImages(devkit, "train_aug", VOC)
    assert train.names == [n for n in NAMES if n != NAMES[2]] and train.mask(3)[0, 0] == DOG


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


def test_names_come_as_lists_have_them(devkit, sbd, one_process) -> None:
    lists = devkit / "ImageSets" / "Segmentation"
    content = "".join(f"/JPEGImages/{n}.jpg /SegmentationClass/{n}.png \r\n" for n in NAMES[:2])
    (lists / "train.txt").write_bytes(b"\xef\xbb\xbf" + content.encode())
    (sbd / "train.txt").write_text(f"{NAMES[0]}  \r\n\r\n{NAMES[3]}\t\n")
    (lists / "train_aug.txt").write_text("\n")  # empty: made; one that says something stays
    prepare.prepare_voc(devkit)
    prepare.prepare_sbd(sbd, devkit)
    kept = [NAMES[0], NAMES[1], NAMES[3], NAMES[4]]
    assert (lists / "train_aug.txt").read_text().split() == kept
    (lists / "train_aug.txt").write_text(NAMES[1])
    prepare.prepare_sbd(sbd, devkit)
    assert (lists / "train_aug.txt").read_text() == NAMES[1]


def test_hidden_files_are_passed_over_and_told(devkit, capsys) -> None:
    for name in (f"Annotations/._{NAMES[1]}.xml", "Annotations/.DS_Store", "JPEGImages/._x.jpg"):
        (devkit / name).write_bytes(b"\0\5\26\7")
    (devkit / f"SegmentationClass/._{NAMES[0]}.png").write_bytes(b"\0\5\26\7")
    prepare.prepare_voc(devkit)
    table = (devkit / "labels.csv").read_text()
    assert table == "name,labels\n" + "".join(f"{name},cat;dog\n" for name in NAMES)
    assert f"._{NAMES[1]}.xml is hidden and passed over (1 such files)" in capsys.readouterr().err
    (devkit / "labels.csv").unlink()
    prepare.prepare_voc(devkit, labels="masks")
    assert (devkit / "labels.csv").read_text().count("\n") == 4


def bomb(size: int) -> str:
    """Entities that grow tenfold a step."""
    steps = "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(size))
    return f'<!DOCTYPE a [<!ENTITY e0 "{"dog" * 10}">{steps}]><annotation>&e{size};</annotation>'


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", r"cannot be read \(no element found"),
        (xml_of("dog", "cat").encode()[:40], "cannot be read"),
        (b"\0\5\26\7", "cannot be read"),
        (
            b'<?xml version="1.0" encoding="shift_jis"?><annotation/>',
            "multi-byte encodings are not",
        ),
        (
            b'<?xml version="1.0" encoding="none"?><annotation/>',
            "cannot be read .*unknown encoding",
        ),
        ("<annotation>é</annotation>".encode("latin-1"), "not well-formed"),
        (bomb(9).encode(), "limit on input amplification"),
        (b"<html><object><name>dog</name></object></html>", "its root is <html>, not <annotation>"),
        (xml_of("dog", "Cat").encode(), "names 'Cat', which is no class of VOC"),
        (b"<annotation><object><pose/></object></annotation>", "names '', which is no class"),
        (
            b'<!DOCTYPE a [<!ENTITY e SYSTEM "/etc/passwd">]><annotation>&e;</annotation>',
            "undefined",
        ),
    ],
)
def test_a_damaged_annotation_is_named_and_nothing_written(devkit, content, problem) -> None:
    (devkit / f"Annotations/{NAMES[3]}.xml").write_bytes(content)
    with pytest.raises(Unusable, match=rf"{NAMES[3]}\.xml .*{problem}"):
        prepare.prepare_voc(devkit)
    assert not (devkit / "labels.csv").exists()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "iso-8859-1"])
def test_annotations_in_other_encodings_and_without_objects(devkit, encoding) -> None:
    said = "" if encoding == "utf-8-sig" else f'<?xml version="1.0" encoding="{encoding}"?>'
    content = f"{said}<annotation><owner>é</owner>{xml_of('sofa')[12:]}"
    (devkit / f"Annotations/{NAMES[3]}.xml").write_bytes(content.encode(encoding))
    (devkit / f"Annotations/{NAMES[4]}.xml").write_text("<annotation/>")
    prepare.prepare_voc(devkit)
    lines = (devkit / "labels.csv").read_text().splitlines()
    assert lines[4:] == [f"{NAMES[3]},sofa", f"{NAMES[4]},"]


def test_no_partial_table_is_left(devkit) -> None:
    kept = devkit.parent / "kept"
    shutil.move(devkit / "Annotations", kept)
    for _ in range(2):
        with pytest.raises(Unusable, match=rf"no {NAMES[0]}\.xml \(3 such .* try --labels masks"):
            prepare.prepare_voc(devkit)
    assert not (devkit / "labels.csv").exists()
    prepare.prepare_voc(devkit, labels="masks")  # the remedy
    (devkit / "labels.csv").write_text("\ufeffname,labels\r\n")  # as older versions left it
    (devkit / f"SegmentationClass/{NAMES[1]}.png").unlink()
    with pytest.raises(Unusable, match=rf"no {NAMES[1]}\.png \(1 such .* try --labels xml"):
        prepare.prepare_voc(devkit, labels="masks")
    shutil.move(kept, devkit / "Annotations")
    prepare.prepare_voc(devkit)  # the remedy; it takes the place of a table without rows
    assert (devkit / "labels.csv").read_text().count("cat;dog") == 5
    with pytest.raises(ValueError, match="labels is 'mask': choose one of xml, masks"):
        prepare.prepare_voc(devkit, labels="mask")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, r"train\.txt is missing: unpack"),
        (b" \r\n", r"train\.txt is empty: remove it and unpack"),
        (f"{NAMES[0]}\n2011_9\n".encode(), r"train\.txt, line 2: '2011_9' is not among"),
        (NAMES[0].encode("utf-16"), r"train\.txt is not in UTF-8"),
    ],
)
def test_a_damaged_list_is_named_and_nothing_written(devkit, content, problem) -> None:
    path = devkit / "ImageSets/Segmentation/train.txt"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(Unusable, match=problem):
        prepare.prepare_voc(devkit)
    assert not (devkit / "labels.csv").exists()


def mat_of(mask: object, **more) -> dict:
    return {"GTcls": {"Segmentation": mask, **more}}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is not there"),
        (b"", "cannot be read .*: remove it and unpack SBD again"),
        (b"MATLAB 5.0" + bytes(300), "cannot be read"),
        ({"other": SBD_MASK}, "holds no map of numbers"),
        ({"GTcls": SBD_MASK}, "holds no map of numbers"),
        (mat_of("dog"), "holds no map of numbers"),
        (mat_of(np.zeros((10, 14, 3), np.uint8)), "holds no map of numbers"),
        (mat_of(np.zeros((10, 14), np.complex64)), "holds no map of numbers"),
        (mat_of(np.zeros((0, 14), np.uint8)), "holds no map of numbers"),
        (mat_of(SBD_MASK.T), "is 10x14 pixels, its picture .* is 14x10"),
        (mat_of(np.full((10, 14), 21, np.uint8)), "holds class id 21"),
        (mat_of(np.full((10, 14), -1, np.int16)), "holds class id -1"),
        (mat_of(np.full((10, 14), 7.5)), r"holds class id 7\.5"),
        (mat_of(np.full((10, 14), np.nan)), "holds class id nan"),
        (mat_of(np.full((10, 14), 263, np.uint16)), "holds class id 263"),
    ],
)
def test_a_damaged_mat_is_named_and_nothing_written(sbd, tmp_path, content, problem) -> None:
    path = sbd / "cls" / f"{NAMES[3]}.mat"
    picture, target = tmp_path / "picture.jpg", tmp_path / "mask.png"
    Image.new("RGB", (14, 10)).save(picture)
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        savemat(path, content)
    with pytest.raises(Unusable, match=rf"{NAMES[3]}\.mat .*{problem}"):
        prepare._from_sbd(path, picture, target)
    assert not target.exists()


@pytest.mark.parametrize("kind", [np.float64, np.uint16, np.int64])
def test_ids_of_sbd_may_be_numbers_of_any_kind(tmp_path, kind) -> None:
    mask = SBD_MASK.astype(kind)
    mask[0, 0] = 255
    savemat(tmp_path / "a.mat", mat_of(mask))
    assert (prepare._sbd_mask(tmp_path / "a.mat") == mask).all()


@pytest.mark.parametrize("damage", [slice(150, None), slice(150, 170), slice(200, 201)])
def test_a_cut_or_compressed_mat_with_other_bytes(tmp_path, damage) -> None:
    path = tmp_path / "a.mat"
    savemat(path, mat_of(SBD_MASK), do_compression=True)
    content = bytearray(path.read_bytes())
    content[damage] = b"" if damage.stop is None else bytes(damage.stop - damage.start)
    path.write_bytes(content)
    with pytest.raises(Unusable, match=r"a\.mat cannot be read .*: remove it and unpack SBD again"):
        prepare._sbd_mask(path)


def test_a_damaged_mat_ends_all_processes_and_leaves_no_list(devkit, sbd) -> None:
    (sbd / "cls" / f"{NAMES[3]}.mat").write_bytes(b"")
    with pytest.raises(Unusable, match=rf"{NAMES[3]}\.mat cannot be read"):
        prepare.prepare_sbd(sbd, devkit)
    assert not (devkit / "ImageSets/Segmentation/train_aug.txt").exists()
    (sbd / "cls" / f"{NAMES[3]}.mat").unlink()
    with pytest.raises(Unusable, match=rf"{NAMES[3]}\.mat is not there \(1 such"):
        prepare.prepare_sbd(sbd, devkit)


def test_what_ends_a_process_is_named(tmp_path) -> None:
    once, last = tmp_path / "once", tmp_path / "last"
    crash = f"import os; p = {str(once)!r}; os.path.exists(p) or (open(p, 'w'), os._exit(1))"
    prepare._in_processes(exec, [("pass",), (crash,), (f"open({str(last)!r}, 'w')",)], "masks")
    assert once.exists() and last.exists()  # memory was short once; all is done
    with pytest.raises(Unusable, match=r"^import os; os\._exit\(1\) ended the process that worked"):
        prepare._in_processes(exec, [("pass",), ("import os; os._exit(1)",)], "masks")
    prepare._in_processes(exec, [], "masks")


def instances(coco, place: str = "train2014") -> dict:
    return json.loads((coco / "annotations" / f"instances_{place}.json").read_text())


def refused(coco, content: object) -> str:
    """What is said about other content; nothing may have been written."""
    path = coco / "annotations" / "instances_train2014.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(Unusable) as caught:
        prepare.prepare_coco(coco)
    assert {p.name for p in coco.iterdir()} == {"annotations", "train2014", "val2014"}
    said = str(caught.value)
    assert str(path) in said and "\n" not in said
    return said


def test_damaged_json(coco, one_process) -> None:
    content = instances(coco)
    whole = json.dumps(content)
    for damaged in (b"", b"[" * 9999, whole.encode()[:300], whole.encode() + b"}"):
        assert "cannot be read" in refused(coco, damaged)
    assert "'images' comes twice" in refused(coco, whole.replace("annotations", "images").encode())
    assert "is not in UTF-8" in refused(coco, whole.encode("utf-16"))
    for other in (
        [],
        {},
        {"images": {}},
        content | {"images": [1]},
        {**content, "annotations": {}},
    ):
        assert "has no list of objects" in refused(coco, other)
    assert "has no annotations" in refused(coco, content | {"annotations": []})
    twice = [about | {"id": 1} for about in content["categories"]]
    assert "no whole number, or comes twice" in refused(coco, content | {"categories": twice})
    (coco / "annotations" / "instances_train2014.json").write_text("\ufeff" + whole)
    prepare.prepare_coco(coco)  # a byte-order mark is no damage


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"height": 0}, "its height is 0, not 1 to 65535 pixels"),
        ({"height": 16.0}, r"its height is 16\.0, not"),
        ({"width": True}, "its width is True, not"),
        ({"width": None}, "its width is None, not"),
        ({"width": 10**9}, "its width is 1000000000, not"),
        ({"id": [1]}, "its id is no whole number"),
        *(({"file_name": name}, "it has to be NAME.jpg, inside the folder")
          for name in ("../x.jpg", "/x.jpg", "a/../x.jpg", "a\\x.jpg", "C:x.jpg", "x.png", ".jpg",
                       "x .jpg", "x\n.jpg", "a//x.jpg", "", None, 7)),
    ],
)  # fmt: skip
def test_a_picture_of_coco_that_cannot_be(coco, change, problem) -> None:
    content = instances(coco)
    content["images"][0] |= change
    said = refused(coco, content)
    assert problem.replace("\\", "") in said and f"picture {content['images'][0]['id']!r}" in said


def test_a_picture_of_coco_that_is_listed_twice(coco) -> None:
    content = instances(coco)
    about = content["images"][0]
    for other in (about | {"file_name": "other.jpg"}, about | {"id": 2}):
        said = refused(coco, content | {"images": [about, other]})
        assert f"picture {other['id']} ({other['file_name']}) is listed twice" in said


RLE = {"size": [16, 20], "counts": [0, 16, 304]}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"segmentation": [[4, 4, 9, 9]]}, "a polygon of 4 numbers, not x and y of 3 points"),
        ({"segmentation": [*square(2, 2, 9), [4, 4, 9, 9]]}, "a polygon of 4 numbers"),
        ({"segmentation": [[4, 4, 9, 9, 4, 9, 2]]}, "a polygon of 7 numbers"),
        ({"segmentation": []}, "an empty segmentation"),
        ({"segmentation": [[]]}, "a polygon"),
        ({"segmentation": [[[4, 4], [9, 9], [4, 9]]]}, "a polygon that is no list of numbers"),
        ({"segmentation": [["4", "4", "9", "9", "4", "9"]]}, "a polygon that is no list"),
        ({"segmentation": [[4, 4, 9, 9, 4, None]]}, "a polygon that is no list of numbers"),
        ({"segmentation": [[4, 4, 9, 9, 4, float("nan")]]}, "a polygon that is no list"),
        ({"segmentation": [4, 4, 9, 9, 4, 9]}, "a polygon that is no list of numbers"),
        ({"segmentation": [[400, 4, 409, 9, 404, 9]]}, "outside of its picture of 20x16 pixels"),
        ({"segmentation": None}, "neither polygons nor run lengths"),
        ({"segmentation": RLE | {"counts": None}}, "neither polygons nor run lengths"),
        ({"segmentation": RLE | {"size": [20, 16]}}, "for a picture of the size [20, 16], not"),
        ({"segmentation": RLE | {"counts": [0, 16, 303]}}, "do not sum up to its 320 pixels"),
        ({"segmentation": RLE | {"counts": [0, -16, 336]}}, "do not sum up to its 320 pixels"),
        ({"segmentation": RLE | {"counts": [0.0, 320]}}, "do not sum up to its 320 pixels"),
        ({"segmentation": RLE | {"counts": "1"}}, "do not sum up to its 320 pixels"),
        ({"segmentation": RLE | {"counts": "é \x01"}}, "run lengths that are damaged"),
        ({"segmentation": RLE | {"counts": "o" * 99}}, "run lengths that are damaged"),
        ({"area": None}, "its area is None, not a number"),
        ({"area": -1}, "its area is -1, not a number"),
        ({"area": float("nan")}, "its area is nan, not a number"),
        ({"image_id": 9}, "there is no picture of its image_id 9"),
        ({"image_id": [1]}, "there is no picture of its image_id [1]"),
        ({"category_id": 9}, "there is no category of its category_id 9"),
        ({"category_id": "1"}, "there is no category of its category_id '1'"),
    ],
)
def test_an_annotation_of_coco_that_cannot_be(coco, change, problem) -> None:
    content = instances(coco)
    content["annotations"][1] |= {"id": 77, **change}
    said = refused(coco, content)
    assert problem in said
    assert f"annotation 77 of picture {content['annotations'][1]['image_id']!r}: " in said
    missing = instances(coco)
    for key in change:
        del missing["annotations"][1][key]
    assert "annotation 77 of picture" in refused(coco, missing)


def test_coco_keeps_lists_that_are_there(coco, one_process) -> None:
    prepare.prepare_coco(coco)
    lists = coco / "ImageSets" / "Segmentation"
    (coco / "labels.csv").write_text("name,labels\nmine,cat\n")
    (lists / "train.txt").write_text("mine\n")
    (lists / "val.txt").write_text("")
    prepare.prepare_coco(coco)
    assert (coco / "labels.csv").read_text() == "name,labels\nmine,cat\n"
    assert (lists / "train.txt").read_text() == "mine\n"
    assert (lists / "val.txt").read_text() == "val2014/COCO_val2014_1\n"
    (coco / "labels.csv").write_text("name,labels\n")
    prepare.prepare_coco(coco)
    assert (coco / "labels.csv").read_text().count("person;bicycle;car") == 2


def test_painting_equals_pycocotools_and_bounds_it() -> None:
    coder = load_pycocotools()
    generator = np.random.default_rng(0)
    for share in (0.0, 0.03, 0.5, 1.0):
        inside = (generator.random((33, 29)) < share).astype(np.uint8)
        code = coder.encode(np.asfortranarray(inside))
        for counts in (code["counts"], code["counts"].decode()):
            about = {"segmentation": code | {"counts": counts}, "area": 9, "category_id": 44}
            assert (prepare.paint((33, 29), [about], {44: 5}) == 5 * inside).all()
    first = {"segmentation": square(0, 0, 9), "area": 81, "category_id": 1}
    second = {"segmentation": square(5, 5, 9), "area": 81, "category_id": 2}
    ids = {1: 3, 2: 4}
    assert prepare.paint((20, 20), [first, second], ids)[7, 7] == 4  # of equals, the later one
    assert prepare.paint((20, 20), [second, first], ids)[7, 7] == 3
    assert prepare.paint((20, 20), [first | {"area": 80}, second], ids)[7, 7] == 3
    point = {"segmentation": [[3, 3, 3, 3, 3, 3]], "area": 0, "category_id": 1}
    assert not prepare.paint((20, 20), [point], ids).any()  # COCO has such


def test_pycocotools_is_asked_for_first_and_its_remedy_exists(coco, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    with pytest.raises(ValueError, match=r"run `pip install -e '\.\[coco\]'`"):
        prepare.prepare_coco(coco)
    assert {p.name for p in coco.iterdir()} == {"annotations", "train2014", "val2014"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["coco"][0].startswith("pycocotools")


def test_the_doctor_finds_everything_at_once(devkit, sbd, one_process, monkeypatch) -> None:
    prepare.prepare_voc(devkit)
    prepare.prepare_sbd(sbd, devkit)
    counts = {"train": 2, "val": 1, "train_aug": 4}
    monkeypatch.setitem(doctor.EXPECTED, "VOC 2012", counts)
    report = doctor.examine(devkit, VOC)
    assert report.problems == [] and "No problems found" in report.text()
    assert report.splits[0] == "train: 2 pictures, 2 masks, 2 of 20 classes"

    pictures, masks = devkit / "JPEGImages", devkit / "SegmentationClass"
    content = (pictures / f"{NAMES[0]}.jpg").read_bytes()
    (pictures / f"{NAMES[0]}.jpg").write_bytes(content[:200])
    Image.new("F", (14, 10)).save(pictures / f"{NAMES[4]}.jpg", format="TIFF")
    (pictures / f"{NAMES[3]}.jpg").unlink()
    write_mask(masks / f"{NAMES[1]}.png", np.zeros((10, 13), np.uint8))
    write_mask(masks / f"{NAMES[2]}.png", np.full((10, 14), 99, np.uint8))
    with (devkit / "labels.csv").open("a") as file:
        file.write(f"{NAMES[0]},zebra\n")
    (devkit / "ImageSets/Segmentation/val.txt").write_text("\n".join((NAMES[2], "2011_9")))
    found = "\n".join(doctor.examine(devkit, VOC).problems)
    for text in (
        f"{NAMES[0]}.jpg cannot be read",
        f"{NAMES[4]}.jpg holds numbers without a known range",
        f"names '{NAMES[3]}.jpg'",
        f"{NAMES[1]}.png is 13x10 pixels, its picture 14x10",
        f"{NAMES[2]}.png holds class id 99",
        "class 'zebra' does not exist",
        f"'{NAMES[0]}' comes a second time",
        "val.txt, line 2: '2011_9' is not among the pictures",
        "train_aug has 3 pictures; everybody's has 4",
    ):
        assert text in found
    assert found.count("zebra") == 1  # said once, though three splits read the table


def test_the_doctor_says_what_is_missing(tmp_path, devkit, capsys) -> None:
    assert "make data DATASET=voc" in doctor.examine(tmp_path / "none", VOC).problems[0]
    prepare.prepare_voc(devkit)
    with pytest.raises(SystemExit):
        weclip(["doctor", str(devkit.parents[1])])
    out = capsys.readouterr().out
    assert "has no list of trainval, train_aug: VOC: `make data" in out
    assert "train has 2 pictures; everybody's has 1464" in out


def test_what_errors_advise_about_the_devkit_works(devkit, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(doctor.EXPECTED, "VOC 2012", {"train": 2, "val": 1})
    path, to = tmp_path / "VOCtrainval_11-May-2012.tar", tmp_path / "to"
    with tarfile.open(path, "w") as file:
        file.add(devkit.parent, "VOCdevkit")
    unpack = ["voc", "--to", str(to), "--archive", str(path)]
    with pytest.raises(SystemExit, match="no class") as caught:
        damaged = to / "VOCdevkit/VOC2012/Annotations" / f"{NAMES[1]}.xml"
        damaged.parent.mkdir(parents=True)
        damaged.write_text(xml_of("dog", "cat", "Dog"))
        shutil.copytree(devkit, to / "VOCdevkit/VOC2012", dirs_exist_ok=True)
        damaged.write_text(xml_of("dog", "cat", "Dog"))
        weclip(["download", *unpack])
    assert "names 'Dog', which is no class of VOC: correct it" in str(caught.value)
    damaged.write_text(xml_of("dog", "cat"))
    with pytest.raises(SystemExit, match=rf"is there already.* with --archive {to}"):
        weclip(["download", *unpack])  # it has another size now; the correction is not lost
    weclip(["prepare", "voc", str(to)])
    assert "No problems found" in capsys.readouterr().out
    (to / "VOCdevkit/VOC2012/labels.csv").unlink()
    damaged.write_bytes(b"")
    with pytest.raises(SystemExit, match="remove it and unpack the devkit again"):
        weclip(["download", "voc", "--archive", str(to)])
    damaged.unlink()
    weclip(["download", *unpack])
    assert "No problems found" in capsys.readouterr().out


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
        weclip(["download", "voc", *to, str(tmp_path / "VOCtrainval_11-May-2012.tar")])
    weclip(["download", "sbd", *to, str(tmp_path / "benchmark.tgz")])
    assert "train_aug: 4 pictures, 4 masks" in capsys.readouterr().out
    place = tmp_path / "to" / "coco"
    weclip(["download", "coco", "--to", str(place), "--archive", str(tmp_path / "coco.zip")])
    assert "No problems found" in capsys.readouterr().out
    assert LabelledImages(place, "train", COCO).names == ["train2014/COCO_train2014_1"]
    with pytest.raises(SystemExit, match="is not there: give an archive or a folder"):
        weclip(["download", "voc", *to, str(tmp_path / "none.tar")])
