"""Pictures and masks that are not as they should be are named, with the remedy."""

import os

import numpy as np
import pytest
from PIL import Image, ImageCms

from weclip_lib.storage.pictures import (
    picture_problem,
    picture_size,
    pictures_below,
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


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_from_the_header_are_those_of_the_picture(picture, tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / name, exif=exif)
    assert picture_size(tmp_path / name) == read_image(tmp_path / name).shape[:2]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_masks_whose_format_changes_ids(tmp_path, kind) -> None:
    Image.fromarray(np.ones((20, 30), np.uint8)).save(tmp_path / "a.png", format=kind)
    with pytest.raises(ValueError, match=f"a mask in {kind}, which changes class ids: export"):
        read_mask(tmp_path / "a.png", 3)


def test_cmyk_with_a_profile_of_something_else(tmp_path) -> None:
    image = Image.new("RGB", (8, 8), (250, 10, 20)).convert("CMYK")
    wrong = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (wrong, b"broken"):
        image.save(tmp_path / "a.jpg", quality=100, icc_profile=profile)
        assert np.abs(read_image(tmp_path / "a.jpg")[4, 4].astype(int) - [250, 10, 20]).max() < 5


@pytest.mark.parametrize("orientation", [0, 1, 9, 42])
def test_orientations_that_mean_nothing_do_not_turn(picture, tmp_path, orientation) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    assert (read_image(tmp_path / "a.png") == np.array(picture)).all()
    assert picture_size(tmp_path / "a.png") == (20, 30)


RAMP = np.linspace(0, 65535, 1600).reshape(40, 40).round().astype(np.uint16)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", np.uint16), ("a.tif", np.uint16), ("a.tif", np.int32)]
)
def test_sixteen_bits_are_scaled(tmp_path, name, kind) -> None:
    """By hand: 0 is 0, 65535 is 255, and each step of 257 is one."""
    Image.fromarray(RAMP.astype(kind)).save(tmp_path / name)
    found = read_image(tmp_path / name)
    assert found.shape == (40, 40, 3) and found[0, 0, 0] == 0 and found[-1, -1, 0] == 255
    assert np.abs(found[..., 0] - RAMP / 257).max() <= 0.5
    assert picture_problem(tmp_path / name) is None


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (RAMP // 16, "holds values from 0 to 4095"),  # 12 bits: nearly black, if it were taken
        (RAMP.astype(np.int32) * 2, "to 131070"),
        (RAMP.astype(np.int32) - 9, "from -9 to"),
        (RAMP.astype(np.float32), "without a known range"),
    ],
)
def test_numbers_without_a_known_range_are_refused_and_the_remedy_works(
    tmp_path, pixels, message
) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(pixels).save(path)
    before = path.read_bytes()
    problem = picture_problem(path)
    assert message in problem
    assert "scale them to 0 to 255, and save it as PNG under another name" in problem
    values = np.array(Image.open(path)).astype(float)
    scaled = 255 * (values - values.min()) / np.ptp(values)
    Image.fromarray(scaled.round().astype(np.uint8)).save(tmp_path / "b.png")
    found = read_image(tmp_path / "b.png")
    assert found.min() == 0 and found.max() == 255 and path.read_bytes() == before


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(tmp_path, mode) -> None:
    pixels = np.zeros((10, 12, 4), np.uint8)
    pixels[..., 0] = 255  # invisible red
    pixels[2:5, 3:7] = (0, 0, 90, 255)
    image = Image.fromarray(pixels)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    assert (found[0, 0] == 255).all() and (found[3, 4] < 100).all()
    assert picture_problem(tmp_path / "a.png", thorough=True) is None


def test_half_transparent_is_mixed_with_white(tmp_path) -> None:
    Image.new("RGBA", (4, 3), (255, 0, 0, 51)).save(tmp_path / "a.png")  # a fifth
    assert read_image(tmp_path / "a.png")[0, 0].tolist() == [255, 204, 204]


def test_palettes_bits_and_cmyk(tmp_path) -> None:
    solid = Image.new("RGB", (8, 8), (250, 10, 20))
    solid.quantize(2).save(tmp_path / "a.gif")
    solid.convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    Image.new("1", (8, 8), 1).save(tmp_path / "a.png")
    for name in ("a.gif", "a.jpg"):
        assert np.abs(read_image(tmp_path / name)[4, 4].astype(int) - [250, 10, 20]).max() < 5
    assert (read_image(tmp_path / "a.png") == 255).all()


def test_several_pictures_in_one_file(picture, tmp_path) -> None:
    for name in ("a.gif", "a.tif", "a.webp"):
        other = picture.rotate(180)
        picture.save(tmp_path / name, save_all=True, append_images=[other])
        assert "holds 2 pictures: save the one" in picture_problem(tmp_path / name)
    picture.save(tmp_path / "a.mpo", save_all=True, append_images=[picture])
    assert picture_problem(tmp_path / "a.mpo") is None  # a camera's preview or second eye
    with Image.open(tmp_path / "a.gif") as image:  # the remedy
        image.seek(1)
        image.save(tmp_path / "one.png")
    assert picture_problem(tmp_path / "one.png") is None


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.mpo", "a.bmp", "a.tif", "a.webp", "a.gif"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.4, 0.6, 0.95])
def test_cut_files_are_found(picture, tmp_path, name, kept) -> None:
    path = tmp_path / name
    more = {"save_all": True, "append_images": [picture]} if name == "a.mpo" else {}
    picture.save(path, **more)
    assert picture_problem(path) is None
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    problem = picture_problem(path)
    if name == "a.mpo" and kept > 0.5:  # the first of its two pictures is whole
        assert problem is None and read_image(path).shape == (20, 30, 3)
    else:
        assert f"{name} cannot be read" in problem


def test_damage_in_the_middle_needs_a_thorough_look(picture, tmp_path) -> None:
    path = tmp_path / "a.png"
    picture.save(path)
    content = bytearray(path.read_bytes())
    content[600:700] = bytes(100)
    path.write_bytes(content)
    assert picture_problem(path) is None
    assert "cannot be read" in picture_problem(path, thorough=True)


def test_a_jpeg_whose_middle_is_zeros(tmp_path) -> None:
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    assert picture_problem(path, thorough=True) is None
    content = bytearray(path.read_bytes())
    content[9000:13096] = bytes(4096)
    path.write_bytes(content)
    assert "holds a stretch of zeros instead of its middle" in picture_problem(path, thorough=True)
    with pytest.raises(ValueError, match="stretch of zeros"):
        read_image(path)


@pytest.mark.parametrize("how", [{}, {"optimize": True}, {"progressive": True}])
def test_an_even_picture_is_no_gap(tmp_path, how) -> None:
    """An optimised code for evenness is zeros, for kilobytes."""
    Image.new("RGB", (1500, 1000), (30, 90, 200)).save(tmp_path / "a.jpg", **how)
    assert picture_problem(tmp_path / "a.jpg", thorough=True) is None


def test_what_is_no_file(tmp_path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for ever
    for name, message in (("folder", "is no file"), ("pipe", "is no file"), ("x", "is not there")):
        assert message in picture_problem(tmp_path / f"{name}.jpg")


def test_pictures_of_a_folder(picture, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "in").mkdir()
    for place in ("in/a.JPG", "in/b.jfif", "other/c.png"):
        picture.save(tmp_path / place, format="PNG" if place.endswith("png") else "JPEG")
    (tmp_path / "in" / "link").symlink_to(other)
    (other / "back").symlink_to(tmp_path / "in")  # a loop
    (tmp_path / "in" / "._a.JPG").write_bytes(b"of macOS")
    for name in ("phone.HEIC", "IMG_1", "notes.txt"):
        (tmp_path / "in" / name).write_bytes(b"x")
    found, left_out = pictures_below(tmp_path / "in")
    assert list(found) == ["a.JPG", "b.jfif", "link/c.png"]
    for words in ("1 .HEIC (phone.HEIC)", "1 without an ending (IMG_1)", "1 .txt (notes.txt)"):
        assert words in left_out
    assert pictures_below(other / "back")[0].keys() == found.keys()


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
    with pytest.raises(
        ValueError, match="holds class id 2: there is no such class, ids are 0 to 1"
    ):
        read_mask(path, 2)
    Image.fromarray(mask.astype(np.uint16)).save(path)
    assert (read_mask(path, 3) == mask).all()  # 16 bits hold ids as well
    picture.save(path)
    with pytest.raises(ValueError, match="mask of mode RGB"):
        read_mask(path, 3)


def test_squares_keep_the_middle() -> None:
    ids = np.zeros((20, 50), np.uint8)
    ids[:, 15:35], ids[:, :15] = 3, 7
    assert (squared(ids, 20, nearest=True) == 3).all()
    assert (squared(ids, 40, nearest=True) == 3).all()
    assert squared(np.zeros((50, 20, 3), np.uint8), 16).shape == (16, 16, 3)
