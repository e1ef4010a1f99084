"""Version 1's composition: palettes, materials, and where objects and clutter lie."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from weclip_lib.labels import MINIVOC_1_CLASSES, MINIVOC_BACKGROUNDS
from weclip_lib.world.outlines import CIRCLE, SUPERSAMPLE, Part, stamp
from weclip_lib.world.scene import Scene, finish, places
from weclip_lib.world.settings import World
from weclip_lib.world.shapes_1 import SHAPES, clutter
from weclip_lib.world.surfaces import ROLES, background_image, hsv, noise_map

USUAL_BACKGROUND = {
    "aeroplane": "sky",
    "bird": "sky",
    "boat": "water",
    "bottle": "sand",
    "car": "road",
    "cat": "grass",
    "chair": "wall",
    "fish": "water",
    "person": "snow",
    "plant": "grass",
    "train": "railway",
    "tv": "wall",
}


def _palette(rng: np.random.Generator, behind: np.ndarray) -> Float[np.ndarray, "role 3"]:
    """Choose one to four colours for the roles, if possible unlike the background `behind`."""
    colours = []
    for _ in range(rng.integers(1, ROLES + 1)):
        for _ in range(4):
            colour = hsv(rng.random(), rng.uniform(0.15, 1.0), rng.uniform(0.2, 1.0))
            if np.abs(colour - behind).sum() > 120:
                break
        colours.append(colour)
    return np.stack(colours)[rng.integers(len(colours), size=ROLES)]


def _surface(
    rng: np.random.Generator, height: int, width: int
) -> Float[np.ndarray, "role height width"]:
    """Draw the brightness of each role: stripes, fine or coarse noise, under one light."""
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    towards = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0.05, 0.35) * (x * math.cos(towards) + y * math.sin(towards))
    materials = []
    for _ in range(2):
        kind, depth = rng.integers(3), rng.uniform(0.08, 0.28)
        if kind == 0:
            turn, pitch = rng.uniform(0, np.pi), rng.uniform(6, 16)
            pattern = np.sin(pitch * (x * math.cos(turn) + y * math.sin(turn)))
        elif kind == 1:
            pattern = 0.8 * noise_map(rng, height, width, height // 3, width // 3)
        else:
            pattern = 0.7 * noise_map(rng, height, width, 4, 4)
        materials.append(light * (1 + depth * pattern))
    return np.stack(materials)[rng.integers(2, size=ROLES)]


class _Canvas:
    """An image, and the number of the top object at each pixel. Channels first is fast in numpy."""

    def __init__(self, image: Float[np.ndarray, "3 height width"]) -> None:
        self.image = image
        self.size = image.shape[-1]
        self.top = np.zeros((self.size, self.size), np.uint8)
        self.behind = image[:, :: self.size // 8, :: self.size // 8].mean((1, 2))

    def draw(
        self,
        rng: np.random.Generator,
        parts: Sequence[Part],
        centre: np.ndarray,
        radius: float,
        number: int,
    ) -> int:
        """Draw parts as object `number` and return the number of covered pixels.

        `centre` and `radius` are in pixels. Number 0 is clutter: it hides objects and is none.
        """
        turn = rng.uniform(-0.35, 0.35)
        stretch = rng.uniform(0.85, 1.15, 2) * (rng.choice([-1, 1]), 1)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        placed = [(points * stretch @ rotation * radius + centre, role) for points, role in parts]
        everything = np.concatenate([points for points, _ in placed])
        left, upper = np.clip(np.floor(everything.min(0)).astype(int), 0, self.size).tolist()
        right, lower = np.clip(np.ceil(everything.max(0)).astype(int) + 1, 0, self.size).tolist()
        palette = _palette(rng, self.behind)
        outline = 1 + int(rng.integers(ROLES)) if rng.random() < 0.3 else None
        if right - left < 2 or lower - upper < 2:
            return 0
        width, height = right - left, lower - upper
        polygons = [(points, 1 + role) for points, role in placed]
        roles, alpha, role_map = stamp(polygons, (left, upper), width, height, outline)
        surface = _surface(rng, height, width)
        shade = np.take_along_axis(surface, (np.maximum(role_map, 1) - 1)[None], 0)[0]
        roles.putpalette(np.concatenate([self.behind[None], palette]).astype(np.uint8).tobytes())
        flat = np.asarray(roles.convert("RGB").reduce(SUPERSAMPLE)).transpose(2, 0, 1)
        below = self.image[:, upper:lower, left:right]
        below += alpha * (flat * shade - below)
        covered = alpha >= 0.5
        self.top[upper:lower, left:right][covered] = number
        return int(covered.sum())


def compose(rng: np.random.Generator, world: World) -> Scene:
    """Draw a picture of version 1."""
    count = 1 + rng.choice(3, p=world.object_counts)
    names = [MINIVOC_1_CLASSES[i] for i in rng.choice(len(MINIVOC_1_CLASSES), count)]
    usual = rng.random() < world.co_occurrence
    anywhere = MINIVOC_BACKGROUNDS[rng.integers(len(MINIVOC_BACKGROUNDS))]
    background = USUAL_BACKGROUND[names[0]] if usual else anywhere
    canvas = _Canvas(background_image(rng, background, world.size))

    for _ in range(rng.integers(1, 4) if rng.random() < world.clutter else 0):
        at, radius = rng.random(2) * world.size, rng.uniform(0.08, 0.2) * world.size
        canvas.draw(rng, clutter(rng), at, radius, 0)
    crowding = (1.0, 0.85, 0.72)[count - 1]
    radii = rng.uniform(*world.object_radius, count) * crowding
    areas = []
    for number, (name, at) in enumerate(zip(names, places(rng, radii, 0.8), strict=True), start=1):
        radius = radii[number - 1]
        areas.append(
            canvas.draw(rng, SHAPES[name](rng), at * world.size, radius * world.size, number)
        )
        if rng.random() < world.occlusion:
            aside = at + radius * rng.uniform(0.4, 0.9) * CIRCLE[rng.integers(len(CIRCLE))]
            hidden = radius * rng.uniform(0.25, 0.5) * world.size
            canvas.draw(rng, clutter(rng), aside * world.size, hidden, 0)

    seen = np.bincount(canvas.top.ravel(), minlength=count + 1)[1 : count + 1]
    visible = seen >= np.maximum(world.min_visible * np.array(areas), world.size**2 / 256)
    objects = list(zip(names, visible.tolist(), strict=True))
    return finish(rng, canvas.image, canvas.top, None, objects, background, MINIVOC_1_CLASSES)
