"""MiniVOC: drawn pictures with exact masks, image-level labels and captions, in VOC layout.

The pictures show object classes on eight textured backgrounds: twenty classes in version 2, twelve
in version 1. Each object has parts and random colours, texture, light, pose and scale. Other
objects and clutter can hide some of it. The fields of `world.settings.World` set how difficult the
pictures are for weak supervision. Every process draws the same picture for the same `seed` and
`index`.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from weclip_lib.storage.files import locked, whole
from weclip_lib.storage.pictures import write_mask
from weclip_lib.world import composition, composition_1
from weclip_lib.world.scene import Scene
from weclip_lib.world.settings import WORLD_1, World

DRAWING_VERSION = 1  # to be raised when the same seed and World give another picture than before
SPLIT_SEEDS = {"train": 1, "val": 2, "test": 3}  # settings.Pretraining has other seeds


def draw(seed: int, index: int, world: World = World()) -> Scene:
    """Draw picture `index` of the stream `seed`; the same arguments give the same bytes."""
    compose = composition_1.compose if world.version == 1 else composition.compose
    return compose(np.random.default_rng([seed, index]), world)


def draw_many(
    seed: int, indices: Sequence[int], world: World = World(), *, processes: int = 1
) -> Iterator[Scene]:
    """Draw pictures in the order of `indices`, with `processes` processes."""
    task = partial(draw, seed, world=world)
    if processes == 1:
        yield from map(task, indices)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(task, indices, chunksize=16)


# --- on disk ---------------------------------------------------------------------------------


def _draw_into(folder: Path, counts: dict[str, int], world: World, processes: int) -> None:
    """Draw splits into an empty folder."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    rows = [("name", "labels")]
    with tqdm(total=sum(counts.values()), desc="drawing MiniVOC", unit="picture") as progress:
        for split, count in counts.items():
            names = [f"{split}_{index:05d}" for index in range(count)]
            scenes = draw_many(SPLIT_SEEDS[split], range(count), world, processes=processes)
            for name, scene in zip(names, scenes, strict=True):
                jpeg = folder / "JPEGImages" / f"{name}.jpg"
                Image.fromarray(scene.image).save(jpeg, quality=95)
                write_mask(folder / "SegmentationClass" / f"{name}.png", scene.mask)
                rows.append((name, ";".join(scene.classes)))
                progress.update()
            listing = folder / "ImageSets/Segmentation" / f"{split}.txt"
            listing.write_text("".join(f"{name}\n" for name in names))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _differences(record: Path, recipe: dict) -> str:
    """Say what differs between a folder's record and a recipe; empty: nothing does.

    A record without a version is from before version 2, so its dials are those of version 1.
    """
    if not record.exists():
        return f"it has no {record.name}"
    try:
        drawn = json.loads(record.read_text())
        before = asdict(WORLD_1) | drawn.pop("world") | drawn
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"its {record.name} is damaged"
    now = recipe["world"] | {name: recipe[name] for name in ("counts", "drawing")}
    before, now = (json.loads(json.dumps(about)) for about in (before, now))  # tuples to lists
    return ", ".join(
        f"{name} is {before.get(name)} there and {now.get(name)} here"
        for name in sorted(before | now)
        if before.get(name) != now.get(name)
    )


def write_voc(
    folder: Path, counts: dict[str, int], world: World = World(), *, processes: int = 1
) -> Path:
    """Draw splits into a folder of VOC layout: pictures, masks, split lists, labels.csv.

    An existing folder with the same arguments is kept. A new folder gets its name only when it is
    complete.

    Args:
        counts: Pictures per split; `SPLIT_SEEDS` has the names of the splits.

    Raises:
        ValueError: If the folder exists with other content.
    """
    recipe = {"world": asdict(world), "counts": counts, "drawing": DRAWING_VERSION}
    record = folder / "minivoc.json"
    with locked(folder):
        if folder.exists() and any(folder.iterdir()):
            differences = _differences(record, recipe)
            if not differences:
                return folder
            raise ValueError(
                f"{folder} holds something else than this MiniVOC ({differences}): "
                "move or delete it, or give another folder"
            )
        if folder.exists():
            folder.rmdir()
        with whole(folder) as partial:
            partial.mkdir()
            _draw_into(partial, counts, world, processes)
            (partial / record.name).write_text(json.dumps(recipe, indent=1, sort_keys=True))
    return folder
