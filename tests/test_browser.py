"""The explorers in JupyterLab and Voila, in a real browser; what they show is held against masks.

Screenshots and the update times are left in runs/browser.
"""

import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from tests.test_explore import bad_file, encoded
from weclip_lib.data.datasets import MaskedImages, data_folder
from weclip_lib.data.profiles import get_profile
from weclip_lib.storage.provenance import ROOT

playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install -e .[browser]`")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="needs chromium: apt-get install chromium"),
]
FLAGS = tuple(
    f"--{flag}"
    for flag in (
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    )
)
SHOTS = ROOT / "runs" / "browser"
NOTEBOOK = "10_explorers"
CHANGES = 50
READY = 300_000  # milliseconds until the notebook has run


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the notebook, told to be small and to write nowhere else."""
    folder = tmp_path_factory.mktemp("browser")
    notebook = nbformat.read(ROOT / "notebooks" / f"{NOTEBOOK}.ipynb", as_version=4)
    places = {name: str(folder / name) for name in ("data_dir", "work_dir", "out_dir")}
    (folder / "data_dir").mkdir()
    told = {"profile": "smoke", "shown": 6, "steps": 20, **places}
    lines = "".join(f"{name} = {value!r}\n" for name, value in told.items())
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source += f"\n{lines}"
    nbformat.write(notebook, folder / f"{NOTEBOOK}.ipynb")
    settings = folder / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    whole = {"windowingMode": "none"}  # cells out of sight stay in the page
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps(whole))
    return folder


@pytest.fixture
def served(place, request):
    """Address of a server on the notebook: `lab` or `voila`."""
    kind = request.param
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    token = secrets.token_hex(16)
    environment = {
        **os.environ,
        "HOME": str(place),
        "JUPYTER_CONFIG_DIR": str(place / "config"),
        "JUPYTER_DATA_DIR": str(place / "share"),
        "JUPYTERLAB_SETTINGS_DIR": str(place / "settings"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    common = [sys.executable, "-m"]
    commands = {
        "lab": [
            *common, "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}",
            "--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={token}",
            f"--ServerApp.root_dir={place}", "--expose-app-in-browser", "--LabApp.news_url=None",
        ],
        "voila": [
            *common, "voila", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1",
            "--progressive_rendering=True", str(place / f"{NOTEBOOK}.ipynb"),
        ],
    }  # fmt: skip
    SHOTS.mkdir(parents=True, exist_ok=True)
    with (SHOTS / f"{kind}.log").open("w") as log:
        server = subprocess.Popen(
            commands[kind], env=environment, cwd=place, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            for _ in range(600):
                with socket.socket() as tried:
                    if tried.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            path = f"lab/tree/{NOTEBOOK}.ipynb?token={token}" if kind == "lab" else ""
            yield kind, f"http://127.0.0.1:{port}/{path}"
        finally:
            server.terminate()
            server.wait(30)


class Page:
    """An explorer's page, as somebody uses it."""

    def __init__(self, page) -> None:
        self.page = page

    def panel(self, title: str):
        """The panel of that name, of the first explorer that has one."""
        named = f"./div[contains(@class, 'widget-html')]//b[text()='{title}']"
        return self.page.locator(f"xpath=//div[contains(@class, 'widget-vbox')][{named}]").first

    def picture(self, title: str) -> np.ndarray:
        """What the panel shows, as pixels."""
        image = self.panel(title).locator("img").first
        data = image.evaluate(
            "async (img) => Array.from(new Uint8Array(await (await fetch(img.src)).arrayBuffer()))"
        )
        return np.array(Image.open(BytesIO(bytes(data))).convert("RGB"))

    def source(self, title: str) -> str:
        return self.panel(title).locator("img").first.get_attribute("src")

    def caption(self, title: str) -> str:
        return self.panel(title).locator(".weclip-caption").inner_text()

    def until(self, condition, what: str, seconds: float = 20) -> None:
        """Wait for something to become true."""
        end = time.perf_counter() + seconds
        while not condition():
            assert time.perf_counter() < end, f"{what}: not within {seconds} s"
            self.page.wait_for_timeout(5)

    def slider(self, name: str):
        row = self.page.locator(".widget-hslider", has_text=name).first
        return row.locator(".noUi-handle")

    def words(self):
        return self.page.locator("input[placeholder='boat; cat']").first

    def upload(self, name: str, content: bytes) -> None:
        with self.page.expect_file_chooser() as asked:
            self.page.locator("button", has_text="your own picture").first.click()
        file = {"name": name, "mimeType": "application/octet-stream", "buffer": content}
        asked.value.set_files(file)

    def where(self) -> str:
        """The chosen patch, in words."""
        grid = "//div[starts-with(@aria-label, 'patches')]"
        box = f"{grid}/ancestor::div[contains(@class, 'widget-vbox')][1]"
        return self.page.locator(f"xpath={box}").locator(".weclip-caption").inner_text()

    def message(self) -> str:
        """What the first explorer has to say; nothing, if all is well."""
        said = "() => document.querySelector('.weclip-message')?.innerText ?? ''"
        return self.page.evaluate(said)


def get_ready(kind: str, page) -> None:
    """Run the notebook, wait for its last cell."""
    if kind == "lab":
        page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.content?.widgets")
        page.wait_for_timeout(3000)
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function("() => document.body.innerText.includes('device cpu')", timeout=READY)
    page.locator(".weclip-grid").nth(3).wait_for(timeout=READY)
    page.wait_for_timeout(1000)


@pytest.mark.parametrize("served", ["lab", "voila"], indirect=True)
def test_explorers(served, browser, place) -> None:
    kind, address = served
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(60_000)
    page.goto(address)
    get_ready(kind, page)
    seen = Page(page)
    setting = get_profile("smoke")
    dataset = MaskedImages(data_folder(setting, str(place / "data_dir")), "val", setting.labels)

    # A slider, by keyboard: what comes after it changes, what comes before does not.
    before = {name: seen.source(name) for name in ("initial CAM", "after PAR")}
    handle = seen.slider("steps of spreading")
    handle.focus()
    page.keyboard.press("ArrowRight")
    seen.until(lambda: seen.source("after PAR") != before["after PAR"], "PAR follows the slider")
    assert seen.source("initial CAM") == before["initial CAM"]
    page.keyboard.press("ArrowLeft")

    # A typed class: its CAM peaks inside its mask.
    name, tags = seen.caption("picture").split(", tags: ")
    row = dataset.names.index(name)
    mask = dataset.mask(row)
    for word in tags.split(", "):
        seen.words().fill(word)
        page.keyboard.press("Enter")
        seen.until(lambda w=word: seen.caption("initial CAM").startswith(f"{w}:"), f"CAM of {word}")
        heat = seen.picture("initial CAM").astype(int)
        hot = heat[..., 0] - heat[..., 2] // 4  # magma: the hottest is the reddest
        y, x = np.unravel_index(hot.argmax(), hot.shape)
        y, x = (int(v * 160 / 208) for v in (y, x))
        around = mask[max(0, y - 8) : y + 9, max(0, x - 8) : x + 9]
        assert (around == 1 + setting.labels.classes.index(word)).any(), (name, word, y, x)
    page.screenshot(path=SHOTS / f"{kind}_cam.png")

    # What cannot be right is said in the page, and the page goes on.
    for typed, said in (("", "empty"), ("🚀", "meaningless"), ("boat " * 40, "shorten it")):
        seen.words().fill(typed)
        page.keyboard.press("Enter")
        seen.until(lambda s=said: s in seen.message(), f"message for {typed[:10]!r}")
    page.screenshot(path=SHOTS / f"{kind}_message.png")
    for file in ("notes.txt", "vast.png"):
        seen.upload(file, bad_file(file))
        seen.until(lambda f=file: f in seen.message(), f"message for {file}")
    seen.words().fill(tags)
    page.keyboard.press("Enter")
    seen.until(lambda: not seen.message(), "the page goes on")
    photo = encoded(Image.fromarray(dataset.image(0)).resize((300, 200)), "JPEG")
    seen.upload("photo.jpg", photo)
    seen.until(lambda: "photo.jpg" in seen.caption("picture"), "the uploaded picture is shown")
    assert seen.picture("picture").shape == (135, 208, 3)

    # A patch, clicked and then moved by an arrow key.
    patches = page.locator(".weclip-grid[aria-label^=patches]").first
    box = patches.bounding_box()
    before = seen.source("affinity of the decoder")
    patches.click(position={"x": 0.27 * box["width"], "y": 0.77 * box["height"]})
    seen.until(lambda: seen.where() == "row 16, column 6", "the clicked patch")
    seen.until(lambda: seen.source("affinity of the decoder") != before, "its row")
    page.keyboard.press("ArrowRight")
    seen.until(lambda: seen.where() == "row 16, column 7", "the next patch")
    patches.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / f"{kind}_affinity.png")

    # The training viewer's step.
    before = seen.source("what is wrong")
    handle = page.locator(".widget-hslider, .widget-inline-hbox", has_text="training step").last
    handle.locator(".noUi-handle").focus()
    page.keyboard.press("Home")
    seen.until(lambda: seen.source("what is wrong") != before, "the first step")
    handle.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / f"{kind}_training.png")

    # From the key to the finished picture in the page.
    handle = seen.slider("PAR iterations")
    handle.focus()
    times = []
    for number in range(CHANGES):
        before, began = seen.source("after PAR"), time.perf_counter()
        page.keyboard.press("ArrowLeft" if number < CHANGES // 3 else "ArrowRight")
        seen.until(lambda b=before: seen.source("after PAR") != b, "PAR follows its slider")
        times.append(1000 * (time.perf_counter() - began))
    about = {"median_ms": statistics.median(times), "worst_ms": max(times), "changes": CHANGES}
    (SHOTS / f"{kind}_latency.json").write_text(json.dumps(about))
    sys.stdout.write(f"{kind}: {about}\n")
    assert about["median_ms"] < 1000  # far above what is measured; catches a page that hangs
    assert errors == []
    page.close()


def test_the_site_reads_offline(browser, whole_site) -> None:
    page = browser.new_page()
    asked, broken = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("requestfailed", lambda request: broken.append(request.url))
    for path in sorted(whole_site.rglob("*.html")):
        page.goto(path.as_uri())
        lost = "() => [...document.images].filter((i) => !i.naturalWidth).map((i) => i.src)"
        assert page.evaluate(lost) == [], path
        flat = "() => [...document.querySelectorAll('math')].filter((m) => !m.clientWidth).length"
        assert page.evaluate(flat) == 0, path
    assert broken == [] and not [url for url in asked if url.startswith("http")]
    page.goto((whole_site / "02_decoder_training.html").as_uri())
    page.screenshot(path=SHOTS / "site.png")
    page.close()
