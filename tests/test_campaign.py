"""Mutated inputs through the commands: each ends in a result, or in a refusal that names it.

A few by default; hundreds with `pytest tests/test_campaign.py --hypothesis-profile campaign`.
Whatever the outcome, nothing that was there before is changed.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from PIL import Image
from scipy.io import savemat

from tests.outcomes import OUTCOMES
from weclip_lib.__main__ import main as weclip
from weclip_lib.data import doctor
from weclip_lib.data.profiles import PROFILES
from weclip_lib.decoder import Decoder
from weclip_lib.labels import COCO_CLASSES, LabelSet
from weclip_lib.storage.pictures import read_image, write_mask
from weclip_lib.storage.tensors import save_weights
from weclip_lib.studies import runner
from weclip_lib.training.train import trained_note

pytestmark = pytest.mark.filterwarnings("default")
several = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=True
)
CLASSES = ("boat", "cat")
Change = tuple[str, Callable[[Path], None], str]  # what is done, how, and the name to be told


def make_own(folder: Path) -> Path:
    """Four pictures of 40x32 pixels with tags and masks."""
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(4):
        pixels = rng.integers(0, 256, (32, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"images/p{number}.png")
        mask = np.zeros((32, 40), np.uint8)
        mask[8:20, 4:30] = 1 + number % 2
        write_mask(folder / f"masks/p{number}.png", mask)
        rows.append(f"p{number}.png,{CLASSES[number % 2]}\n")
    (folder / "labels.csv").write_text(f"file,tags\n{''.join(rows)}")
    (folder / "classes.csv").write_text("class,prompt\nboat,\ncat,a cat\n")
    (folder / "backgrounds.txt").write_text("grass\nsky\n")
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    """Files below a folder, by the hash of their bytes."""
    paths = (path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in paths}


def judge(name: str, arguments: list, kept: Path, names: list[str], capsys) -> bool:
    """Run a command; returns whether it succeeded. A refusal has to name the offender."""
    before = snapshot(kept)
    capsys.readouterr()
    status = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weclip([str(argument) for argument in arguments])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    said = f"{status if isinstance(status, str) else ''}\n{out}\n{err}"
    after = snapshot(kept)
    assert {path: after.get(path) for path in before} == before, f"changed files: {arguments}"
    OUTCOMES[f"{name}: {'refused' if status else 'done'}"] += 1
    if status:
        assert "Traceback" not in said, said
        assert any(word in said for word in names), f"{names} not in {said!r}"
    return not status


# --- what can happen to a file -------------------------------------------------------------------

words = st.sampled_from(
    ["boat", "Boat", "cat", "a cat", "", " ", "background", "cafe\u0301", "caf\u00e9", "b|c",
     "['a']", "boat\u200b", '"', '"x', "x,y", "p0.png", "../p0.png", "/p0.png", "p0", "p9.png", ";",
     "boat;cat", "=1+1", "\u202eboat", "nan",
     "\U0001f408", "\u732b", "x" * 400, "-1", "p0.png 1"]
)  # fmt: skip
encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "shift-jis"])
ends = st.sampled_from(["\n", "\r\n", "\r", "\n\n"])


@st.composite
def texts(draw, header: str, columns: int) -> bytes:
    """A list with strange cells, another encoding, other line ends, or cut."""
    head = draw(st.sampled_from([header, header.upper(), header.replace(",", ";"), "", "x,y"]))
    cells = st.lists(words, min_size=max(0, columns - 1), max_size=columns + 1).map(",".join)
    lines = [head, *draw(st.lists(cells, max_size=6))]
    content = draw(ends).join(lines).encode(draw(encodings), errors="replace")
    return content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


def save_picture(mode: str, kind: str, size: tuple[int, int], orientation: int, path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(pixels[..., 0].astype(np.float32))
    else:
        image = Image.fromarray(pixels).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    try:
        image.save(path, format=kind, **({"exif": exif} if kind in ("PNG", "JPEG") else {}))
    except (OSError, ValueError):  # a format that does not know the mode
        image.convert("RGB").save(path, format=kind)


@st.composite
def damage(draw, path: str) -> Change:
    """What a copy, a disk or a person does to any file."""
    what = draw(st.sampled_from(["cut", "zeroed", "text", "gone", "folder", "noise", "loop"]))
    part, length = draw(st.floats(0, 1)), draw(st.integers(1, 3000))

    def do(folder: Path) -> None:
        file = folder / path
        content = bytearray(file.read_bytes())
        at = int(part * len(content))
        if what == "cut":
            file.write_bytes(content[:at])
        elif what in ("zeroed", "noise"):
            noise = np.random.default_rng(length).bytes(length)
            content[at : at + length] = (bytes(length) if what == "zeroed" else noise)[
                : len(content) - at
            ]
            file.write_bytes(content)
        elif what == "text":
            file.write_text("not what it was")
        else:
            file.unlink()
            if what == "folder":
                file.mkdir()
            elif what == "loop":
                file.symlink_to(file)

    return f"{what} {path}", do, Path(path).name


@st.composite
def pictures(draw) -> Change:
    """A picture of another mode, format, size or orientation."""
    about = (
        draw(st.sampled_from(["RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "F", "YCbCr"])),
        draw(st.sampled_from(["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP"])),
        (draw(st.integers(1, 60)), draw(st.integers(1, 60))),
        draw(st.integers(0, 9)),
    )
    return (
        f"picture {about}",
        lambda folder: save_picture(*about, folder / "images/p0.png"),
        "p0.png",
    )


@st.composite
def masks(draw) -> Change:
    """A mask with other ids, another size, mode or name."""
    ids = draw(st.sampled_from([0, 1, 2, 3, 77, 254, 255]))
    size = draw(st.sampled_from([(32, 40), (40, 32), (31, 40), (1, 1)]))
    mode = draw(st.sampled_from(["L", "P", "RGB", "1", "I;16", "LA"]))
    name = draw(st.sampled_from(["p0.png", "p0.PNG", "p0_mask.png", "p0.png.png", "p0.tif"]))

    def do(folder: Path) -> None:
        mask = np.zeros(size, np.uint8)
        mask[size[0] // 2 :] = ids
        image = Image.fromarray(mask.astype(np.uint16)) if mode == "I;16" else Image.fromarray(mask)
        (folder / "masks/p0.png").unlink()
        image = image if mode == "I;16" else image.convert(mode)
        image.save(folder / "masks" / name, format="TIFF" if name.endswith("tif") else "PNG")

    return f"mask of {ids}, {size}, {mode}, {name}", do, "p0"


@st.composite
def lists(draw) -> Change:
    """One of the text lists."""
    name, header, columns = draw(
        st.sampled_from([("labels.csv", "file,tags", 2), ("classes.csv", "class,prompt", 2),
                         ("backgrounds.txt", "grass", 1)])
    )  # fmt: skip
    content = draw(texts(header, columns))
    return f"{name}: {content!r}", lambda folder: (folder / name).write_bytes(content), name


FILES = ("images/p0.png", "masks/p0.png", "labels.csv", "classes.csv", "backgrounds.txt")
changes = st.one_of(
    lists(), pictures(), masks(), st.sampled_from(FILES).flatmap(lambda path: damage(path))
)
# A list that was cut may lack a class or a picture: then what it lacks is named with the list.
RELATED = ["labels.csv", "classes.csv", "backgrounds.txt", "masks"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """Of two classes, on pictures as they are."""
    torch.manual_seed(0)
    own = LabelSet("own", CLASSES, ("grass", "sky"))
    smoke = PROFILES["smoke"]
    setting = type(smoke)("folder", own, "MiniCLIP", "miniclip-v2", statistics="own", long_side=40,
                          scales=(1.0,), decoder=smoke.decoder)  # fmt: skip
    made = Decoder(width=128, class_count=3, block_count=11, dim=32, layers=1)
    path = tmp_path_factory.mktemp("run") / "trained.safetensors"
    save_weights(made, path, trained_note(setting, 1))
    return path


@several
@given(change=changes)
def test_doctor(change, tmp_path, capsys) -> None:
    _, do, name = change
    folder = make_own(tmp_path / "own")
    do(folder)
    judge("doctor", ["doctor", folder], folder, [name, *RELATED], capsys)


@several
@given(change=changes, supervised=st.booleans())
def test_train(change, supervised, tmp_path, capsys) -> None:
    _, do, name = change
    folder, out = make_own(tmp_path / "own"), tmp_path / "run"
    shutil.rmtree(out, ignore_errors=True)
    do(folder)
    arguments = [
        "--profile",
        "folder",
        "--data-dir",
        folder,
        "--out",
        out,
        "--backbone",
        "MiniCLIP",
    ]
    arguments += [
        "--weights",
        "miniclip-v2",
        "--batch",
        2,
        "--crop",
        32,
        "--steps",
        1,
        "--workers",
        0,
    ]
    arguments += ["--device", "cpu"] + ["--supervised"] * supervised
    done = judge(
        "train",
        ["train", *arguments],
        folder,
        [name, *RELATED, "do not fill", "the prompt"],
        capsys,
    )
    assert (out / "trained.safetensors").exists() == done


@several
@given(change=changes, inside=st.booleans())
def test_predict(change, inside, decoder, tmp_path, capsys) -> None:
    _, do, name = change
    folder = make_own(tmp_path / "own")
    out = folder / "predicted" if inside else tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    do(folder)
    arguments = ["predict", "--decoder", decoder, "--device", "cpu", folder, "--out", out]
    done = judge("predict", arguments, folder, [name, *RELATED], capsys)
    if done:
        for path in (folder / "images").iterdir():
            with Image.open(out / f"{path.stem}.png") as mask:
                assert mask.size == read_image(path).shape[1::-1]
        again = judge("predict", arguments, folder / "images", [], capsys)
        assert again and not (out / "predicted").exists()


@several
@given(change=changes)
def test_score(change, decoder, tmp_path, capsys) -> None:
    _, do, name = change
    folder, out = make_own(tmp_path / "own"), tmp_path / "scores"
    shutil.rmtree(out, ignore_errors=True)
    do(folder)
    arguments = ["score", "--decoder", decoder, "--device", "cpu", "--profile", "folder"]
    arguments += ["--data-dir", folder, "--split", "masked", "--out", out]
    names = [name, *RELATED, "choose the data that it was trained for"]
    done = judge("score", arguments, folder, names, capsys)
    assert (out / "scores.csv").exists() == done


numbers = st.one_of(
    st.integers(-3, 3).map(str), st.sampled_from(["1e3", "1.5", "two", "", "nan", "inf", "9" * 30])
)


@several
@given(data=st.data())
def test_numbers_of_train(data, tmp_path, capsys) -> None:
    folder, out = make_own(tmp_path / "own"), tmp_path / "run"
    shutil.rmtree(out, ignore_errors=True)
    options = ["accumulate", "checkpoint-every", "validate-every", "watch", "pictures", "workers"]
    option = data.draw(st.sampled_from([*options, "batch", "crop", "steps", "device", "seed"]))
    small = {"batch": 2, "crop": 32, "steps": 1, "workers": 0, "device": "cpu", "val": "masked"}
    chosen = {"backbone": "MiniCLIP", "weights": "miniclip-v2", **small, option: data.draw(numbers)}
    pairs = [word for name, value in chosen.items() for word in (f"--{name}", value)]
    arguments = ["--profile", "folder", "--data-dir", folder, "--out", out, *pairs]
    done = judge("train, numbers", ["train", *arguments], folder, [option], capsys)
    assert (out / "trained.safetensors").exists() == done


@several
@given(data=st.data())
def test_parameters_of_the_runner(data, tmp_path, capsys, monkeypatch) -> None:
    """Only the check: a notebook that could run is not run."""
    monkeypatch.setattr(runner, "run_notebook", lambda *_, **__: True)
    names = ("steps", "pictures", "seed", "seed_count", "stepz", "weights", "", "out_dir")
    name, value = data.draw(st.sampled_from(names)), data.draw(st.one_of(numbers, words))
    arguments = ["run", "--notebook", "02", "--profile", "smoke", "-p", name, value]
    given = ["run", *map(str, arguments), "--out", str(tmp_path / "o")]
    judge("runner", given, tmp_path, [name or "''"], capsys)


@several
@given(data=st.data())
def test_grids(data, tmp_path, capsys) -> None:
    good = {"notebook": "01_cam_generation", "parameters": {"profile": "smoke", "seed": [0, 1]}}
    values = st.one_of(
        st.integers(-2, 5), words, st.lists(st.integers(0, 2), max_size=3), st.none()
    )
    keys = st.sampled_from(["seed", "pictures", "profile", "stepz", ""])
    notebook = st.sampled_from([*[good["notebook"]] * 4, "99", "", None])
    parameters = st.one_of(
        st.just(good["parameters"]), st.dictionaries(keys, values, max_size=2), words
    )
    grid = {"notebook": data.draw(notebook), "parameters": data.draw(parameters)}
    content = yaml.safe_dump(grid).encode(data.draw(encodings), errors="replace")
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(1, len(content))))
    path = tmp_path / "grid.yml"
    path.write_bytes(content[:cut])
    judge("sweep", ["sweep", "list", path], tmp_path, ["grid.yml", "parameter"], capsys)


# --- devkits -------------------------------------------------------------------------------------

JSON = {
    "images": [{"id": 1, "file_name": "COCO_1.jpg", "height": 16, "width": 20}],
    "annotations": [
        {"id": 5, "image_id": 1, "category_id": 2, "area": 16, "segmentation": [[2, 2, 9, 2, 9, 9]]}
    ],
    "categories": [{"id": i + 1, "name": name} for i, name in enumerate(COCO_CLASSES)],
}
odd = st.sampled_from([None, -1, 0, 1e9, "x", "../x", [], {}, [[]], [[1, 2]], [[1, 2, 3, 4]], True])


@st.composite
def instances(draw) -> bytes:
    """COCO's JSON with a value exchanged or a key removed, or cut."""
    content = json.loads(json.dumps(JSON))
    kind = draw(st.sampled_from(["images", "annotations", "categories"]))
    place = content[kind][0]
    key = draw(st.sampled_from([*place, kind, "a key of no meaning"]))
    target = content if key == kind else place
    if draw(st.booleans()):
        target[key] = draw(odd)
    else:
        target.pop(key, None)
    text = json.dumps(content).encode()
    return text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text


@several
@given(content=instances())
def test_coco(content, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(doctor.EXPECTED, "COCO 2014", {"train": 1, "val": 1})
    folder = tmp_path / "coco"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "annotations").mkdir(parents=True)
    for place, text in (("train2014", json.dumps(JSON).encode()), ("val2014", content)):
        (folder / place).mkdir()
        Image.new("RGB", (20, 16)).save(folder / place / "COCO_1.jpg")
        (folder / "annotations" / f"instances_{place}.json").write_bytes(text)
    judge("download coco", ["download", "coco", "--archive", folder], folder, ["val2014"], capsys)


VOC = ("2007_1", "2007_2", "2007_3")


@several
@given(data=st.data())
def test_voc_and_sbd(data, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(doctor.EXPECTED, "VOC 2012", {"train": 1, "val": 1})
    kit, sbd = tmp_path / "kit", tmp_path / "sbd"
    for folder in (kit, sbd):
        shutil.rmtree(folder, ignore_errors=True)
    for place in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (kit / place).mkdir(parents=True)
    (sbd / "cls").mkdir(parents=True)
    for name in VOC:
        Image.new("RGB", (20, 16)).save(kit / f"JPEGImages/{name}.jpg")
        text = "<annotation><object><name>dog</name></object></annotation>"
        (kit / f"Annotations/{name}.xml").write_text(text)
        mask = {"GTcls": {"Segmentation": np.full((16, 20), 12, np.uint8)}}
        savemat(sbd / f"cls/{name}.mat", mask, do_compression=True)
    for folder, split, names in ((kit / "ImageSets/Segmentation", "train", VOC[:1]),
                                 (kit / "ImageSets/Segmentation", "val", VOC[1:2]),
                                 (sbd, "train", VOC[2:]), (sbd, "val", VOC[1:2])):  # fmt: skip
        (folder / f"{split}.txt").write_text("\n".join(names))
    files = ("kit/Annotations/2007_1.xml", "sbd/cls/2007_3.mat", "sbd/train.txt",
             "kit/ImageSets/Segmentation/train.txt", "kit/JPEGImages/2007_2.jpg")  # fmt: skip
    _, do, name = data.draw(st.sampled_from(files).flatmap(lambda path: damage(path)))
    do(tmp_path)
    told = [name, Path(name).stem]
    judge("download voc", ["download", "voc", "--archive", kit], tmp_path, told, capsys)
    if (kit / "labels.csv").exists():
        assert len((kit / "labels.csv").read_text().splitlines()) > 1  # never an empty one
        arguments = ["sbd", "--to", kit, "--archive", sbd]
        judge("download sbd", ["download", *arguments], tmp_path, told, capsys)
