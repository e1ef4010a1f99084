"""View a finished run: watched pictures over time, curves, IoU of classes, and errors."""

from functools import cached_property
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Integer, UInt8

from weclip_lib.data.datasets import MaskedImages
from weclip_lib.evaluation.errors import KINDS, PictureErrors, errors, picture_errors
from weclip_lib.explore.widgets import NAMED, ROW, WIDE, Explorer, GridPicture
from weclip_lib.figures import panels
from weclip_lib.figures.plotting import Figure, colours, contact_sheet, curve_picture
from weclip_lib.labels import IGNORE_INDEX
from weclip_lib.ops.metrics import confusion_matrix, scores
from weclip_lib.training.watch import read_run

THUMBNAIL = 96  # pixels
WRONG = np.array([213, 94, 0], np.uint8)  # vermilion, on grey


class TrainingViewer(Explorer):
    """Shows pseudo labels and predictions of fixed pictures over a run, the worst first.

    Args:
        folder: Of a run that watched pictures.
        dataset: Holds the watched pictures at the same size, with masks.

    Raises:
        ValueError: If nothing was watched, or the data set lacks a picture.
    """

    def __init__(self, folder: Path, dataset: MaskedImages) -> None:
        super().__init__(
            {
                "picture": "picture",
                "pseudo_label": "pseudo label",
                "prediction": "prediction",
                "truth": "truth",
                "wrong": "what is wrong",
            }
        )
        self.folder, self.dataset, self.run = folder, dataset, read_run(folder)
        self.classes = ("background", *self.run.classes)
        self.table = colours(len(self.classes))
        places = {name: row for row, name in enumerate(dataset.names)}
        missing = [name for name in self.run.names if name not in places]
        if missing:
            raise ValueError(
                f"split {dataset.split} has no picture {missing[0]}, which the run watched: "
                f"give its split, {self.run.split}"
            )
        rows = [places[name] for name in self.run.names]
        self.pixels = {
            name: dataset.image(row) for name, row in zip(self.run.names, rows, strict=True)
        }
        self.masks = {
            name: dataset.mask(row) for name, row in zip(self.run.names, rows, strict=True)
        }
        self.step = widgets.SelectionSlider(
            options=self.run.steps, value=self.run.steps[-1], description="training step",
            style=NAMED, layout=WIDE,
        )  # fmt: skip
        self.order = widgets.Dropdown(
            options=[("lowest mIoU first", ""), *((f"most {kind}", kind) for kind in KINDS)],
            description="order", style=NAMED, layout=WIDE,
        )  # fmt: skip
        self.choice = GridPicture(label="watched pictures, the worst first")
        self.bars, self.about = widgets.HTML(), widgets.HTML()
        self.curves = widgets.Image(format="png", value=curve_picture(self.curve()))
        self.worst: list[str] = []
        shown = widgets.HBox(list(self.panels.values()), layout=ROW)
        heading = widgets.HTML("<b>IoU of each class, percent, over the watched pictures</b>")
        controls = widgets.VBox([self.step, self.order, self.about])
        self.children = [
            controls, self.choice, self.message, shown, heading, self.bars, self.curves,
        ]  # fmt: skip
        self._follow(self.step, self.order, self.choice)
        self._refresh()

    def labels(self, kind: str, step: int) -> dict[str, np.ndarray]:
        """Return label maps by picture; `kind` is `pseudo_label` or `prediction`."""
        every = self.run.pseudo_labels if kind == "pseudo_label" else self.run.predictions
        maps = every[self.run.steps.index(step)].numpy()
        return dict(zip(self.run.names, maps, strict=True))

    def scores(self, kind: str, step: int) -> tuple[float, list[float]]:
        """Return mIoU of all watched pictures, and IoU of every class, in percent."""
        count = len(self.classes)
        table = sum(
            confusion_matrix(torch.from_numpy(label), torch.from_numpy(self.masks[name]), count)
            for name, label in self.labels(kind, step).items()
        )
        found = scores(table)
        return found.miou, found.class_iou.tolist()

    def curve(self) -> pd.DataFrame:
        """Return the run's curve, with mIoU of watched pictures."""
        rows = [
            (step, f"mIoU of {name}, %", self.scores(kind, step)[0])
            for kind, name in (("pseudo_label", "pseudo labels"), ("prediction", "predictions"))
            for step in self.run.steps
        ]
        watched = pd.DataFrame(rows, columns=["iteration", "metric", "value"])
        parts = [part for part in (self.run.curve, watched) if len(part)]
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def _all_errors(self) -> list[PictureErrors]:
        """Errors at the last step; the worst picture is first."""
        found = self.labels("prediction", self.run.steps[-1])
        masks = [self.masks[name] for name in found]
        return picture_errors(list(found.values()), masks, list(found), len(self.classes))

    def ranked(self, kind: str = "") -> list[PictureErrors]:
        """Rank pictures at the last step by mIoU, or by errors of a kind."""
        rows = self._all_errors
        return sorted(rows, key=lambda row: -row.share[kind]) if kind else rows

    def _marked(self, name: str, where: Bool[np.ndarray, "_ _"]) -> UInt8[np.ndarray, "_ _ 3"]:
        """Draw a watched picture in grey, and some pixels in the colour of errors."""
        grey = self.pixels[name].mean(axis=2, keepdims=True).repeat(3, axis=2).astype(np.uint8)
        grey[where] = WRONG
        return panels.scaled(grey, smooth=False)

    def _named(self, label: Integer[np.ndarray, "_ _"]) -> str:
        """Name the classes of a label map, without background."""
        present = [i for i in np.unique(label) if i not in (0, IGNORE_INDEX)]
        return ", ".join(self.classes[i] for i in present) or "background alone"

    def _draw(self) -> list[str]:
        ordered = [row.name for row in self.ranked(self.order.value)]
        if ordered != self.worst:
            self.worst = ordered
            sheet = panels.sheet([self.pixels[name] for name in ordered], THUMBNAIL, 10)
            with self._holding():
                self.choice.width = THUMBNAIL * sheet[2]
                self.choice.show(*sheet, len(ordered))
                self.choice.cell = 0
        name, step = self.worst[self.choice.cell], self.step.value
        pixels, mask = self.pixels[name], self.masks[name]
        label, said = (self.labels(kind, step)[name] for kind in ("pseudo_label", "prediction"))
        count = len(self.classes)
        (own,), (taught,) = (picture_errors([f], [mask], [name], count) for f in (said, label))
        self.panels["picture"].show(panels.scaled(pixels), f"{name}: {self._named(mask)}")
        shown = panels.label_map(label, self.table, pixels)
        self.panels["pseudo_label"].show(shown, f"{self._named(label)}; mIoU {taught.miou:.1f} %")
        shown = panels.label_map(said, self.table, pixels)
        self.panels["prediction"].show(shown, f"{self._named(said)}; mIoU {own.miou:.1f} %")
        self.panels["truth"].show(panels.label_map(mask, self.table, pixels))
        wrong = np.logical_or.reduce(list(errors(said, mask).values()))
        worst = max(own.share, key=own.share.get)
        share, total = own.share[worst], sum(own.share.values())
        text = f"{total:.1f} % of the picture; most, {share:.1f} %, is {worst}: {KINDS[worst]}"
        self.panels["wrong"].show(self._marked(name, wrong), text)
        miou, classes = self.scores("prediction", step)
        listed = [(n, v, True) for n, v in zip(self.classes, classes, strict=True) if v == v]
        self.bars.value = panels.bars(listed, limit=100)
        self.about.value = (
            f"{len(self.worst)} watched pictures of {self.run.split}: predictions {miou:.1f} %, "
            f"pseudo labels {self.scores('pseudo_label', step)[0]:.1f} % mIoU after {step} steps"
        )
        return []

    def footer(self) -> str:
        """Return scores of the step."""
        return self.about.value

    def failures(self, count: int = 4) -> Figure:
        """Draw, for every kind of error, the pictures with most of it, and where."""
        said = self.labels("prediction", self.run.steps[-1])
        shown = []
        for kind in KINDS:
            for row in self.ranked(kind)[:count]:
                where = errors(said[row.name], self.masks[row.name])[kind]
                share = f"{row.name}: {row.share[kind]:.2g} %"
                shown.append((kind, share, self._marked(row.name, where)))
        about = ";  ".join(f"{kind}: {meaning}" for kind, meaning in KINDS.items())
        return contact_sheet(shown, columns=count, footer=about)
