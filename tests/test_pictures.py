"""Pictures and masks that are not as they should be are named, with the remedy."""

import numpy as np
import pytest
from PIL import Image

from weclip_lib.pictures import (
    mask_problem,
    picture_problem,
    picture_size,
    read_image,
    read_mask,
    squared,
    write_mask,
)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8))


def test_grey_becomes_three_equal_channels(picture, tmp_path) -> None:
    picture.convert("L").save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    assert found.shape == (20, 30, 3) and (found == found[..., :1]).all()
    assert picture_problem(tmp_path / "a.png") is None


def test_exif_rotation_is_applied(picture, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    found = read_image(tmp_path / "a.png")
    assert found.shape == (30, 20, 3) and picture_size(tmp_path / "a.png") == (30, 20)
    assert (found == np.rot90(np.array(picture), -1)).all()


@pytest.mark.parametrize(
    ("mode", "name", "message"),
    [
        ("CMYK", "a.jpg", "mode CMYK (JPEG): convert it to RGB"),
        ("P", "a.gif", "mode P (GIF)"),
        ("I;16", "a.png", "mode I;16 (PNG)"),
        ("RGBA", "a.png", "mode RGBA (PNG)"),
    ],
)
def test_other_modes_are_refused(picture, tmp_path, mode, name, message) -> None:
    if mode == "I;16":
        picture = Image.fromarray(np.zeros((20, 30), np.uint16))
    else:
        picture = picture.convert(mode)
    picture.save(tmp_path / name)
    assert message in picture_problem(tmp_path / name)
    with pytest.raises(ValueError, match=name):
        read_image(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.6, 0.95])
def test_cut_files_are_found(picture, tmp_path, name, kept) -> None:
    path = tmp_path / name
    picture.save(path)
    assert picture_problem(path) is None
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert f"{name} cannot be read" in picture_problem(path)


def test_damage_in_the_middle_needs_a_thorough_look(picture, tmp_path) -> None:
    path = tmp_path / "a.png"
    picture.save(path)
    content = bytearray(path.read_bytes())
    content[600:700] = bytes(100)
    path.write_bytes(content)
    assert picture_problem(path) is None
    assert "cannot be read" in picture_problem(path, thorough=True)


def test_bytes_after_the_end_are_no_problem(picture, tmp_path) -> None:
    path = tmp_path / "a.jpg"
    picture.save(path)
    path.write_bytes(path.read_bytes() + b"camera")
    assert picture_problem(path) is None


def test_masks(picture, tmp_path) -> None:
    picture.save(tmp_path / "a.jpg")
    mask = np.zeros((20, 30), np.uint8)
    mask[3:5, 7] = 2
    mask[0] = 255
    path = tmp_path / "a.png"
    write_mask(path, mask)
    assert (read_mask(path, 3) == mask).all()
    with Image.open(path) as image:
        assert image.mode == "P" and image.getpalette()[6:9] == [0, 128, 0]  # VOC's green
    assert mask_problem(path, tmp_path / "a.jpg", 3) is None
    assert "holds class id 2" in mask_problem(path, tmp_path / "a.jpg", 2)
    write_mask(path, mask[:, 1:])
    assert "a.png is 29x20 pixels, its picture 30x20" in mask_problem(path, tmp_path / "a.jpg", 3)
    picture.save(path)
    assert "mask of mode RGB" in mask_problem(path, tmp_path / "a.jpg", 3)


def test_squares_keep_the_middle() -> None:
    ids = np.zeros((20, 50), np.uint8)
    ids[:, 15:35], ids[:, :15] = 3, 7
    assert (squared(ids, 20, nearest=True) == 3).all()
    assert (squared(ids, 40, nearest=True) == 3).all()
    assert squared(np.zeros((50, 20, 3), np.uint8), 16).shape == (16, 16, 3)
