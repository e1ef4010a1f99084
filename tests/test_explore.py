"""The explorers without a browser: what a moved control does to the panels and the message."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.test_stages import METHOD, drawn
from weclip_lib.backbone import load_backbone
from weclip_lib.decoder import Decoder
from weclip_lib.explore.affinities import Affinities
from weclip_lib.explore.explorers import AffinityExplorer, CamExplorer
from weclip_lib.explore.stages import Pipeline
from weclip_lib.figures.plotting import close
from weclip_lib.labels import MINIVOC, MINIVOC_1
from weclip_lib.world.settings import WORLD_1

FILES = {
    "notes.txt": (b"no picture at all", "notes.txt cannot be read"),
    "cut.jpg": (None, "cut.jpg cannot be read"),
    "range.tif": (None, "range.tif holds numbers without a known range"),
    "vast.png": (None, "vast.png has far too many pixels: shrink it below 40 megapixels"),
    "large.png": (None, "large.png has 9000x5000 pixels: shrink it below 40 megapixels"),
}


def encoded(image: Image.Image, kind: str) -> bytes:
    file = BytesIO()
    image.save(file, format=kind)
    return file.getvalue()


def bad_file(name: str) -> bytes:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8))
    made = {
        "notes.txt": lambda: FILES["notes.txt"][0],
        "cut.jpg": lambda: encoded(noise, "JPEG")[:2000],
        "range.tif": lambda: encoded(noise.convert("F"), "TIFF"),
        "vast.png": lambda: encoded(Image.new("L", (20_000, 20_000)), "PNG"),
        "large.png": lambda: encoded(Image.new("L", (9000, 5000)), "PNG"),
    }
    return made[name]()


def send(explorer, name: str, content: bytes) -> None:
    sent = {"name": name, "type": "", "size": len(content), "content": memoryview(content)}
    explorer._add({"new": (sent,)})


@pytest.fixture(scope="module")
def pictures():
    found = [drawn(index) for index in range(40)]
    return [one for one in found if len(one.tags) == 2][:3]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(load_backbone("MiniCLIP", "miniclip-v2"), MINIVOC)


@pytest.fixture
def cams(pipeline, pictures) -> CamExplorer:
    return CamExplorer(pipeline, METHOD, pictures)


@pytest.fixture
def ties(pipeline, pictures) -> AffinityExplorer:
    decoder = Decoder(width=128, class_count=21, block_count=11, dim=32, layers=1).eval()
    decoders = {"step 1": decoder, "step 2": decoder}
    return AffinityExplorer(Affinities(pipeline, METHOD, decoders), pictures)


def shown(explorer) -> dict[str, bytes]:
    return {name: panel.picture.value for name, panel in explorer.panels.items()}


def changed(explorer, control, value) -> set[str]:
    """Names of the panels that a change of one control changes."""
    before = shown(explorer)
    control.value = value
    after = shown(explorer)
    return {name for name in after if after[name] != before[name]}


def test_it_starts_with_the_published_settings(cams, pictures) -> None:
    assert cams.message.value == ""
    assert cams.words.value == "; ".join(pictures[0].tags)
    chosen = cams.settings()
    assert chosen.backgrounds == MINIVOC.backgrounds
    assert (chosen.block, chosen.maps, chosen.rounds, chosen.par_iterations) == (11, 8, 3, 20)


def test_a_control_changes_what_comes_after_it(cams) -> None:
    assert changed(cams, cams.par_iterations, 2) == {"par", "label"}
    assert changed(cams, cams.steps, 0) >= {"refined", "par"}
    assert changed(cams, cams.block, 8) >= {"cam"}
    cams.block.value = 11
    assert changed(cams, cams.with_backgrounds, False) >= {"cam"}
    cams.reset.click()
    assert cams.settings().steps == 2 and cams.with_backgrounds.value


def test_the_cam_of_a_typed_class_peaks_inside_its_mask() -> None:
    """In the first world, whose MiniCLIP has trained patches: any peak elsewhere is an error."""
    found = [drawn(index, WORLD_1) for index in range(40)]
    pictures = [one for one in found if len(one.tags) == 2][:3]
    first = Pipeline(load_backbone("MiniCLIP", "miniclip-v1"), MINIVOC_1)
    cams = CamExplorer(first, METHOD, pictures)
    for number, one in enumerate(pictures):
        cams.gallery.choice.cell = number
        for word in one.tags:
            cams.words.value = word
            cam = cams.stages.cam[0]
            y, x = divmod(int(cam.argmax()), cam.shape[1])
            patch = one.mask[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            inside = patch == 1 + MINIVOC_1.classes.index(word)
            assert inside.any(), (one.name, word)


def test_a_word_that_is_switched_off_leaves_the_label(cams, pictures) -> None:
    first, second = pictures[0].tags
    assert [button.description for button in cams.present.children] == [first, second]
    cams.present.children[0].value = False
    assert cams.settings().words == (second,) and cams.shown.value == second
    assert int(cams.stages.label.max()) <= 1
    cams.present.children[1].value = False
    assert "the class name is empty" in cams.message.value
    cams.present.children[0].value = True
    assert cams.message.value == ""


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("", "the class name is empty"),
        ("🚀", "never trained on &#x27;🚀&#x27;"),
        ("boat " * 40, "this backbone reads 30: shorten it"),
        ("<b>cat</b>", "&lt;b&gt;cat"),
    ],
)
def test_what_is_typed_wrongly_is_said_in_the_page_and_the_page_goes_on(cams, typed, said) -> None:
    kept = cams.words.value
    cams.words.value = typed
    assert said in cams.message.value
    cams.words.value = kept
    assert cams.message.value == ""


def test_a_class_that_the_picture_lacks_is_named(cams, pictures) -> None:
    absent = next(name for name in MINIVOC.classes if name not in pictures[0].tags)
    cams.words.value = absent
    assert f"do not name &#x27;{absent}&#x27;" in cams.message.value
    assert "error" not in cams.message.value


@pytest.mark.parametrize("name", FILES)
def test_a_bad_upload_is_said_in_the_page(cams, name) -> None:
    before, count = shown(cams), len(cams.gallery.pictures)
    send(cams, name, bad_file(name))
    assert FILES[name][1] in cams.message.value and "error" in cams.message.value
    assert shown(cams) == before and len(cams.gallery.pictures) == count
    cams.par_iterations.value = 1
    assert cams.message.value == ""


@pytest.mark.parametrize("explorer", ["cams", "ties"])
def test_an_upload_is_chosen(explorer, request) -> None:
    explorer = request.getfixturevalue(explorer)
    photo = Image.fromarray(drawn(0).pixels).resize((300, 200))
    send(explorer, "photo.jpg", encoded(photo, "JPEG"))
    assert explorer.gallery.chosen.name == "photo.jpg"
    assert explorer.gallery.chosen.pixels.shape == (104, 160, 3)
    assert explorer.message.value == ""


def test_an_error_of_ours_is_shown_too(cams, monkeypatch) -> None:
    def broken(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(cams.pipeline, "show", broken)
    cams.steps.value = 1
    assert "RuntimeError: out of luck" in cams.message.value


def test_a_patch_and_a_head_change_the_rows(ties) -> None:
    assert ties.message.value == ""
    before = shown(ties)
    ties.patch.cell = 21
    assert all(value != before[name] for name, value in shown(ties).items())
    assert ties.panels["patch"].text == "row 2, column 2"
    assert changed(ties, ties.head, 3) == {"head"}
    assert changed(ties, ties.block, 2) == {"head"}
    assert "✓" in ties.bars.value
    ties.gallery.choice.cell = 1
    assert ties.patch.cell == 210 and ties.message.value == ""


@pytest.mark.parametrize("explorer", ["cams", "ties"])
def test_a_static_twin_goes_along(explorer, request) -> None:
    explorer = request.getfixturevalue(explorer)
    figure = explorer.figure()
    titles = " ".join(axis.get_title() for axis in figure.axes)
    assert all(panel.title in titles for panel in explorer.panels.values())
    assert all(axis.images for axis in figure.axes[: len(explorer.panels)])
    close(figure)
    bundle = explorer._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(bundle)
