"""One's own folder of pictures and tags: what is read, and what is said about mistakes."""

import time

import numpy as np
import pytest
from PIL import Image

from weclip_lib.data.datasets import LabelledImages, MaskedImages
from weclip_lib.data.layouts import own_labels, read_listing, splits_of
from weclip_lib.labels import LabelSet
from weclip_lib.storage.pictures import write_mask

ROWS = "a.jpg,cat;red car\nb/b.png,\nc.jpg,cat\n"


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b/b.png", "c.jpg"):
        path = tmp_path / "own" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 9), (50, 90, 200)).save(path)
    own = tmp_path / "own"
    (own / "labels.csv").write_text(f"file,tags\n{ROWS}")
    (own / "masks").mkdir()
    write_mask(own / "masks" / "c.png", np.eye(9, 12, dtype=np.uint8))
    return own


def test_classes_and_prompts(folder) -> None:
    found = own_labels(folder)
    assert found.name == "own" and found.classes == ("cat", "red car") and not found.prompts
    assert "grass" in found.backgrounds
    (folder / "classes.csv").write_text("class,prompt\nred car,a red automobile\ncat,\nboat,\n")
    (folder / "backgrounds.txt").write_text("sky\nboat\n\n")
    found = own_labels(folder)
    assert found.classes == ("red car", "cat", "boat") and found.backgrounds == ("sky",)
    assert found.class_prompts == ("a red automobile", "cat", "boat")


def test_splits(folder) -> None:
    labels = own_labels(folder)
    train = LabelledImages(folder, "train", labels)
    assert train.names == ["a", "b/b", "c"] and splits_of(folder) == ["train", "masked"]
    assert train.image_labels.tolist() == [[1, 1], [0, 0], [1, 0]]
    assert train.image(1).shape == (9, 12, 3)
    masked = MaskedImages(folder, "masked", labels)
    assert masked.names == ["c"] and masked.mask(0).sum() == 9
    (folder / "labels.csv").write_text("file,tags,split\na.jpg,cat,val\nb/b.png,,\n")
    assert LabelledImages(folder, "val", own_labels(folder)).names == ["a"]
    assert LabelledImages(folder, "train", own_labels(folder)).names == ["b/b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"file,tags\n{ROWS}a.jpg,cat\n", "line 5: 'a.jpg' comes a second time"),
        (f"file,tags\n{ROWS}d.jpg,cat\n", "d.jpg is not there (1 such rows)"),
        ("file,tags\na.jpg,dog\n", "line 2: class 'dog' does not exist: use cat, red car"),
        (
            ROWS,
            "has the header 'a.jpg,cat;red car': it must be file,tags (and may have split)",
        ),
        ("file,tags\na.jpg\n", "line 2: no comma; write `a.jpg,` where there is nothing"),
        ("file,tags\na.jpg,cat,red car\n", "line 2: more fields than the header"),
        ("", "labels.csv is empty: its first line has to be file,tags"),
        ("file;tags\na.jpg;cat\n", "must be file,tags (and may have split), with commas"),
        ("file,tags,tags\na.jpg,cat,cat\n", "has the header 'file,tags,tags'"),
        ('file,tags\na.jpg,"cat\nc.jpg,cat\n', 'line 2: a quote " that is not closed'),
        ('file,tags\na.jpg,"cat\nc.jpg,cat"\n', 'line 2: a quote " that is not closed'),
        ("file,tags\na.jpg,Cat\n", "line 2: class 'Cat' does not exist: did you mean 'cat'?"),
        ("file,tags\na.jpg,cat|red car\n", "class 'cat|red car' holds '|': separate classes by"),
        ("file,tags\na.jpg,background\n", "class 'background' is reserved"),
        (
            "file,tags\nb\\b.png,cat\n",
            "(1 such rows): did you mean 'b/b.png'?; write `/`",
        ),
        ("file,tags\na.jpg,katze ä\n".encode("latin-1"), "is not in UTF-8 (invalid"),
        ("file,tags\na.jpg,cat\n".encode("utf-16"), "is not in UTF-8"),
    ],
)
def test_mistakes_in_the_table(folder, text, message) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    (folder / "labels.csv").write_bytes(content)
    with pytest.raises(ValueError) as error:
        LabelledImages(folder, "train", LabelSet("own", ("cat", "red car"), ()))
    assert message in str(error.value)


def test_tables_as_other_systems_write_them(folder) -> None:
    """A byte-order mark, CRLF, spaces around fields, capitals in the header, blank lines."""
    rows = ROWS.replace("\n", " \r\n").replace(",", " , ")
    (folder / "labels.csv").write_bytes(f"\ufeffFile, Tags\r\n{rows}\r\n,\r\n".encode())
    assert own_labels(folder).classes == ("cat", "red car")
    train = LabelledImages(folder, "train", own_labels(folder))
    assert train.image_labels.tolist() == [[1, 1], [0, 0], [1, 0]]


def test_names_in_either_unicode_form(folder) -> None:
    """A Mac's disk may keep é as two characters where the table has one."""
    (folder / "images" / "a.jpg").rename(folder / "images" / "cafe\u0301.jpg")
    (folder / "labels.csv").write_text("file,tags\ncaf\u00e9.jpg,cat\n")
    assert LabelledImages(folder, "train", own_labels(folder)).names == ["caf\u00e9"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Boat", "boat"),
        ("caf\u00e9", "cafe\u0301"),
        ("red  boat", "red boat"),
        ("\ufb01sh", "fish"),  # a ligature
    ],
)
def test_words_that_are_one_to_clip(folder, first, second) -> None:
    (folder / "labels.csv").write_text(f"file,tags\na.jpg,{first}\nc.jpg,{second}\n")
    with pytest.raises(ValueError, match="are one word to CLIP: write it the same everywhere"):
        own_labels(folder)
    (folder / "classes.csv").write_text(f"class,prompt\n{first},\n{second},\n")
    with pytest.raises(ValueError, match="are one word to CLIP"):
        own_labels(folder)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("boat\u200b", "holds the invisible character U+200B: write `boat`"),
        ("\"['boat', 'cat']\"", "holds '[': separate classes by `;`"),
        ('"boat, cat"', "holds ',': separate classes by `;`"),
        ("boat|cat", "holds '|': separate classes by `;`"),
        ("Background", "is reserved"),
        ("_background_", "is reserved"),
    ],
)
def test_words_that_cannot_be_a_class(folder, word, message) -> None:
    for table, header in (
        ("labels.csv", "file,tags\na.jpg,{}\n"),
        ("classes.csv", "class,prompt\n{},\n"),
    ):
        (folder / table).write_text(header.format(word))
        with pytest.raises(ValueError) as error:
            own_labels(folder)
        assert f"{table}, line 2" in str(error.value) and message in str(error.value)
        (folder / table).write_text("file,tags\na.jpg,cat\n")


def test_what_somebody_may_have_meant(folder) -> None:
    for written in ("images/a.jpg", "a", "./a.jpg", "A.JPG", "C:\\\\photos\\\\a.jpg"):
        (folder / "labels.csv").write_text(f"file,tags\n{written},cat\n")
        with pytest.raises(ValueError, match=r"did you mean 'a\.jpg'\?"):
            read_listing(folder, "train", ("cat",), with_masks=True)
    (folder / "labels.csv").write_text("file,tags,split\na.jpg,cat,masked\n")
    with pytest.raises(ValueError, match="has a split 'masked', which means all that have a mask"):
        read_listing(folder, "train", ("cat",))
    (folder / "labels.csv").write_text("file,tags\na.jpg,cat\nc.jpg,dog\nb/b.png,cat/dog\n")
    with pytest.raises(ValueError, match="class 'cat/dog' is made of cat, dog: separate"):
        own_labels(folder)


def test_joiners_of_persian_words_are_letters(folder) -> None:
    (folder / "labels.csv").write_text("file,tags\na.jpg,\u0645\u06cc\u200c\u062e\u0648\n")
    assert own_labels(folder).classes == ("\u0645\u06cc\u200c\u062e\u0648",)


def test_background_prompts(folder) -> None:
    path = folder / "backgrounds.txt"
    path.write_bytes("\ufeffsky\r\nCat \r\n\r\nwet grass\r\n".encode())
    assert own_labels(folder).backgrounds == ("sky", "wet grass")
    for text, message in (
        ("", "backgrounds.txt is empty: write one prompt a line, or remove it"),
        ("cat\n", "backgrounds.txt names classes alone"),
        ("grass, sky\n", "line 1: 'grass, sky' is no prompt: write one a line"),
        ("# often there\nsky\n", "line 1: '# often there' is no prompt"),
        ("sky\nSky\n", "line 2: 'sky' comes a second time"),
        (
            "for\u00eat\n".encode("latin-1"),
            "backgrounds.txt is not in UTF-8 (invalid continuation byte in line 1)",
        ),
    ):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError) as error:
            own_labels(folder)
        assert message in str(error.value)
    path.unlink()  # the remedy
    assert "grass" in own_labels(folder).backgrounds


def test_links_are_followed_and_loops_are_not(folder, tmp_path) -> None:
    other = tmp_path / "other"
    (folder / "images" / "b").rename(other)
    (folder / "images" / "b").symlink_to(other)
    (other / "round").symlink_to(folder / "images")
    assert LabelledImages(folder, "train", own_labels(folder)).names == ["a", "b/b", "c"]


@pytest.fixture
def devkit(tmp_path):
    kit = tmp_path / "kit"
    for place in ("JPEGImages", "ImageSets/Segmentation"):
        (kit / place).mkdir(parents=True)
    for name in ("2007_1", "my photo 1", "c"):
        Image.new("RGB", (12, 9)).save(
            kit / "JPEGImages" / f"{name}.{'png' if name == 'c' else 'jpg'}"
        )
    (kit / "labels.csv").write_text("name,labels\n2007_1,cat\nmy photo 1,cat\nc.png,\n")
    return kit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2007_1\nmy photo 1\n", ["2007_1", "my photo 1"]),
        ("\ufeff2007_1 \r\n\r\nc\r\n", ["2007_1", "c"]),
        ("/JPEGImages/2007_1.jpg /SegmentationClassAug/2007_1.png\n", ["2007_1"]),
        ("JPEGImages/c.png\nmy photo 1.jpg", ["c", "my photo 1"]),
        ("2007_1  1\nmy photo 1  1\n", ["2007_1", "my photo 1"]),
        ("2007_1 -1\n", "train.txt, line 1: '2007_1 -1' is not among the pictures"),
        ("c\nzebra\n", "train.txt, line 2: 'zebra' is not among the pictures: correct or remove"),
        ("c\n2007_1\nc\n", "train.txt, line 3: 'c' comes a second time"),
        ("\n", "train.txt is empty: write one name a line, or remove it"),
    ],
)
def test_split_lists(devkit, text, expected) -> None:
    (devkit / "ImageSets/Segmentation/train.txt").write_text(text, newline="")
    if isinstance(expected, list):
        assert read_listing(devkit, "train", ("cat",)).names == expected
    else:
        with pytest.raises(ValueError) as error:
            read_listing(devkit, "train", ("cat",))
        assert expected in str(error.value)


def test_all_mistakes_can_be_collected(folder) -> None:
    (folder / "labels.csv").write_text("file,tags\na.jpg,dog;cow\nc.jpg\nd.jpg,cat\na.jpg,cat\n")
    found: list[str] = []
    listing = read_listing(folder, "train", ("cat",), found.append)
    assert listing.names == ["a"]
    expected = ("class 'dog'", "class 'cow'", "line 3: no comma", "second time", "d.jpg is not")
    assert len(found) == len(expected)
    assert all(any(text in problem for problem in found) for text in expected)


def test_names_that_would_share_a_mask(folder) -> None:
    Image.new("RGB", (12, 9)).save(folder / "images" / "a.png")
    (folder / "labels.csv").write_text("file,tags\na.jpg,cat\na.png,cat\n")
    with pytest.raises(ValueError, match="differ in their ending alone"):
        read_listing(folder, "train", ("cat",))


def test_classes_twice_and_unknown_split(folder) -> None:
    with pytest.raises(ValueError, match="no picture of split 'vall': splits here are train"):
        read_listing(folder, "vall", ("cat", "red car"))
    (folder / "classes.csv").write_text("class,prompt\ncat,\ncat,tabby\n")
    with pytest.raises(ValueError, match="line 3: class 'cat' comes a second time"):
        own_labels(folder)


def test_broken_pictures_are_counted_or_skipped(folder) -> None:
    (folder / "images" / "a.jpg").write_text("no picture")
    (folder / "images" / "b" / "b.png").write_bytes(b"")
    labels = own_labels(folder)
    with pytest.raises(ValueError, match=r"a.jpg cannot be read .*\(and 1 more\)"):
        LabelledImages(folder, "train", labels)
    found = LabelledImages(folder, "train", labels, skip_broken=True)
    assert found.names == ["c"] and len(found.broken) == 2
    assert found.image_labels.tolist() == [[1, 0]]


def test_hundred_thousand_rows(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    rows = [f"{number:06d}.jpg" for number in range(100_000)]
    for name in rows[:50]:
        (tmp_path / "images" / name).touch()
    text = "".join(
        f"{name},{'cat;dog' if number % 2 else ''}\n" for number, name in enumerate(rows)
    )
    (tmp_path / "labels.csv").write_text(f"file,tags\n{text}")
    found: list[str] = []
    began = time.process_time()
    listing = read_listing(tmp_path, "train", ("cat", "dog"), found.append)
    whole = time.process_time() - began
    (tmp_path / "labels.csv").write_text(f"file,tags\n{text[: text.index('010000.jpg')]}")
    began = time.process_time()
    read_listing(tmp_path, "train", ("cat", "dog"), [].append)
    assert whole < 30 * (time.process_time() - began)  # a tenth of the rows; not its square
    assert len(listing.names) == 50 and "(99950 such rows)" in found[0]
