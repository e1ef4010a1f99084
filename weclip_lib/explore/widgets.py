"""Parts of the explorers: a picture to click on, panels, and a page that shows errors."""

import base64
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets

from weclip_lib.explore.stages import Picture, Pipeline
from weclip_lib.figures.panels import RGB, as_png, sheet
from weclip_lib.figures.plotting import Figure, contact_sheet, figure_png
from weclip_lib.storage.pictures import fitted, read_upload

HERE = Path(__file__).parent
THUMBNAIL = 72  # pixels
NAMED = {"description_width": "150px"}
WIDE = widgets.Layout(width="460px")
ROW = widgets.Layout(flex_flow="row wrap", align_items="flex-start")


class GridPicture(anywidget.AnyWidget):
    """A picture cut into cells; a click or the arrow keys choose one."""

    _esm = HERE / "grid_picture.js"
    _css = HERE / "explore.css"
    png = traitlets.Bytes().tag(sync=True)
    rows = traitlets.Int(1).tag(sync=True)
    columns = traitlets.Int(1).tag(sync=True)
    cells = traitlets.Int(1).tag(sync=True)  # first ones of rows * columns, which can be chosen
    cell = traitlets.Int(0).tag(sync=True)
    width = traitlets.Int(400).tag(sync=True)  # on the page, in pixels
    label = traitlets.Unicode().tag(sync=True)  # for those who cannot see it

    def __repr__(self) -> str:
        return f"GridPicture({self.rows} x {self.columns})"  # without a memory address

    def show(self, picture: RGB, rows: int, columns: int, cells: int = 0) -> None:
        """Show another picture; the chosen cell stays if it still exists."""
        cells = cells or rows * columns
        with self.hold_sync():
            self.png = as_png(picture)
            self.rows, self.columns, self.cells = rows, columns, cells
            self.cell = min(self.cell, cells - 1)


class Panel(widgets.VBox):
    """A picture with its name above and a line below."""

    def __init__(self, title: str) -> None:
        self.picture = widgets.Image(format="png", layout=widgets.Layout(object_fit="contain"))
        self.caption = widgets.HTML()
        self.title, self.shown, self.text = title, np.zeros((1, 1, 3), np.uint8), ""
        super().__init__(
            [widgets.HTML(f"<b>{escape(title)}</b>"), self.picture, self.caption],
            layout=widgets.Layout(margin="0 10px 8px 0"),
        )

    def show(self, picture: RGB, text: str = "") -> None:
        """Show another picture and line."""
        self.shown, self.text = picture, text
        self.picture.value = as_png(picture)
        self.caption.value = f'<div class="weclip-caption">{escape(text)}</div>'
        self.layout.display = None

    def hide(self) -> None:
        """Hide the panel until it is shown again."""
        self.layout.display = "none"


class Explorer(widgets.VBox):
    """Controls and panels; errors appear in the page, which keeps working.

    A notebook also keeps its static twin (`figure`), so that a page without a kernel shows the
    same pictures.

    Attributes:
        seconds: Times of the last changes, from the control to the panels.
    """

    def __init__(self, panels: dict[str, str]) -> None:
        self.panels = {name: Panel(title) for name, title in panels.items()}
        self.message = widgets.HTML()
        self.seconds: deque[float] = deque(maxlen=1000)
        self._held = False
        super().__init__()

    def _draw(self) -> list[str]:
        """Update the panels; return remarks."""
        raise NotImplementedError

    def _say(self, lines: list[str], kind: str = "") -> None:
        text = "<br>".join(escape(line) for line in lines)
        shown = f'<div class="weclip-message {kind}" role="status">{text}</div>' if lines else ""
        self.message.value = shown

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Change several controls without a refresh between."""
        held, self._held = self._held, True
        try:
            yield
        finally:
            self._held = held

    def _refresh(self, _change: object = None) -> None:
        if self._held:
            return
        began = time.perf_counter()
        try:
            self._say(self._draw())
        except Exception as error:  # else only a log has the callback's traceback
            known = isinstance(error, ValueError)
            self._say([str(error) if known else f"{type(error).__name__}: {error}"], "error")
        self.seconds.append(time.perf_counter() - began)

    def _follow(self, *controls: widgets.Widget) -> None:
        """Refresh when the value of a control changes."""
        for control in controls:
            control.observe(self._refresh, "cell" if isinstance(control, GridPicture) else "value")

    def footer(self) -> str:
        """Return the text below the static twin."""
        return ""

    def figure(self) -> Figure:
        """Draw the current panels and their lines as a figure."""
        shown = [panel for panel in self.panels.values() if panel.layout.display != "none"]
        pictures = [(panel.title, panel.text, panel.shown) for panel in shown]
        return contact_sheet(pictures, footer=self.footer())

    def _repr_mimebundle_(self, **kwargs: object) -> dict[str, str]:
        """Return the live page, and its static twin for other viewers."""
        bundle = super()._repr_mimebundle_(**kwargs)
        return {**bundle, "image/png": base64.b64encode(figure_png(self.figure(), 100)).decode()}


class Gallery(widgets.VBox):
    """Thumbnails to choose from, and a button to add one's own picture.

    Args:
        side: Pixels that an added picture's longer side is scaled to.
        patch: Pixels of a patch.
    """

    def __init__(self, pictures: Sequence[Picture], side: int, patch: int) -> None:
        self.pictures, self.side, self.patch = list(pictures), side, patch
        self.choice = GridPicture(label="pictures to choose from")
        self.upload = widgets.FileUpload(
            description="your own picture", multiple=False, layout=widgets.Layout(width="240px")
        )
        self._show()
        super().__init__([self.choice, self.upload])

    @property
    def chosen(self) -> Picture:
        return self.pictures[self.choice.cell]

    def _show(self) -> None:
        whole, rows, columns = sheet([shown.pixels for shown in self.pictures], THUMBNAIL, 10)
        self.choice.width = THUMBNAIL * columns
        self.choice.show(whole, rows, columns, len(self.pictures))

    def add(self, name: str, content: bytes) -> None:
        """Add a picture and choose it.

        Raises:
            ValueError: If it is no picture, or too large.
        """
        pixels = fitted(read_upload(name, content), self.side, self.patch)
        self.pictures.append(Picture(name, pixels))
        self._show()
        self.choice.cell = len(self.pictures) - 1


class PictureExplorer(Explorer):
    """An explorer of one picture, from a gallery or one's own."""

    def __init__(
        self, shown: dict[str, str], pipeline: Pipeline, pictures: Sequence[Picture]
    ) -> None:
        super().__init__(shown)
        self.pipeline = pipeline
        side = max(pictures[0].pixels.shape[:2])
        self.gallery = Gallery(pictures, side, pipeline.backbone.patch_size)
        self.gallery.choice.observe(self._choose, "cell")
        self.gallery.upload.observe(self._add, "value")

    def _choose(self, _change: object = None) -> None:
        """Go to the chosen picture."""
        raise NotImplementedError

    def _add(self, change: dict) -> None:
        for sent in change["new"]:
            try:
                self.gallery.add(sent["name"], bytes(sent["content"]))
            except ValueError as error:
                self._say([str(error)], "error")
