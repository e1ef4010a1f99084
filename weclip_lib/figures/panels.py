"""Draw small pictures for the explorers with numpy and PIL, within milliseconds."""

from collections.abc import Sequence
from html import escape
from io import BytesIO

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image, ImageDraw

from weclip_lib.figures.plotting import colours, heat_colours, overlay
from weclip_lib.labels import IGNORE_INDEX

RGB = UInt8[np.ndarray, "_ _ 3"]
SIDE = 208  # pixels of a panel's longer side
OUTLINE = (86, 180, 233)  # of boxes; sky blue shows on dark and on light


def as_png(picture: RGB) -> bytes:
    """Encode a PNG with little compression, because it only goes to a browser."""
    file = BytesIO()
    Image.fromarray(picture).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def scaled(picture: RGB, side: int = SIDE, *, smooth: bool = True) -> RGB:
    """Resize a picture so that its longer side has `side` pixels."""
    height, width = picture.shape[:2]
    size = [max(1, round(length * side / max(height, width))) for length in (width, height)]
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize(size, how))


def heat(values: Float[np.ndarray, "_ _"], under: RGB, *, smooth: bool = True) -> RGB:
    """Draw a map in [0, 1] in colour over a grey picture."""
    below = scaled(under)
    grey = below.mean(axis=2, keepdims=True)
    levels = Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8))
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    over = heat_colours()[np.asarray(levels.resize(below.shape[1::-1], how))]
    return (0.35 * grey + 0.65 * over).astype(np.uint8)


def boxes(picture: RGB, inside: Bool[np.ndarray, "_ _"]) -> RGB:
    """Darken a picture outside its boxes, and outline the boxes."""
    below = scaled(picture)
    size = below.shape[1::-1]
    mask = np.asarray(
        Image.fromarray(inside.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    )
    padded = np.pad(mask, 1)
    around = np.stack([padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]])
    edge = (mask == 1) & (around.min(axis=0) == 0)
    shown = np.where(mask[..., None] == 1, below, below // 4)
    shown[edge] = OUTLINE
    return shown.astype(np.uint8)


def label_map(
    label: Integer[np.ndarray, "_ _"],
    table: UInt8[np.ndarray, "256 3"],
    under: RGB,
) -> RGB:
    """Draw class ids in colour over a picture; background stays as it is."""
    return scaled(overlay(under, label, table, weight=2), smooth=False)


def word_colours(words: Sequence[str], classes: Sequence[str]) -> UInt8[np.ndarray, "256 3"]:
    """Choose colours for label maps with word ids from 1; a class keeps its colour."""
    table = colours(1 + len(classes) + len(words))
    own = [
        table[1 + classes.index(word)] if word in classes else table[1 + len(classes) + number]
        for number, word in enumerate(words)
    ]
    chosen = np.zeros_like(table)
    chosen[1 : 1 + len(own)] = own
    chosen[IGNORE_INDEX] = 255
    return chosen


def sheet(pictures: Sequence[RGB], side: int, columns: int) -> tuple[RGB, int, int]:
    """Place pictures in rows of squares; return the sheet, its rows and its columns."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    whole = np.full((rows * side, columns * side, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        small = scaled(picture, side - 4)
        top, left = (number // columns) * side + 2, (number % columns) * side + 2
        whole[top : top + small.shape[0], left : left + small.shape[1]] = small
    return whole, rows, columns


def bars(values: Sequence[tuple[str, float, bool]], *, limit: float = 1.0, mark: float = 0) -> str:
    """Draw named values from 0 to `limit` as HTML bars: strong ones blue, a line at `mark`."""
    lines = []
    for name, value, strong in values:
        part = 100 * min(1.0, max(0.0, value / limit)) if limit else 0
        colour = "#0072b2" if strong else "#b0b0b0"
        line = f'<i style="left:{100 * mark / limit:.1f}%"></i>' if mark else ""
        lines.append(
            f'<div class="weclip-bar"><span>{escape(name)}</span>'
            f'<b><u style="width:{part:.1f}%;background:{colour}"></u>{line}</b>'
            f"<em>{value:.3g}</em></div>"
        )
    return "".join(lines)


def crosshair(picture: RGB, cell: tuple[int, int], grid: tuple[int, int]) -> RGB:
    """Outline one patch of a picture."""
    image = Image.fromarray(scaled(picture))
    height, width = image.height / grid[0], image.width / grid[1]
    y, x = cell
    box = (x * width, y * height, (x + 1) * width - 1, (y + 1) * height - 1)
    draw = ImageDraw.Draw(image)
    draw.rectangle([v + d for v, d in zip(box, (-1, -1, 1, 1), strict=True)], outline=(0, 0, 0))
    draw.rectangle(box, outline=(255, 255, 255))
    return np.asarray(image)
