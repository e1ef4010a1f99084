"""What predict takes as pictures, and that it replaces nobody else's file."""

from hashlib import sha256

import numpy as np
import pytest
from PIL import Image

from weclip_lib.evaluation.plan import Written, find_images, plan_outputs, refuse_data_set
from weclip_lib.storage.files import Unusable


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((3, 5, 3), np.uint8)).save(path)
    return path


def write(out, name, text="mask"):
    with Written(out).whole(out / name) as partial:
        partial.write_text(text)


def test_an_own_folder_means_its_images(tmp_path, capsys) -> None:
    for name in ("images/a.jpg", "images/b/c.png", "masks/a.png", "d.jpg"):
        picture(tmp_path / "own" / name)
    found = find_images([tmp_path / "own"])
    assert found == {
        "a": tmp_path / "own" / "images" / "a.jpg",
        "b/c": tmp_path / "own" / "images" / "b" / "c.png",
    }
    assert f"only the pictures in {tmp_path}/own/images are meant" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["kit", "kit/VOCdevkit/VOC2012"])
def test_a_devkit_means_its_jpegimages(tmp_path, place) -> None:
    for name in ("JPEGImages/a.jpg", "SegmentationClass/a.png", "ImageSets/Segmentation/x.png"):
        picture(tmp_path / place / name)
    found = find_images([tmp_path / "kit"])
    assert found == {"a": tmp_path / place / "JPEGImages" / "a.jpg"}


def test_of_pictures_in_the_devkit_itself_its_masks_are_none(tmp_path, capsys) -> None:
    (tmp_path / "ImageSets").mkdir()
    for name in ("train2014/a.jpg", "SegmentationClass/train2014/a.png"):
        picture(tmp_path / name)
    assert list(find_images([tmp_path])) == ["train2014/a"]
    assert "1 files that are masks, or predict's (SegmentationClass/" in capsys.readouterr().err


def test_what_is_no_picture_is_counted_and_named(tmp_path, capsys) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    assert list(find_images([tmp_path])) == ["a"]
    assert "1 .HEIC (phone.HEIC)" in capsys.readouterr().err


def test_lists_choose_among_pictures(tmp_path) -> None:
    for name in ("beach 1.jpg", "b/c.jpg", "b/c.png", "d.jpg"):
        picture(tmp_path / "in" / name)
    names = tmp_path / "names.txt"
    names.write_text("\ufeffb/c.png\r\nbeach 1 \r\n", encoding="utf-8", newline="")
    found = find_images([tmp_path / "in"], names=names)
    assert list(found) == ["b/c", "beach 1"] and found["b/c"].suffix == ".png"
    for text, message in (
        ("", r"names\.txt is empty: write one name a line"),
        ("d\nzebra\n", r"names\.txt, line 2: 'zebra' is not among the pictures"),
        ("b/c\n", r"c\.jpg and .*c\.png would write the same mask: rename one"),
    ):
        names.write_text(text)
        with pytest.raises(ValueError, match=message):
            find_images([tmp_path / "in"], names=names)


def test_places_that_have_no_picture(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for place, message in (("gone", "gone is not there"), ("empty", "no picture in .*empty")):
        with pytest.raises(ValueError, match=message):
            find_images([tmp_path / place])


def test_a_picture_that_is_given_twice_is_one(tmp_path) -> None:
    path = picture(tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "a.png").symlink_to(path)
    assert list(find_images([tmp_path / "in", path])) == ["a"]


@pytest.mark.parametrize("out", [".", "predicted", "b/predicted"])
def test_what_an_earlier_run_wrote_is_no_picture(tmp_path, capsys, out) -> None:
    for name in ("a.jpg", "b/c.jpg"):
        picture(tmp_path / name)
    for name in ("a.png", "b/c.png", "overlays/a.png"):
        write(tmp_path / out, name)
    for now in (tmp_path / out, tmp_path / "elsewhere"):
        assert list(find_images([tmp_path], out=now)) == ["a", "b/c"]
        assert "3 files that are masks, or predict's" in capsys.readouterr().err
    assert list(find_images([tmp_path / "b"])) == ["c"]  # with a list of files further up, too
    assert list(find_images([tmp_path / "a.jpg"], out=tmp_path)) == ["a"]


def test_nothing_below_out_is_a_picture(tmp_path) -> None:
    for name in ("a.jpg", "old/a.png"):
        picture(tmp_path / name)
    assert list(find_images([tmp_path], out=tmp_path / "old")) == ["a"]
    assert list(find_images([tmp_path / "old"], out=tmp_path / "old")) == ["a"]
    assert list(find_images([tmp_path], out=tmp_path / "new")) == ["a", "old/a"]


def test_outputs(tmp_path) -> None:
    images = {"b/c": picture(tmp_path / "b" / "c.jpg")}
    out = tmp_path / "out"
    plan = plan_outputs(images, out, overlays=True)
    assert plan.targets("b/c") == [out / "b" / "c.png", out / "overlays" / "b" / "c.png"]
    server = plan_outputs(images, out, voc_server=True)
    inside = "results/VOC2012/Segmentation/comp6_test_cls"
    assert server.targets("b/c") == [out / inside / "b" / "c.png"]
    assert not out.exists()


@pytest.mark.parametrize("name", ["a.png", "overlays/a.png", "classes.csv", "a.png/x", "overlays"])
def test_a_file_of_somebody_else_is_in_the_way(tmp_path, name) -> None:
    images = {"a": picture(tmp_path / "in" / "a.jpg")}
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("drawn by hand")
    with pytest.raises(ValueError, match=r"out/.*: choose another --out"):
        plan_outputs(images, tmp_path / "out", overlays=True)
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [path]
    plan_outputs(images, tmp_path / "another", overlays=True)


def test_a_picture_is_in_the_way(tmp_path) -> None:
    path = picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is one of the pictures: choose another --out"):
        plan_outputs({"a": path}, tmp_path)
    write(tmp_path / "out", "a.png")  # also if predict wrote it
    with pytest.raises(ValueError, match="is one of the pictures"):
        plan_outputs({"a": tmp_path / "out" / "a.png"}, tmp_path / "out")


def test_a_list_of_that_name_by_somebody_else(tmp_path) -> None:
    path = picture(tmp_path / "a.jpg")
    (tmp_path / "predicted.csv").write_text("day,rain\nmonday,3\n")
    with pytest.raises(ValueError, match=r"predicted\.csv is no list of predict's: choose another"):
        plan_outputs({"a": path}, tmp_path)
    assert list(find_images([tmp_path])) == ["a"]


def test_two_pictures_that_would_write_one_file(tmp_path) -> None:
    for names, message in (
        (("a", "overlays/a"), "would both write .*overlays/a.png: rename one"),
        (("a", "a.png/b"), r"a\.png/b\.jpg would write below .*out/a\.png, a file: rename"),
        (("classes.csv/b",), "would write below .*classes.csv, a file"),
        (("predicted.csv/b",), "would write below .*predicted.csv, a file"),
    ):
        images = {name: tmp_path / f"{name}.jpg" for name in names}
        with pytest.raises(ValueError, match=message):
            plan_outputs(images, tmp_path / "out", overlays=True)
    images = {name: tmp_path / f"{name}.jpg" for name in ("a", "overlays/a")}
    plan_outputs(images, tmp_path / "out")  # without overlays, each has a file of its own


@pytest.mark.parametrize("name", ["two\nlines", "caf\udce9"])
def test_names_that_no_list_can_hold(tmp_path, name) -> None:
    with pytest.raises(ValueError, match="rename it") as caught:
        plan_outputs({name: tmp_path / f"{name}.jpg"}, tmp_path / "out")
    str(caught.value).encode()


def test_data_sets_are_no_place_for_predictions(tmp_path) -> None:
    for name in ("own/images", "own/masks/deep", "kit/ImageSets", "kit/SegmentationClass"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("own", "own/masks", "own/masks/deep", "kit", "kit/SegmentationClass"):
        with pytest.raises(ValueError, match="choose another --out"):
            refuse_data_set(tmp_path / name)
    for name in ("own/predicted", "own/images/predicted", "masks", "SegmentationClass"):
        refuse_data_set(tmp_path / name)


def test_own_files_are_replaced_until_somebody_changes_them(tmp_path) -> None:
    path = tmp_path / "a.png"
    for text in ("first", "second", "first"):
        write(tmp_path, "a.png", text)
        assert path.read_text() == text
    digests = [sha256(text).hexdigest() for text in (b"first", b"second")]
    rows = "".join(f"a.png,{digest}\n" for digest in digests)
    assert (tmp_path / "predicted.csv").read_text() == f"file,sha256\n{rows}"
    path.write_text("corrected by hand")
    with pytest.raises(Unusable, match=r"a\.png is there, but not as this command left it"):
        write(tmp_path, "a.png", "third")
    assert path.read_text() == "corrected by hand"
    assert not list(tmp_path.glob(".*.partial"))


def test_a_killed_run_can_be_repeated(tmp_path) -> None:
    """The hash is on the disk before the file has its name; half a line does no harm."""
    write(tmp_path, "a.png")
    written = Written(tmp_path)
    with pytest.raises(KeyboardInterrupt), written.whole(tmp_path / "b.png") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    with (tmp_path / "predicted.csv").open("a") as file:
        file.write('"b.png,12')
    for name in ("a.png", "b.png"):
        write(tmp_path, name, "new")
        Written(tmp_path).check(tmp_path / name)


def test_a_file_that_appears_meanwhile_stays(tmp_path) -> None:
    written = Written(tmp_path)
    with pytest.raises(Unusable, match="or not by it"), written.whole(tmp_path / "a") as partial:
        partial.write_text("ours")
        (tmp_path / "a").write_text("theirs")
    assert (tmp_path / "a").read_text() == "theirs"


@pytest.mark.parametrize("name", [" a, b.png", 'the "best".png', "café.png", "b/x y .png"])
def test_odd_names_are_found_again(tmp_path, name) -> None:
    write(tmp_path, name)
    write(tmp_path, name, "again")
    assert (tmp_path / name).read_text() == "again"
