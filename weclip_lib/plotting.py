"""Figures: pictures, label maps, heat maps, curves and bars. The only module with matplotlib."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, StrMethodFormatter

from weclip_lib.labels import IGNORE_INDEX, LabelSet

TILE = 1.7  # inches a picture
# Twelve hues that people with common colour blindness tell apart best, background black.
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
    """RGB in 0-255 of every class_id; IGNORE_INDEX is white."""
    table = np.full((256, 3), 255, np.uint8)
    table[:class_count] = PALETTE[np.r_[0, 1 + np.arange(class_count - 1) % (len(PALETTE) - 1)]]
    table[IGNORE_INDEX] = 255
    return table


def label_image(label: np.ndarray, labels: LabelSet) -> np.ndarray:
    """A label map as RGB."""
    return colours(labels.class_count)[np.asarray(label)]


def image_grid(
    rows: Sequence[Sequence[np.ndarray]],
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
    figure, axes = plt.subplots(
        height, width, figsize=(TILE * width, TILE * height + 0.5), squeeze=False
    )
    for row, line in zip(axes, rows, strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
        for axis, picture in zip(row, line, strict=False):
            if picture.ndim == 2:
                axis.imshow(picture, cmap="magma", vmin=0, vmax=1)
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
            ncols=7,
            fontsize=8,
            frameon=False,
        )
    figure.tight_layout(rect=(0, 0.55 / (TILE * height + 0.5) if labels else 0, 1, 1))
    return figure


def curves(history: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """One panel a metric: value over iterations, a line a variant, all seeds thin behind it."""
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3), squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        chosen = history[history["metric"] == metric]
        for number, (variant, part) in enumerate(chosen.groupby("variant", sort=False)):
            wide = part.pivot(index="iteration", columns="seed", values="value")
            axis.plot(wide, color=f"C{number}", alpha=0.3, lw=0.8)
            axis.plot(wide.mean(axis=1), color=f"C{number}", label=variant)
        axis.set(xlabel="training step", title=metric.replace("_", " "))
    axes[0, -1].legend(fontsize=8)
    figure.tight_layout()
    return figure


def bars(summary: pd.DataFrame, *, order: Sequence[str], xlabel: str) -> Figure:
    """Horizontal bars of mean with spread, a bar a variant, named by `order` from the top."""
    rows = summary.set_index("variant").loc[list(order)][::-1]
    figure, axis = plt.subplots(figsize=(6.5, 0.42 * len(rows) + 0.9))
    spread = rows["spread"].fillna(0)
    axis.barh(rows.index, rows["mean"], xerr=spread, color="C0", ecolor="0.2", capsize=3)
    for position, (mean, error) in enumerate(zip(rows["mean"], spread, strict=True)):
        axis.text(mean + error + 0.6, position, f"{mean:.1f}", va="center", fontsize=8)
    axis.set(xlabel=xlabel, xlim=(0, max(rows["mean"]) * 1.12))
    figure.tight_layout()
    return figure


def changes(values: pd.DataFrame, *, xlabel: str) -> Figure:
    """A line a column, from the top: a dot a row (a seed), a bar for their mean."""
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
    """A table of numbers in [0, 1] as colours, with the numbers in it."""
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
    """One panel a swept number, by its name: a dot a seed, a line through the means.

    Args:
        panels: Frames with columns x and value.
        reference: Name and height of a dashed line.
        log: Whether the swept numbers are spread logarithmically.
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


def growth(panels: Mapping[str, pd.DataFrame], *, ylabel: str) -> dict[str, float]:
    """One panel a number that grows, both axes logarithmic, with a power law fitted to each line.

    Args:
        panels: Frames with columns line, x and value.

    Returns:
        The exponent of every `panel, line`.
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
    return exponents
