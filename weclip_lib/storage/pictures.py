"""Only this module opens pictures and masks; it refuses a bad one by name, with a remedy."""

import io
import os
import tempfile
import warnings
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from weclip_lib.labels import COLORMAP, IGNORE_INDEX
from weclip_lib.storage.files import Unusable, files_below, reading, whole

SUFFIXES = (  # of pictures that can be read
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pgm", ".png",
    ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
REMEDY = "replace it by a whole copy in JPEG or PNG, or remove it and its row"
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
MOST_PIXELS = 40_000_000  # of a picture that somebody sends
ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # the last bytes of a whole file
ORIENTATION = 0x0112  # of EXIF data
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")
ON_ITS_SIDE = (5, 6, 7, 8)  # orientations that swap height and width
GAP = bytes(1024)
UPRIGHT = {  # names of what `exif_transpose` does, for messages about masks
    5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip


def pictures_below(folder: Path) -> tuple[dict[str, Path], str]:
    """Return the pictures below a folder by relative path, and say what was left out (or "").

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


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ORIENTATION, 1)


def _zeroed(content: bytes) -> bool:
    """Return whether a JPEG's data hold a stretch of zeros; a copy that was cut off has one.

    Zeros can also be an even area. Then, in every table of AC codes, they are the code of "nothing
    more in this block" (low half 0, and not 0xF0). The test cannot judge progressive pictures.
    """
    at, symbols = 2, []
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        kind, last = content[at + 1], at + 2 + int.from_bytes(content[at + 2 : at + 4])
        table = at + 4
        if kind == 0xC2:
            return False
        while kind == 0xC4 and table + 17 < last:
            if content[table] >> 4:
                symbols.append(content[table + 17])
            table += 17 + sum(content[table + 1 : table + 17])
        at = last
    end = content.find(b"\xff\xd9", at)
    gap = content.find(GAP, at, len(content) if end < 0 else end) >= 0
    return gap and any(symbol & 0x0F or symbol == 0xF0 for symbol in symbols)


def _rgb(path: Path, image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB; transparent pixels show white behind them.

    16 bits are scaled to 8. CMYK follows the picture's own colour profile, if it has one.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or not 4096 <= values.max() < 65536:
            raise Unusable(
                f"{path} holds values from {values.min()} to {values.max()}, which is no range of "
                "16 bits: scale them to 0 to 255, and save it as PNG under another name"
            )
        return Image.fromarray(((values * 2 + 257) // 514).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Unusable(
            f"{path} holds numbers without a known range (mode F): scale them to 0 to 255, and "
            "save it as PNG under another name"
        )
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK" and profile:
        with suppress(ImageCms.PyCMSError, OSError):  # broken, or not for CMYK
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            shown = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, own, shown, outputMode="RGB")
    return image.convert("RGB")


def _check_frames(path: Path, image: Image.Image) -> None:
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format not in ("MPO", "JPEG"):  # their others are stereo or previews
        raise Unusable(
            f"{path} holds {count} pictures: save the one that is meant as a file of its own"
        )


def read_image(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    """Decode a picture as RGB, and turn it upright if its EXIF data say how.

    Raises:
        Unusable: If it cannot be decoded, has a gap, several pictures, or an unknown range.
    """
    with reading(path, REMEDY):
        content = path.read_bytes()
        try:
            opened = Image.open(io.BytesIO(content))
        except UnidentifiedImageError as error:  # its message names an address in memory
            raise Unusable(f"{path} cannot be read (no known kind): {REMEDY}") from error
        with opened as image:
            _check_frames(path, image)
            if image.format in ("JPEG", "MPO") and _zeroed(content):
                raise Unusable(f"{path} holds a stretch of zeros instead of its middle: {REMEDY}")
            return np.array(_rgb(path, ImageOps.exif_transpose(image)))


def read_upload(name: str, content: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Decode a picture that somebody has sent, as `read_image` does.

    Raises:
        Unusable: If it is no picture, or has more than 40 megapixels.
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
    """Scale the longer side to about `side` pixels, and both sides to whole patches."""
    scale = side / max(pixels.shape[:2])
    height, width = (max(1, round(length * scale / patch)) * patch for length in pixels.shape[:2])
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _is_whole(path: Path, kind: str | None) -> bool:
    """Return whether the file ends as its format has to; False if the format has no fixed end."""
    ending = ENDINGS.get(kind or "")
    if ending is None:
        return False
    with path.open("rb") as file:
        file.seek(-len(ending), 2)
        return file.read() == ending


def picture_problem(path: Path, *, min_size: int = 1, thorough: bool = False) -> str | None:
    """Say what is wrong with a picture and what to do about it; None if nothing is wrong.

    It looks at the header and the last bytes. If they do not suffice, it decodes the picture.

    Args:
        min_size: Smallest side, in pixels.
        thorough: Decode it in any case.
    """
    try:
        with reading(path, REMEDY), Image.open(path) as image:
            _check_frames(path, image)
            (width, height), kind, mode = image.size, image.format, image.mode
        if thorough or mode.startswith(("I", "F")) or not _is_whole(path, kind):
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
    """Read height and width from the header; they are those that `read_image` gives."""
    with reading(path, REMEDY), Image.open(path) as image:
        width, height = image.size  # Pillow has already turned a TIFF
        turned = _orientation(image) in ON_ITS_SIDE and image.format != "TIFF"
        return (width, height) if turned else (height, width)


def read_mask(path: Path, class_count: int) -> UInt8[np.ndarray, "height width"]:
    """Read class ids; IGNORE_INDEX is void.

    Raises:
        Unusable: If the mask is missing, unreadable, no map of ids, or holds an id of no class.
    """
    if not path.exists():
        raise Unusable(f"{path} is missing: scores and full supervision need every mask")
    with reading(path, "replace it by a whole copy, or remove it"), Image.open(path) as image:
        _check_frames(path, image)
        if image.format in LOSSY:
            raise Unusable(
                f"{path} is a mask in {image.format}, which changes class ids: export it as PNG"
            )
        mode, mask = image.mode, np.array(ImageOps.exif_transpose(image))
    if mode not in ("L", "P") and not mode.startswith("I"):
        raise Unusable(
            f"{path} is a mask of mode {mode}: it has to hold one class id a pixel (mode L or P); "
            "write the ids with weclip_lib.storage.pictures.write_mask"
        )
    wrong = ((mask < 0) | (mask >= class_count)) & (mask != IGNORE_INDEX)
    if wrong.any():
        raise Unusable(
            f"{path} holds class id {mask[wrong][0]}: there is no such class, "
            f"ids are 0 to {class_count - 1} and {IGNORE_INDEX} for void"
        )
    return mask.astype(np.uint8)


def write_mask(path: Path, mask: UInt8[np.ndarray, "height width"]) -> None:
    """Write class ids as an indexed PNG with VOC's palette, whole or not at all."""
    image = Image.fromarray(mask, mode="P")
    image.putpalette([value for colour in COLORMAP for value in colour])
    with whole(path) as partial:
        image.save(partial, format="PNG")


def squared(
    pixels: UInt8[np.ndarray, "height width *channel"], side: int, *, nearest: bool = False
) -> UInt8[np.ndarray, "side side *channel"]:
    """Scale the shorter side to `side` pixels, and cut a square from the centre.

    Args:
        nearest: For masks; it never mixes class ids.
    """
    height, width = pixels.shape[:2]
    how = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    size = [max(side, round(length * side / min(height, width))) for length in (width, height)]
    scaled = np.asarray(Image.fromarray(pixels).resize(size, how))
    left, top = ((length - side) // 2 for length in size)
    return np.ascontiguousarray(scaled[top : top + side, left : left + side])
