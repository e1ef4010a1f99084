"""A drawn picture with its mask, classes and caption, and the last steps of drawing it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8

from weclip_lib.labels import IGNORE_INDEX
from weclip_lib.world.surfaces import noise_map

TEMPLATES = (
    "a clean origami {}.",
    "a photo of {}.",
    "a picture of {}.",
    "an image of {}.",
    "a drawing of {}.",
    "there is {}.",
    "a scene with {}.",
    "{}.",
)


@dataclass(frozen=True)
class Scene:
    """One drawn picture with its mask, classes, background and caption."""

    image: UInt8[np.ndarray, "height width 3"]
    mask: UInt8[np.ndarray, "height width"]  # class_id 0-C, IGNORE_INDEX on object borders
    classes: tuple[str, ...]  # names of the visible classes, in class order
    background: str
    caption: str
    telling: Bool[np.ndarray, "height width"] | None = None  # version 2: parts that name a class


def places(
    rng: np.random.Generator, radii: Float[np.ndarray, " object"], gap: float
) -> list[np.ndarray]:
    """Choose centres (fractions of the picture), each from a few random tries with enough room.

    There is enough if the distance from each other object is `gap` times the sum of their radii.
    """
    centres: list[np.ndarray] = []
    for number, radius in enumerate(radii):
        tries = rng.uniform(radius * 0.7, 1 - radius * 0.7, (8, 2))
        room = np.full(len(tries), np.inf)
        for other, other_radius in zip(centres, radii[:number], strict=True):
            apart = np.hypot(*(tries - other).T) / (radius + other_radius)
            room = np.minimum(room, apart)
        enough = np.flatnonzero(room > gap)
        centres.append(tries[enough[0] if len(enough) else room.argmax()])
    return centres


def with_article(noun: str) -> str:
    """Put `a` or `an` before a noun: `a car`, `an aeroplane`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _caption(rng: np.random.Generator, classes: Sequence[str], background: str) -> str:
    nouns = " and ".join(with_article(classes[i]) for i in rng.permutation(len(classes)))
    places = (" on {}", " with {} background", " in front of {}")
    if not classes:
        nouns = background
    elif rng.random() < 0.4:
        nouns += str(rng.choice(places)).format(background)
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(nouns)


def _border(top: UInt8[np.ndarray, "height width"]) -> np.ndarray:
    """Mark pixels whose object differs from a 4-neighbour's: a band two pixels wide."""
    border = np.zeros(top.shape, bool)
    rows, columns = top[1:] != top[:-1], top[:, 1:] != top[:, :-1]
    border[1:] |= rows
    border[:-1] |= rows
    border[:, 1:] |= columns
    border[:, :-1] |= columns
    return border


def finish(
    rng: np.random.Generator,
    image: Float[np.ndarray, "3 height width"],
    top: UInt8[np.ndarray, "height width"],
    telling: Bool[np.ndarray, "height width"] | None,
    objects: Sequence[tuple[str, bool]],
    background: str,
    classes: Sequence[str],
) -> Scene:
    """Make the scene of a drawn picture: mask, last light, grain and caption.

    Args:
        top: Number of the object on top at each pixel; 0: none.
        telling: Where the telling parts of the objects that count are seen; None: in version 1.
        objects: Class of each object from number 1 on, and if it counts. One that does not count
            is IGNORE_INDEX in the mask, and is in neither the classes nor the caption.
        classes: All classes, in the order of their ids.
    """
    ids = [classes.index(name) + 1 if counts else IGNORE_INDEX for name, counts in objects]
    mask = np.array([0, *ids], np.uint8)[top]
    mask[_border(top)] = IGNORE_INDEX
    shown = tuple(name for name in classes if (name, True) in objects)

    size = image.shape[-1]
    light = 1 + 0.08 * noise_map(rng, size, size, 3, 3)
    grain = rng.standard_normal((size, size), dtype=np.float32) * rng.uniform(1, 6)
    pixels = np.clip(image * light + grain, 0, 255).astype(np.uint8)
    pixels = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return Scene(pixels, mask, shown, background, _caption(rng, shown, background), telling)
