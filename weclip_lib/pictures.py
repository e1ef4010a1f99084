"""Decode pictures and masks strictly: nothing is guessed, and nothing wrong passes in silence."""

import os
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from weclip_lib.files import Unusable, files_below, whole
from weclip_lib.labels import COLORMAP, IGNORE_INDEX

SUFFIXES = (  # of pictures that can be read
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pgm", ".png",
    ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
MODES = ("RGB", "L")  # grey pictures become three equal channels
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
MOST_PIXELS = 40_000_000  # of a picture that somebody sends
ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # the last bytes of a whole file


def pictures_below(folder: Path) -> tuple[dict[str, Path], str]:
    """Pictures below a folder by relative path, and in words what was left out ("" for nothing).

    Raises:
        Unusable: If a folder cannot be read.
    """
    found, others = {}, defaultdict(list)
    for name, path in files_below(folder).items():
        if path.suffix.lower() in SUFFIXES:
            found[name] = path
        else:
            others[path.suffix or "without an ending"].append(name)
    kinds = [f"{len(names)} {kind} ({names[0]})" for kind, names in sorted(others.items())]
    remedy = "a picture among them has to be converted to JPEG or PNG, or given its ending"
    return found, f"left out in {folder}: {', '.join(kinds)}; {remedy}" if kinds else ""


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An opened picture; whatever decoding it raises becomes `Unusable`."""
    try:
        with Image.open(path) as image:
            yield image
    except Unusable:
        raise
    except Exception as error:  # decoders raise anything on damaged files, TypeError included
        raise Unusable(f"{path} cannot be read ({error}): replace or remove it") from error


def _check_mode(path: Path, image: Image.Image) -> None:
    if image.mode not in MODES:
        raise Unusable(
            f"{path} is a picture of mode {image.mode} ({image.format}): convert it to RGB, "
            "for example with Image.open(path).convert('RGB').save(path.with_suffix('.png'))"
        )


def read_image(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    """Decode a picture as RGB, turned upright if its EXIF data say how.

    Raises:
        Unusable: If the file cannot be decoded, or is neither RGB nor grey with 8 bits.
    """
    with _opened(path) as image:
        _check_mode(path, image)
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def read_upload(name: str, content: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Decode a picture that somebody has sent, as `read_image` does.

    Raises:
        Unusable: If it is none, or has more than 40 megapixels.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (Path(name).name or "picture")
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                height, width = picture_size(path)
            if height * width > MOST_PIXELS:
                raise Unusable(f"{path} has {width}x{height} pixels: shrink it below 40 megapixels")
            return read_image(path)
        except Unusable as error:
            if isinstance(error.__cause__, BOMBS):
                raise Unusable(
                    f"{path.name} has far too many pixels: shrink it below 40 megapixels"
                ) from error
            raise Unusable(str(error).replace(f"{folder}{os.sep}", "")) from error


def fitted(
    pixels: UInt8[np.ndarray, "height width 3"], side: int, patch: int
) -> UInt8[np.ndarray, "new_h new_w 3"]:
    """Scaled so that the longer side has about `side` pixels and both are whole patches."""
    scale = side / max(pixels.shape[:2])
    height, width = (max(1, round(length * scale / patch)) * patch for length in pixels.shape[:2])
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _is_whole(path: Path, kind: str | None) -> bool:
    """Whether the file ends as its format does."""
    ending = ENDINGS.get(kind or "", b"")
    with path.open("rb") as file:
        file.seek(-len(ending), 2)
        return file.read() == ending


def picture_problem(path: Path, *, min_size: int = 1, thorough: bool = False) -> str | None:
    """What is wrong with a picture, and what to do about it; None if nothing is.

    Header and last bytes are looked at; the whole is decoded if the end is not as it should be.

    Args:
        min_size: Smallest side, in pixels.
        thorough: Decode it in any case.
    """
    try:
        with _opened(path) as image:
            _check_mode(path, image)
            (width, height), kind = image.size, image.format
        if thorough or not _is_whole(path, kind):
            read_image(path)
    except Unusable as error:
        return str(error)
    if min(width, height) < min_size:
        return (
            f"{path} is {width}x{height} pixels, smaller than one patch of {min_size}: "
            "enlarge or remove it"
        )
    return None


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width as `read_image` gives them, from the header."""
    with _opened(path) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientation: on its side
        width, height = image.size
    return (width, height) if turned else (height, width)


def read_mask(path: Path, class_count: int) -> UInt8[np.ndarray, "height width"]:
    """Class ids, IGNORE_INDEX where void.

    Raises:
        Unusable: If the mask is missing, unreadable, no map of ids, or holds an id of no class.
    """
    if not path.exists():
        raise Unusable(f"{path} is missing: scores and full supervision need every mask")
    with _opened(path) as image:
        mode, mask = image.mode, np.array(image)
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise Unusable(
            f"{path} is a mask of mode {mode}: it has to hold one class id a pixel (mode L or P)"
        )
    wrong = (mask >= class_count) & (mask != IGNORE_INDEX)
    if wrong.any():
        raise Unusable(
            f"{path} holds class id {mask[wrong][0]}: there is no such class, "
            f"ids are 0 to {class_count - 1} and {IGNORE_INDEX} for void"
        )
    return mask


def write_mask(path: Path, mask: UInt8[np.ndarray, "height width"]) -> None:
    """Write class ids as an indexed PNG with VOC's palette; whole, or not at all."""
    image = Image.fromarray(mask, mode="P")
    image.putpalette([value for colour in COLORMAP for value in colour])
    with whole(path) as partial:
        image.save(partial, format="PNG")


def squared(
    pixels: UInt8[np.ndarray, "height width *channel"], side: int, *, nearest: bool = False
) -> UInt8[np.ndarray, "side side *channel"]:
    """A square of `side` pixels: scaled by the shorter side, and cut at the centre.

    Args:
        nearest: For masks: class ids are never mixed.
    """
    height, width = pixels.shape[:2]
    how = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    size = [max(side, round(length * side / min(height, width))) for length in (width, height)]
    scaled = np.asarray(Image.fromarray(pixels).resize(size, how))
    left, top = ((length - side) // 2 for length in size)
    return np.ascontiguousarray(scaled[top : top + side, left : left + side])


def mask_problem(mask: Path, image: Path, class_count: int) -> str | None:
    """What is wrong with a mask; None if nothing is."""
    try:
        found, size = read_mask(mask, class_count).shape, picture_size(image)
    except Unusable as error:
        return str(error)
    if found != size:
        return (
            f"{mask} is {found[1]}x{found[0]} pixels, its picture {size[1]}x{size[0]}: "
            "make them the same size (masks by nearest neighbour)"
        )
    return None
