"""Version 2's composition: colours, materials, and where objects, clutter and grounds lie.

Each object is drawn from shared parts and telling parts (`world.shapes`). It counts if enough of
both is visible.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from weclip_lib.labels import MINIVOC_BACKGROUNDS, MINIVOC_CLASSES
from weclip_lib.world.outlines import CIRCLE, SUPERSAMPLE, Part, plain_shape, stamp
from weclip_lib.world.scene import Scene, finish, places
from weclip_lib.world.settings import World
from weclip_lib.world.shapes import SHAPES
from weclip_lib.world.surfaces import ROLES, background_image, hsv, noise_map

USUAL_BACKGROUND = {
    "aeroplane": "sky",
    "bicycle": "road",
    "bird": "sky",
    "boat": "water",
    "bottle": "water",
    "bus": "road",
    "car": "road",
    "cat": "sand",
    "chair": "sand",
    "cow": "grass",
    "table": "wall",
    "dog": "snow",
    "horse": "grass",
    "motorbike": "railway",
    "person": "snow",
    "plant": "sand",
    "sheep": "grass",
    "sofa": "wall",
    "train": "railway",
    "tv": "wall",
}
COMPANIONS = {  # classes that are often seen with the first object's
    "aeroplane": ("bus",),
    "bicycle": ("person",),
    "bird": ("boat",),
    "boat": ("bird",),
    "bottle": ("table",),
    "bus": ("car",),
    "car": ("bus",),
    "cat": ("plant",),
    "chair": ("table",),
    "cow": ("sheep",),
    "table": ("chair", "bottle"),
    "dog": ("person",),
    "horse": ("person",),
    "motorbike": ("person",),
    "person": ("bicycle", "dog", "horse", "motorbike"),
    "plant": ("cat",),
    "sheep": ("cow",),
    "sofa": ("tv",),
    "train": ("person",),
    "tv": ("sofa",),
}


def _ground(rng: np.random.Generator, kind: str, world: World) -> Float[np.ndarray, "3 y x"]:
    """Draw a background. The strength of its texture is 2 * `shading`, with soft shadows."""
    image = background_image(rng, kind, world.size)
    mean = image.mean((1, 2), keepdims=True)
    shadows = 1 + 0.2 * world.shading * noise_map(rng, world.size, world.size, 4, 4)
    return (mean + 2 * world.shading * (image - mean)) * shadows


def _unlike(
    rng: np.random.Generator, others: Sequence[np.ndarray], least: float
) -> Float[np.ndarray, " 3"]:
    """Choose a colour at a distance of `least` or more from others, if a few tries find one.

    The distance is the sum of the differences of the channels, from 0 to 765.
    """
    for _ in range(6):
        colour = hsv(rng.random(), rng.uniform(0.15, 1.0), rng.uniform(0.15, 1.0))
        if all(np.abs(colour - other).sum() > least for other in others):
            break
    return colour


def _palette(
    rng: np.random.Generator, behind: Float[np.ndarray, " 3"], hidden: bool
) -> Float[np.ndarray, "role 3"]:
    """Choose the colours of the roles; a hidden object's body has nearly the ground's."""
    if hidden:
        step = rng.uniform(16, 30) * rng.choice([-1, 1]) + rng.uniform(-10, 10, 3)
        body = np.clip(behind + step, 0, 255).astype(np.float32)
        second = np.clip(behind - step, 0, 255).astype(np.float32)
    else:
        body = _unlike(rng, [behind], 120)
        second = _unlike(rng, [behind], 120)
    second = body if rng.random() < 0.4 else second
    dark = _unlike(rng, [body, behind], 200)
    return np.stack([body, second, dark, _unlike(rng, [body, dark], 200)])


class _Canvas:
    """An image, and for each pixel the number of the top object and if a telling part is there."""

    def __init__(self, image: Float[np.ndarray, "3 height width"], shading: float) -> None:
        self.image = image
        self.shading = shading
        self.size = image.shape[-1]
        self.top = np.zeros((self.size, self.size), np.uint8)
        self.telling = np.zeros((self.size, self.size), bool)
        self.behind = image[:, :: self.size // 8, :: self.size // 8].mean((1, 2))
        self.texture = image.mean(0) / max(1.0, self.behind.mean()) - 1  # of the ground, around 0

    def draw(
        self,
        rng: np.random.Generator,
        shared: Sequence[Part],
        telling: Sequence[Part],
        centre: Float[np.ndarray, " 2"],
        radius: float,
        number: int,
        *,
        hidden: bool = False,
        inwards: int = 0,
    ) -> tuple[int, int]:
        """Draw parts as one object, and count the pixels of all of them and of the telling ones.

        Args:
            centre: Part of the picture's side, as `radius`. What lies outside the picture counts in
                the numbers of pixels too.
            number: Of the object; 0 is clutter, which hides objects and is none.
            hidden: If the body has the ground's colour and texture.
            inwards: 1 or -1: the telling parts look to the right or left; 0: to any side.
        """
        side = inwards * _facing(telling) or rng.choice((-1, 1))
        turn = rng.uniform(-0.35, 0.35)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        place = np.diag(rng.uniform(0.85, 1.15, 2) * (side, 1)) @ rotation * radius * self.size
        middle = centre * self.size
        numbered = [(points, 1 + role) for points, role in shared]
        numbered += [(points, 1 + ROLES + role) for points, role in telling]
        polygons = [(points @ place + middle, fill) for points, fill in numbered]
        everything = np.concatenate([points for points, _ in polygons])
        left, upper = np.floor(everything.min(0)).astype(int).tolist()
        right, lower = (np.ceil(everything.max(0)).astype(int) + 1).tolist()
        outline = 1 + int(rng.integers(ROLES)) if rng.random() < 0.3 else None
        large, alpha, fills = stamp(polygons, (left, upper), right - left, lower - upper, outline)

        palette = _palette(rng, self.behind, hidden)
        colours = np.concatenate([self.behind[None], palette, palette]).astype(np.uint8)
        large.putpalette(colours.tobytes())
        flat = np.asarray(large.convert("RGB").reduce(SUPERSAMPLE)).transpose(2, 0, 1)
        shade = self._shade(rng, fills, left, upper, hidden)
        solid = alpha >= 0.5
        told = solid & (fills > ROLES)

        xs = slice(*np.clip((left, right), 0, self.size).tolist())
        ys = slice(*np.clip((upper, lower), 0, self.size).tolist())
        inside = np.s_[ys.start - upper : ys.stop - upper, xs.start - left : xs.stop - left]
        below = self.image[:, ys, xs]
        below += alpha[inside] * ((flat * shade)[:, *inside] - below)
        np.copyto(self.top[ys, xs], number, where=solid[inside], casting="unsafe")
        np.copyto(self.telling[ys, xs], told[inside], where=solid[inside])
        return int(solid.sum()), int(told.sum())

    def _shade(
        self, rng: np.random.Generator, fills: np.ndarray, left: int, upper: int, hidden: bool
    ) -> Float[np.ndarray, "height width"]:
        """Draw the brightness of an object: one light, and textures on the roles 0 and 1."""
        height, width = fills.shape
        x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        towards = rng.uniform(0, 2 * np.pi)
        slope = self.shading * rng.uniform(0.2, 0.8)
        light = 1 + slope * (x * math.cos(towards) + y * math.sin(towards))
        if hidden:
            rows = (np.arange(upper, upper + height) + self.size // 3) % self.size
            columns = (np.arange(left, left + width) + self.size // 3) % self.size
            pattern = self.texture[rows[:, None], columns]
        else:
            pattern = self.shading * rng.uniform(0.2, 0.6) * _pattern(rng, x, y)
        second = rng.choice((0.3, 1.0))  # details, the roles 2 and 3, stay plain
        textured = np.array([1, 1, second, 0, 0, 1, second, 0, 0], np.float32)
        return np.maximum(light, 0.2) * (1 + textured[fills] * pattern)


def _facing(parts: Sequence[Part]) -> int:
    """Return 1 if most parts lie to the right of an object's centre, else -1."""
    return 1 if sum(points[:, 0].mean() for points, _ in parts) > 0 else -1


def _pattern(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Draw stripes, fine noise, coarse noise or spots, of about variance 1/2."""
    kind, height, width = rng.integers(4), y.size, x.size
    if kind == 0:
        turn, pitch = rng.uniform(0, np.pi), rng.uniform(6, 16)
        return np.sin(pitch * (x * math.cos(turn) + y * math.sin(turn)))
    if kind == 1:
        return 0.8 * noise_map(rng, height, width, height // 3, width // 3)
    noise = noise_map(rng, height, width, *((4, 4) if kind == 2 else (8, 8)))
    return 0.7 * noise if kind == 2 else np.where(noise > 0.4, np.float32(-1.2), np.float32(0.4))


def _names(rng: np.random.Generator, count: int, world: World) -> list[str]:
    """Choose the classes of the objects; the second may be a companion of the first."""
    names = [MINIVOC_CLASSES[i] for i in rng.choice(len(MINIVOC_CLASSES), count)]
    if count > 1 and rng.random() < world.companions:
        names[1] = str(rng.choice(COMPANIONS[names[0]]))
    return names


def _clutter(rng: np.random.Generator, world: World) -> tuple[list[Part], bool]:
    """Return a shape of no class, and if it is an object without its telling part."""
    if rng.random() < world.headless:
        return SHAPES[MINIVOC_CLASSES[rng.integers(len(MINIVOC_CLASSES))]].shared(rng), True
    return plain_shape(rng, int(rng.integers(3))), False


def _across_border(
    rng: np.random.Generator, at: Float[np.ndarray, " 2"], radius: float
) -> tuple[Float[np.ndarray, " 2"], int]:
    """Move a centre to the left, right or lower border, and say where its telling part must look.

    Below, the telling part of most objects is in the picture, since it is at their upper end.
    """
    inside, side = radius * rng.uniform(0.05, 0.5), rng.integers(3)
    if side == 2:
        return np.array([at[0], 1 - inside]), 0
    return np.array([inside if side == 0 else 1 - inside, at[1]]), 1 if side == 0 else -1


def _visible(
    canvas: _Canvas, areas: list[tuple[int, int]], part: float
) -> Bool[np.ndarray, " object"]:
    """Say which objects count: a part of their area is visible, and of their telling parts' too."""
    tops = (canvas.top.ravel(), canvas.top[canvas.telling])
    seen = np.stack([np.bincount(top, minlength=len(areas) + 1)[1:] for top in tops], 1)
    pixels = canvas.size**2 / 256, canvas.size**2 / 1024  # the least that a grid of patches shows
    return (seen >= np.maximum(part * np.array(areas), pixels)).all(1)


def compose(rng: np.random.Generator, world: World) -> Scene:
    """Draw a picture of version 2."""
    count = 1 + int(rng.choice(3, p=world.object_counts))
    names = _names(rng, count, world)
    usual = rng.random() < world.co_occurrence
    anywhere = MINIVOC_BACKGROUNDS[rng.integers(len(MINIVOC_BACKGROUNDS))]
    background = USUAL_BACKGROUND[names[0]] if usual else anywhere
    canvas = _Canvas(_ground(rng, background, world), world.shading)

    for _ in range(rng.integers(1, 4) if rng.random() < world.clutter else 0):
        parts, headless = _clutter(rng, world)
        radius = rng.uniform(*(world.object_radius if headless else (0.08, 0.2)))
        hidden = bool(rng.random() < world.camouflage)
        canvas.draw(rng, parts, (), rng.random(2), radius, 0, hidden=hidden)
    radii = rng.uniform(*world.object_radius, count) * (1.0, 0.85, 0.72)[count - 1]
    centres, areas = places(rng, radii, world.overlap), []
    for number, (name, at, radius) in enumerate(zip(names, centres, radii, strict=True), 1):
        inwards = 0
        if rng.random() < world.cut:
            at, inwards = _across_border(rng, at, radius)
        hidden = bool(rng.random() < world.camouflage)
        parts = SHAPES[name].shared(rng), SHAPES[name].telling(rng)
        area = canvas.draw(rng, *parts, at, radius, number, hidden=hidden, inwards=inwards)
        areas.append(area)
        if rng.random() < world.occlusion:
            aside = at + radius * rng.uniform(0.4, 0.9) * CIRCLE[rng.integers(len(CIRCLE))]
            canvas.draw(rng, _clutter(rng, world)[0], (), aside, radius * rng.uniform(0.25, 0.5), 0)

    counts = _visible(canvas, areas, world.min_visible)
    canvas.telling &= np.array([False, *counts])[canvas.top]
    objects = list(zip(names, counts.tolist(), strict=True))
    return finish(
        rng, canvas.image, canvas.top, canvas.telling, objects, background, MINIVOC_CLASSES
    )
