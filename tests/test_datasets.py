import shutil

import numpy as np
import pytest
from PIL import Image

from weclip_lib.data.datasets import LabelledImages, MaskedImages, data_folder, normalise
from weclip_lib.data.profiles import PROFILES, get_profile
from weclip_lib.labels import COCO, MINIVOC, MINIVOC_1, VOC
from weclip_lib.world.minivoc import write_voc


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("data") / "world", {"train": 4, "val": 2})


@pytest.fixture
def folder(drawn, tmp_path):
    return shutil.copytree(drawn, tmp_path / "world")


def test_reads_what_was_drawn(drawn) -> None:
    pictures = MaskedImages(drawn, "train", MINIVOC, min_size=8)
    assert len(pictures) == 4
    assert pictures.image(2).shape == (160, 160, 3)
    for row in range(4):
        ids = set(np.unique(pictures.mask(row))) - {0, 255}
        assert ids <= {i + 1 for i in pictures.image_labels[row].nonzero()[:, 0].tolist()}


def test_the_weak_data_set_has_no_masks(drawn) -> None:
    assert not hasattr(LabelledImages(drawn, "train", MINIVOC), "mask")


def test_digest_follows_the_pictures(folder) -> None:
    before = LabelledImages(folder, "train", MINIVOC).digest()
    path = folder / "JPEGImages/train_00001.jpg"
    Image.open(path).rotate(90).save(path)
    assert LabelledImages(folder, "train", MINIVOC).digest() != before


def test_normalise_by_hand() -> None:
    image = np.full((2, 3, 3), 255, np.uint8)
    image[..., 1] = 0
    found = normalise([image], ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    assert found.shape == (1, 3, 2, 3)
    assert found[0, 0, 0, 0] == 2 and found[0, 1, 0, 0] == -2


def spoil_split(folder):
    (folder / "ImageSets/Segmentation/train.txt").unlink()


def spoil_row(folder):
    path = folder / "labels.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))


def spoil_class(folder):
    with (folder / "labels.csv").open("a") as file:
        file.write("train_00009,boat;zebra\n")


def spoil_file(folder):
    with (folder / "labels.csv").open("a") as file:
        file.write("train_00009,boat\n")


def spoil_twice(folder):
    with (folder / "labels.csv").open("a") as file:
        file.write("train_00001,boat\n")


def spoil_header(folder):
    path = folder / "labels.csv"
    path.write_text(path.read_text().replace("name,labels", "file,tags"))


def spoil_bytes(folder):
    path = folder / "JPEGImages/train_00001.jpg"
    path.write_bytes(path.read_bytes()[:900])


def spoil_text(folder):
    (folder / "JPEGImages/train_00001.jpg").write_text("no picture")


def spoil_size(folder):
    Image.new("RGB", (160, 7)).save(folder / "JPEGImages/train_00001.jpg")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_split, "train.txt is missing: splits here are val"),
        (spoil_row, "has no row for 'train_00001'"),
        (spoil_class, "line 8: class 'zebra' does not exist: use aeroplane"),
        (spoil_file, "train_00009.jpg is not there"),
        (spoil_twice, "'train_00001' comes a second time"),
        (spoil_header, "it must be name,labels"),
        (spoil_bytes, "train_00001.jpg cannot be read"),
        (spoil_text, "train_00001.jpg cannot be read"),
        (spoil_size, "160x7 pixels, smaller than one patch of 8"),
    ],
)
def test_bad_input_is_named_before_any_work(folder, spoil, message) -> None:
    spoil(folder)
    with pytest.raises(ValueError) as error:
        LabelledImages(folder, "train", MINIVOC, min_size=8)
    assert message in str(error.value)


def test_bad_masks_are_named(folder) -> None:
    mask = folder / "SegmentationClass/train_00000.png"
    kept = mask.read_bytes()
    Image.fromarray(np.full((160, 160), 77, np.uint8)).save(mask)
    with pytest.raises(ValueError, match="class id 77"):
        MaskedImages(folder, "train", MINIVOC)
    mask.write_bytes(kept)
    (folder / "SegmentationClass/train_00001.png").unlink()
    with pytest.raises(ValueError, match=r"train_00001.png is missing"):
        MaskedImages(folder, "train", MINIVOC)


def test_profiles(tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown profile 'vok': choose one of smoke, mini"):
        get_profile("vok")
    assert [len(labels.classes) for labels in (VOC, COCO, MINIVOC, MINIVOC_1)] == [20, 80, 20, 12]
    for labels in (VOC, COCO, MINIVOC, MINIVOC_1):
        assert len(set(labels.classes)) == len(labels.classes)
        assert set(labels.prompts) <= set(labels.classes)
    with pytest.raises(ValueError, match="data_dir is nowhere: there is no such folder"):
        data_folder(PROFILES["voc"], "nowhere")
    with pytest.raises(ValueError, match="no VOC 2012 at"):
        data_folder(PROFILES["voc"], str(tmp_path))
