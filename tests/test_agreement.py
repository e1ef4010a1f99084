"""Masks that can be read and mean something else: told by the tags, with the cause."""

import numpy as np
import pytest
from PIL import Image

from weclip_lib.data import doctor
from weclip_lib.data.agreement import check_masks
from weclip_lib.data.datasets import LabelledImages, MaskedImages
from weclip_lib.data.layouts import own_labels, read_listing
from weclip_lib.storage.pictures import picture_size, read_mask, write_mask

CLASSES = ("boat", "cat", "tree")
TAGS = (("boat",), ("cat", "tree"), ("cat",), ())


@pytest.fixture
def folder(tmp_path):
    """Four pictures of 12x9 pixels; the last is nothing but background."""
    own = tmp_path / "own"
    (own / "images").mkdir(parents=True)
    rows = []
    for number, tags in enumerate(TAGS):
        Image.new("RGB", (12, 9), (50, 90, 20 * number)).save(own / f"images/p{number}.png")
        mask = np.zeros((9, 12), np.uint8)
        mask[0] = 255
        for place, tag in enumerate(tags):
            mask[2:5, 4 * place : 4 * place + 3] = 1 + CLASSES.index(tag)
        write_mask(own / f"masks/p{number}.png", mask)
        rows.append(f"p{number}.png,{';'.join(tags)}\n")
    (own / "labels.csv").write_text(f"file,tags\n{''.join(rows)}")
    (own / "classes.csv").write_text("class,prompt\n" + "".join(f"{c},\n" for c in CLASSES))
    return own


def change(folder, what) -> None:
    for path in sorted((folder / "masks").glob("*.png")):
        Image.fromarray(what(np.array(Image.open(path)))).save(path)


def found(folder, strict=True):
    listing = read_listing(folder, "train", CLASSES, with_masks=True)
    return check_masks(listing.masks, listing.images, listing.tags, CLASSES, strict=strict)


def test_masks_that_fit(folder) -> None:
    assert found(folder).problems == found(folder).remarks == []
    assert len(MaskedImages(folder, "train", own_labels(folder))) == 4


def test_binary_masks(folder) -> None:
    change(folder, lambda ids: np.where((ids > 0) & (ids < 255), 255, 0).astype(np.uint8))
    (problem,) = found(folder).problems
    assert "p0.png holds background alone, its picture is tagged 'boat' (3 such masks)" in problem
    assert "255 is void and counts as nothing: write class ids of 1 and more" in problem
    with pytest.raises(ValueError, match="255 is void"):
        MaskedImages(folder, "train", own_labels(folder))
    assert len(LabelledImages(folder, "train", own_labels(folder))) == 4  # never looks at masks


def test_shifted_ids(folder) -> None:
    """As when `background` stood first in a list of classes that begins with 1."""
    change(folder, lambda ids: np.where((ids > 0) & (ids < 3), ids + 1, ids).astype(np.uint8))
    (folder / "labels.csv").write_text("file,tags\np0.png,boat\np2.png,cat\n")
    for name in ("p1", "p3"):
        (folder / f"masks/{name}.png").unlink()
    (problem,) = found(folder).problems
    assert "the ids are one too high: 0 is background, and 1 is 'boat'" in problem


def test_numbered_objects_are_not_called_shifted(folder) -> None:
    """One too high would make the first object background."""
    write_mask(folder / "masks/p0.png", np.repeat([[0, 1, 2]], 9, 0).repeat(4, 1).astype(np.uint8))
    (problem,) = found(folder).problems
    assert "holds 'boat' and 'cat'" in problem and "no number of an object" in problem


def test_masks_of_other_pictures(folder) -> None:
    first, second = (folder / f"masks/p{number}.png" for number in (0, 1))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    (problem,) = found(folder).problems
    assert "p0.png holds 'cat' and 'tree', its picture is tagged 'boat' (2 such masks)" in problem
    assert "correct the mask or the tags, or remove the mask" in problem
    first.unlink()
    second.unlink()  # the remedy
    assert len(MaskedImages(folder, "masked", own_labels(folder))) == 2


def test_in_a_devkit_a_few_are_told_and_many_refused(folder) -> None:
    write_mask(folder / "masks/p0.png", np.full((9, 12), 2, np.uint8))
    few = found(folder, strict=False)
    assert few.problems == [] and "p0.png holds 'cat'" in few.remarks[0]
    write_mask(folder / "masks/p3.png", np.full((9, 12), 2, np.uint8))
    assert "(2 such masks)" in found(folder, strict=False).problems[0]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_masks_made_without_the_turn(folder, orientation) -> None:
    """The remedy of the error is done to the letter."""
    path, picture = folder / "masks/p0.png", folder / "images/p0.png"
    upright = read_mask(path, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}[orientation]
    how = Image.Transpose[back]
    Image.open(picture).transpose(how).save(picture, exif=exif)
    assert picture_size(picture) == (9, 12)
    Image.open(path).transpose(how).save(path)
    (problem,) = found(folder).problems
    assert "p0.png is 9x12 pixels, its picture 12x9, turned upright by its EXIF data" in problem
    eval(problem.partition("turn the mask, too: ")[2], {"Image": Image, "path": path})
    assert (read_mask(path, 4) == upright).all() and found(folder).problems == []


def test_other_sizes(folder) -> None:
    path = folder / "masks/p0.png"
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)
    assert "the mask is turned: turn it back" in found(folder).problems[0]
    write_mask(path, np.ones((9, 11), np.uint8))
    assert (
        "p0.png is 11x9 pixels, its picture 12x9: make them the same" in found(folder).problems[0]
    )


def test_what_no_size_can_tell_is_a_remark(folder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture = folder / "images/p0.png"
    Image.open(picture).save(picture, exif=exif)
    assert found(folder).problems == []
    assert "turn or mirror (1 such masks)" in found(folder).remarks[0]


def test_missing_damaged_and_unknown_ids(folder) -> None:
    (folder / "masks/p0.png").unlink()
    write_mask(folder / "masks/p1.png", np.full((9, 12), 77, np.uint8))
    path = folder / "masks/p2.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"p0\.png is missing.* \(and 2 more\)"):
        MaskedImages(folder, "train", own_labels(folder))
    problems = "\n".join(found(folder).problems)
    assert "p1.png holds class id 77" in problems and "p2.png cannot be read" in problems


def test_a_link_to_nowhere_is_a_missing_mask(folder) -> None:
    (folder / "masks/p0.png").unlink()
    (folder / "masks/p0.png").symlink_to(folder / "gone.png")
    report = doctor.examine(folder, own_labels(folder))
    assert any("p0.png is missing" in problem for problem in report.problems)


@pytest.mark.parametrize(
    "name", ["p0.PNG", "p0_mask.png", "p0.png.png", "p0.jpg", "p0.npy", "other.png"]
)
def test_masks_that_belong_to_no_picture(folder, name) -> None:
    (folder / "masks/p0.png").rename(folder / "masks" / name)
    with pytest.raises(ValueError) as error:
        MaskedImages(folder, "masked", own_labels(folder))
    assert f"masks/{name} belongs to no picture of labels.csv (1 such files)" in str(error.value)
    assert "masks are called as their picture, masks/p0.png; rename or remove it" in str(
        error.value
    )
    (folder / "masks" / name).rename(folder / "masks/p0.png")  # the remedy
    assert len(MaskedImages(folder, "masked", own_labels(folder))) == 4
