"""Draw pictures, label maps, heat maps, curves and bars. Only this module uses matplotlib."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from textwrap import wrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Integer, UInt8
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib.ticker import LogLocator, StrMethodFormatter
from torch import Tensor

from weclip_lib.labels import IGNORE_INDEX, LabelSet

TILE = 1.7  # inches a picture
LEGEND_COLUMNS = 7
HEAT = "magma"  # colours of maps in [0, 1]
# Background is black. People with common colour blindness tell these twelve hues apart best.
PALETTE = np.array(
    [
        (0, 0, 0),
        (230, 159, 0),
        (86, 180, 233),
        (0, 158, 115),
        (240, 228, 66),
        (0, 114, 178),
        (213, 94, 0),
        (204, 121, 167),
        (148, 103, 189),
        (140, 86, 75),
        (127, 127, 127),
        (188, 189, 34),
        (23, 190, 207),
    ]
)


def colours(class_count: int) -> np.ndarray:
    """Return RGB in 0-255 for every class_id; IGNORE_INDEX is white.

    From the thirteenth class on, the hues come again, darker; from the 25th on, lighter; and so on.
    """
    table = np.full((256, 3), 255, np.uint8)
    hues = PALETTE[1:]
    shades = np.concatenate([PALETTE[:1], hues, 0.55 * hues, 0.5 * hues + 120])
    table[:class_count] = shades[np.r_[0, 1 + np.arange(class_count - 1) % (len(shades) - 1)]]
    table[IGNORE_INDEX] = 255
    return table


@cache
def heat_colours() -> np.ndarray:
    """Return RGB in 0-255 for 256 levels, cold to hot; they also differ in grey."""
    return (plt.get_cmap(HEAT)(np.arange(256))[:, :3] * 255).astype(np.uint8)


def as_array(values: np.ndarray | Tensor) -> np.ndarray:
    """Return values of any device as an array."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def label_image(label: np.ndarray | Tensor, labels: LabelSet) -> np.ndarray:
    """Convert a label map to RGB."""
    return colours(labels.class_count)[as_array(label)]


def overlay(
    picture: UInt8[np.ndarray, "height width 3"],
    label: Integer[np.ndarray, "height width"],
    table: UInt8[np.ndarray, "256 3"],
    *,
    weight: int = 1,
) -> UInt8[np.ndarray, "height width 3"]:
    """Colour the classes in a picture; background stays as it is.

    Args:
        table: Colour of every class id.
        weight: Weight of the colour; the picture has 1.
    """
    mixed = (picture.astype(np.uint16) + weight * table[label].astype(np.uint16)) // (1 + weight)
    return np.where((label > 0)[..., None], mixed, picture).astype(np.uint8)


def image_grid(
    rows: Sequence[Sequence[np.ndarray | Tensor]],
    *,
    titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    labels: LabelSet | None = None,
) -> Figure:
    """Draw rows of pictures: RGB as they are, two-dimensional floats as heat maps in [0, 1].

    Args:
        titles: Over the columns.
        row_titles: Left of the rows.
        labels: Adds a legend of the class colours.
    """
    height, width = len(rows), max(len(row) for row in rows)
    lines = math.ceil((labels.class_count + 1) / LEGEND_COLUMNS) if labels else 0
    legend = 0.15 + 0.2 * lines  # inches
    tall = TILE * height + max(0.5, legend - 0.05)
    figure, axes = plt.subplots(height, width, figsize=(TILE * width, tall), squeeze=False)
    for row, line in zip(axes, rows, strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
        for axis, picture in zip(row, map(as_array, line), strict=False):
            if picture.ndim == 2:
                axis.imshow(picture, cmap=HEAT, vmin=0, vmax=1)
            else:
                axis.imshow(picture)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=9)
    for axis, title in zip(axes[:, 0], row_titles, strict=False):
        axis.set_ylabel(title, fontsize=9)
    if labels:
        table = colours(labels.class_count) / 255
        names = ("background", *labels.classes)
        handles = [Patch(fc=table[i], ec="0.6", label=name) for i, name in enumerate(names)]
        figure.legend(
            handles=[*handles, Patch(fc="white", ec="0.6", label="ignored")],
            loc="lower center",
            ncols=LEGEND_COLUMNS,
            fontsize=8,
            frameon=False,
        )
    figure.tight_layout(rect=(0, legend / tall if labels else 0, 1, 1))
    return figure


def mark_patches(figure: Figure, patches: Sequence[int], grid_width: int, patch_size: int) -> None:
    """Draw a cross on one patch of the first picture in each row of an `image_grid`.

    Args:
        patches: One patch number for each row.
        grid_width: Patches across a picture.
        patch_size: Pixels a side.
    """
    columns = len(figure.axes) // len(patches)
    for axis, patch in zip(figure.axes[::columns], patches, strict=True):
        y, x = (patch_size * (place + 0.5) for place in divmod(patch, grid_width))
        axis.plot(x, y, "w+", ms=12, mew=2)


def contact_sheet(
    pictures: Sequence[tuple[str, str, np.ndarray]], *, columns: int = 4, footer: str = ""
) -> Figure:
    """Draw pictures in rows, with a name above and text below each; `footer` is below them all."""
    rows = -(-len(pictures) // columns)
    lines = [line for part in footer.split("\n") for line in wrap(part, 150)]
    high = 3.0 * rows + 0.18 * (1 + len(lines))
    figure, axes = plt.subplots(rows, columns, figsize=(2.7 * columns, high), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, line, picture) in zip(axes.flat, pictures, strict=False):
        axis.imshow(picture)
        axis.set_title(name, fontsize=10)
        axis.text(
            0.5, -0.03, "\n".join(wrap(line, 42)), ha="center", va="top", fontsize=8,
            transform=axis.transAxes,
        )  # fmt: skip
    figure.text(0.5, 0.08 / high, "\n".join(lines), ha="center", va="bottom", fontsize=8)
    below = (0.5 + 0.16 * len(lines)) / high
    figure.subplots_adjust(0.01, below, 0.99, 1 - 0.3 / high, wspace=0.06, hspace=0.32)
    return figure


def close(figure: Figure) -> None:
    """Close a figure that the notebook itself does not show."""
    plt.close(figure)


def curves(history: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """Draw a panel per metric: a mean line for each variant, a thin line for each seed."""
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3), squeeze=False)
    colours = {variant: f"C{place}" for place, variant in enumerate(history["variant"].unique())}
    for axis, metric in zip(axes[0], metrics, strict=True):
        chosen = history[history["metric"] == metric]
        for variant, part in chosen.groupby("variant", sort=False):
            wide = part.pivot(index="iteration", columns="seed", values="value")
            axis.plot(wide, color=colours[variant], alpha=0.3, lw=0.8)
            axis.plot(wide.mean(axis=1), color=colours[variant], label=variant)
        axis.set(xlabel="training step", title=metric.replace("_", " "))
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def figure_png(figure: Figure, dpi: int) -> bytes:
    """Return a figure as PNG, and close it."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    close(figure)
    return file.getvalue()


def curve_picture(history: pd.DataFrame) -> bytes:
    """Draw the curves of one run as PNG: a panel for losses, one for mIoU in percent."""
    scores = history["metric"].str.contains("miou", case=False)
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8))
    for axis, title, chosen in zip(axes, ("loss", "mIoU, %"), (~scores, scores), strict=True):
        for metric, part in history[chosen].groupby("metric", sort=False):
            name = metric.replace("_", " ").removeprefix("mIoU of ").removesuffix(", %")
            axis.plot(part["iteration"], part["value"], "o-", ms=3, label=name)
        axis.set(xlabel="training step", title=title)
        if chosen.any():
            axis.legend(fontsize=8)
    figure.tight_layout()
    return figure_png(figure, 90)


def bars(summary: pd.DataFrame, *, order: Sequence[str], xlabel: str) -> Figure:
    """Draw mean and spread as one horizontal bar per variant, in `order` from the top."""
    rows = summary.set_index("variant").loc[list(order)][::-1]
    figure, axis = plt.subplots(figsize=(6.5, 0.42 * len(rows) + 0.9))
    spread = rows["spread"].fillna(0)
    axis.barh(rows.index, rows["mean"], color="C0")
    known = rows.dropna(subset="spread")  # one seed has no spread
    if len(known):
        line = {"fmt": "none", "ecolor": "0.2", "capsize": 3}
        axis.errorbar(known["mean"], known.index, xerr=known["spread"], **line)
    for position, (mean, error) in enumerate(zip(rows["mean"], spread, strict=True)):
        axis.text(mean + error + 0.6, position, f"{mean:.1f}", va="center", fontsize=8)
    axis.set(xlabel=xlabel, xlim=(0, max(rows["mean"]) * 1.12))
    figure.tight_layout()
    return figure


def strips(lengths: pd.DataFrame, *, xlabel: str) -> Figure:
    """Draw a strip per row, first row on top: its columns end to end, then their total."""
    figure, axis = plt.subplots(figsize=(9, 0.55 * len(lengths) + 1.3))
    shown = lengths[::-1]
    starts = shown.cumsum(axis=1) - shown
    for number, part in enumerate(shown):
        axis.barh(
            shown.index, shown[part], left=starts[part], color=PALETTE[1 + number] / 255, label=part
        )
    for name, total in shown.sum(axis=1).items():
        axis.text(total + 0.05, name, f"{total:.2f}", va="center", fontsize=9)
    axis.set(xlabel=xlabel, xlim=(0, shown.sum(axis=1).max() * 1.1))
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(lengths.columns), fontsize=8)
    figure.tight_layout()
    return figure


def changes(values: pd.DataFrame, *, xlabel: str) -> Figure:
    """Draw a line per column, first on top: a dot for each row (seed), a bar for the mean."""
    figure, axis = plt.subplots(figsize=(6.5, 0.42 * values.shape[1] + 0.9))
    places = np.arange(values.shape[1])[::-1]
    axis.axvline(0, color="0.6", lw=0.8)
    axis.barh(places, values.mean(), height=0.5, color="C0", alpha=0.35)
    for _, row in values.iterrows():
        axis.plot(row, places, "o", color="C0", ms=4)
    axis.set_yticks(places, values.columns)
    axis.set(xlabel=xlabel)
    figure.tight_layout()
    return figure


def matrix(
    values: np.ndarray, *, rows: Sequence[str], columns: Sequence[str], title: str
) -> Figure:
    """Draw a table of numbers in [0, 1] as colours, with the numbers."""
    size = (0.5 * len(columns) + 2, 0.32 * len(rows) + 1.2)
    figure, axis = plt.subplots(figsize=size)
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    for (row, column), value in np.ndenumerate(values):
        shade = "white" if value > 0.6 else "black"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=shade)
    axis.set_title(title, fontsize=10)
    figure.tight_layout()
    return figure


def trends(
    panels: Mapping[str, pd.DataFrame],
    *,
    ylabel: str,
    reference: tuple[str, float] | None = None,
    log: bool = False,
) -> Figure:
    """Draw a panel per swept number: a dot for each seed, a line through the means.

    Args:
        panels: Frames with columns x and value.
        reference: Name and height of a dashed line.
        log: Whether the x axis is logarithmic.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.1), squeeze=False)
    for axis, (name, points) in zip(axes[0], panels.items(), strict=True):
        axis.plot(points["x"], points["value"], "o", color="C0", ms=4, alpha=0.5)
        axis.plot(points.groupby("x")["value"].mean(), color="C0")
        if log:
            axis.set_xscale("log")
        ticks = sorted(points["x"].unique())
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axis.minorticks_off()
        axis.set(xlabel=name)
        if reference:
            axis.axhline(reference[1], color="C1", ls="--", label=reference[0])
            axis.legend(fontsize=8)
    axes[0, 0].set(ylabel=ylabel)
    figure.tight_layout()
    return figure


def growth(panels: Mapping[str, pd.DataFrame], *, ylabel: str) -> tuple[Figure, dict[str, float]]:
    """Draw a log-log panel per number that grows, and fit a power law to each line.

    Args:
        panels: Frames with columns line, x and value.

    Returns:
        The figure, and the exponent of every `panel, line`.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.3), squeeze=False)
    exponents = {}
    for axis, (name, points) in zip(axes[0], panels.items(), strict=True):
        for number, (line, part) in enumerate(points.groupby("line", sort=False)):
            x, y = (np.log(part[column].to_numpy(float)) for column in ("x", "value"))
            slope, offset = np.polyfit(x, y, 1)
            exponents[f"{name}, {line}"] = float(slope)
            axis.plot(part["x"], part["value"], "o", color=f"C{number}", ms=4)
            ends = np.array([x.min(), x.max()])
            axis.plot(
                np.exp(ends),
                np.exp(slope * ends + offset),
                color=f"C{number}",
                label=f"{line}, x^{slope:.2f}",
            )
        ticks = sorted(points["x"].unique())
        axis.set(xscale="log", yscale="log", xlabel=name)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axis.minorticks_off()
        axis.legend(fontsize=8)
    axes[0, 0].set(ylabel=ylabel)
    figure.tight_layout()
    return figure, exponents


FROZEN, TRAINED, COMPUTED = "#cfe3f5", "#f7d9b0", "#ececec"
# Box: name of its shape, colour, column, row; columns run from left to right, rows from the top.
MAP_BOXES = {
    "picture": ("images", COMPUTED, 0, 1),
    "words and\nbackground prompts": ("texts", COMPUTED, 0, 0),
    "CLIP, text encoder": ("texts", FROZEN, 1, 0),
    "CLIP, all blocks\nbut the last": ("tokens", FROZEN, 1, 1),
    "attention of\nthe last blocks": ("attention", COMPUTED, 2, 1.6),
    "last block, Grad-CAM:\ninitial CAM, boxes": ("cam", FROZEN, 2, 0.4),
    "decoder": ("logits", TRAINED, 1, 3),
    "decoder's affinity": ("affinity", COMPUTED, 2, 3),
    "RFM: choose, reweight;\ntransition matrix": ("affinity", COMPUTED, 3, 2.3),
    "refined CAM": ("refined", COMPUTED, 4, 1),
    "PAR: pseudo label": ("label", COMPUTED, 5, 1),
    "segmentation loss": ("logits", COMPUTED, 5, 4),
    "affinity loss": ("affinity", COMPUTED, 4, 3),
}
MAP_ARROWS = (
    ("words and\nbackground prompts", "CLIP, text encoder"),
    ("picture", "CLIP, all blocks\nbut the last"),
    ("CLIP, text encoder", "last block, Grad-CAM:\ninitial CAM, boxes"),
    ("CLIP, all blocks\nbut the last", "last block, Grad-CAM:\ninitial CAM, boxes"),
    ("CLIP, all blocks\nbut the last", "attention of\nthe last blocks"),
    ("CLIP, all blocks\nbut the last", "decoder"),
    ("decoder", "decoder's affinity"),
    ("attention of\nthe last blocks", "RFM: choose, reweight;\ntransition matrix"),
    ("decoder's affinity", "RFM: choose, reweight;\ntransition matrix"),
    ("RFM: choose, reweight;\ntransition matrix", "refined CAM"),
    ("last block, Grad-CAM:\ninitial CAM, boxes", "refined CAM"),
    ("refined CAM", "PAR: pseudo label"),
    ("PAR: pseudo label", "segmentation loss"),
    ("PAR: pseudo label", "affinity loss"),
    ("decoder's affinity", "affinity loss"),
    ("decoder", "segmentation loss"),
)


def method_map(shapes: Mapping[str, tuple[int, ...]]) -> Figure:
    """Draw the method on one page: frozen, trained and computed parts, with shapes.

    Args:
        shapes: Of images, texts, tokens, attention, cam, affinity, refined, label and logits.
    """
    figure, axis = plt.subplots(figsize=(13, 5.6))
    width, height = 0.8, 0.62
    for name, (shape, colour, column, row) in MAP_BOXES.items():
        place = (column - width / 2, -row - height / 2)
        box = FancyBboxPatch(place, width, height, "round,pad=0.02", fc=colour, ec="0.4")
        axis.add_patch(box)
        axis.text(column, -row + 0.07, name, ha="center", va="center", fontsize=8.5)
        text = " x ".join(map(str, shapes[shape]))
        axis.text(column, -row - 0.22, text, ha="center", va="center", fontsize=7, color="0.35")
    for start, end in MAP_ARROWS:
        _, _, x0, y0 = MAP_BOXES[start]
        _, _, x1, y1 = MAP_BOXES[end]
        below, aside = height / 2 + 0.03, width / 2 + 0.03
        around = x1 - x0 > 3  # below the boxes between
        tail = (x0, -y0 - below) if x1 <= x0 or around else (x0 + aside, -y0)
        head = (x1, -y1 + below) if x1 == x0 else (x1 + aside * (1 if x1 < x0 else -1), -y1)
        how = {"arrowstyle": "-|>", "color": "0.35"}
        if around:
            how["connectionstyle"] = "angle,angleA=-90,angleB=180"
        axis.annotate("", head, tail, arrowprops=how)
    for colour, name in ((FROZEN, "frozen"), (TRAINED, "trained"), (COMPUTED, "computed")):
        axis.scatter([], [], marker="s", s=90, c=colour, edgecolors="0.4", label=name)
    axis.legend(loc="lower left", frameon=False)
    axis.set(xlim=(-0.5, 5.5), ylim=(-4.4, 0.45))
    axis.axis("off")
    figure.tight_layout()
    return figure
