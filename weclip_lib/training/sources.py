"""Sources of training steps: cached features, or newly augmented pictures.

Only the seed and the step number decide which pictures a step takes, and how they are augmented.
So a resumed run goes on as if it had never stopped.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from weclip_lib.data.datasets import LabelledImages, MaskedImages, normalise_pixels
from weclip_lib.labels import IGNORE_INDEX
from weclip_lib.model import Features, WeCLIP
from weclip_lib.storage.files import Unusable
from weclip_lib.training.features import FeatureCache

SCALES = (0.5, 2.0)  # of augmentation; official datasets/transforms.py, REFERENCE 38


@dataclass(frozen=True)
class Batch(ABC):
    """Pictures of a step. Tokens and features are costly, so they are made on demand."""

    rows: list[int]
    image_labels: Float[Tensor, "batch fg"]  # on the CPU: see cam.present_classes
    grid: tuple[int, int]
    label: Integer[Tensor, "batch height width"] | None  # given: true masks, or static labels
    padded: Bool[Tensor, "batch height width"] | None  # pixels outside the picture

    @abstractmethod
    def tokens(self) -> Float[Tensor, "block batch patch width"]:
        """Get those of all blocks that the decoder may read."""

    @abstractmethod
    def features(self) -> Features:
        """Get all output of the frozen part."""

    @abstractmethod
    def pixels(self) -> Float[Tensor, "batch 3 height width"]:
        """Get normalised pictures."""


@dataclass(frozen=True)
class CachedBatch(Batch):
    """Rows of a feature cache."""

    cache: FeatureCache

    def tokens(self) -> Float[Tensor, "block batch patch width"]:
        return self.cache.tokens_of(self.rows)

    def features(self) -> Features:
        return self.cache.features_of(self.rows)

    def pixels(self) -> Float[Tensor, "batch 3 height width"]:
        return self.cache.pixels_of(self.rows)


@dataclass(frozen=True)
class EncodedBatch(Batch):
    """Pictures that the backbone encodes on demand."""

    model: WeCLIP
    images: Float[Tensor, "batch 3 height width"]

    def tokens(self) -> Float[Tensor, "block batch patch width"]:
        return self.model.backbone.encode_image(self.images, maps=0).tokens[:, :, 1:]

    def features(self) -> Features:
        return self.model.extract(self.images, self.image_labels)

    def pixels(self) -> Float[Tensor, "batch 3 height width"]:
        return self.images


def _digest(about: object) -> str:
    return sha256(repr(about).encode()).hexdigest()


def part_of(rows: Sequence, part: int, of: int) -> list:
    """Cut `rows` in `of` equal parts; return number `part`."""
    size = len(rows) // of
    return list(rows[part * size : (part + 1) * size])


class CachedSource:
    """Cached features of pictures, plain or mirrored, with a given label for each.

    Args:
        labels: Of every row of `cache`: static pseudo labels, or true masks.
        rows: To train on; None: all.
    """

    def __init__(
        self,
        cache: FeatureCache,
        labels: UInt8[Tensor, "row height width"],
        rows: Sequence[int] | None = None,
    ) -> None:
        self.cache, self.labels = cache, labels
        self.pool = list(range(len(cache.image_labels)) if rows is None else rows)
        given = sha256(labels.numpy().tobytes()).hexdigest()
        self.about = {"features": cache.key, "labels": given, "rows": _digest(self.pool)}
        self.key = _digest(self.about)

    def __len__(self) -> int:
        return len(self.pool)

    def names(self, rows: Sequence[int]) -> list[str]:
        """Return row numbers, since features have no names."""
        return [f"row {row}" for row in rows]

    def batches(
        self, model: WeCLIP, seed: int, steps: range, size: int, parts: Sequence[int], of: int
    ) -> Iterator[Batch]:
        """Draw pictures of each step without replacement, independently of other steps."""
        for step in steps:
            drawn = self.drawn(seed, step, size)
            for part in parts:
                yield self.batch(part_of(drawn, part, of))

    def drawn(self, seed: int, step: int, size: int) -> list[int]:
        """Draw the rows of a step."""
        rng = np.random.default_rng([seed, step])
        return rng.choice(self.pool, size, replace=False).tolist()

    def batch(self, rows: list[int]) -> CachedBatch:
        """Make a batch of rows."""
        return CachedBatch(
            rows=rows,
            image_labels=self.cache.image_labels[rows],
            grid=tuple(self.cache.cam.shape[-2:]),
            label=self.labels[rows].to(self.cache.device).long(),
            padded=None,
            cache=self.cache,
        )


@dataclass(frozen=True)
class Augmented:
    """A crop of a rescaled and perhaps mirrored picture."""

    pixels: UInt8[np.ndarray, "crop crop 3"]  # 0 where padded
    padded: Bool[np.ndarray, "crop crop"]
    mask: UInt8[np.ndarray, "crop crop"] | None  # of the same crop; IGNORE_INDEX where padded


def augment(
    image: UInt8[np.ndarray, "height width 3"],
    mask: UInt8[np.ndarray, "height width"] | None,
    crop: int,
    rng: np.random.Generator,
    scales: tuple[float, float] = SCALES,
) -> Augmented:
    """Rescale, mirror with probability 0.5, and crop at random; pad small pictures.

    The crop is drawn from all places with the largest overlap. A smaller picture lies anywhere
    within the crop. Source: official datasets/transforms.py and
    voc.py; REFERENCE 38.
    """
    scale, mirrored = rng.uniform(*scales), rng.random() < 0.5
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    picture = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    if mask is not None:
        mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    if mirrored:
        picture, mask = picture[:, ::-1], None if mask is None else mask[:, ::-1]
    spans = []
    for side in (height, width):
        start = int(rng.integers(abs(side - crop) + 1))
        common = min(side, crop)
        taken, put = (start, 0) if side > crop else (0, start)
        spans.append((slice(taken, taken + common), slice(put, put + common)))
    (from_y, to_y), (from_x, to_x) = spans
    pixels, padded = np.zeros((crop, crop, 3), np.uint8), np.ones((crop, crop), bool)
    pixels[to_y, to_x], padded[to_y, to_x] = picture[from_y, from_x], False
    if mask is None:
        return Augmented(pixels, padded, None)
    target = np.full((crop, crop), IGNORE_INDEX, np.uint8)
    target[to_y, to_x] = mask[from_y, from_x]
    return Augmented(pixels, padded, target)


class _Crops(Dataset):
    """Augmented pictures by (row, step, place in the step); workers decode them."""

    def __init__(self, images: LabelledImages, crop: int, seed: int, scales: tuple) -> None:
        self.images, self.crop, self.seed, self.scales = images, crop, seed, scales

    def __getitem__(self, place: tuple[int, int, int]) -> tuple[Augmented, int] | Unusable:
        row, step, position = place
        try:
            mask = self.images.mask(row) if isinstance(self.images, MaskedImages) else None
            image = self.images.image(row)
        except Unusable as error:  # raised here, it would carry the worker's traceback
            return error
        rng = np.random.default_rng([self.seed, step, position])
        return augment(image, mask, self.crop, rng, self.scales), row


def _joined(
    found: list[tuple[Augmented, int] | Unusable],
) -> tuple[Tensor, Tensor, Tensor | None, list[int]] | Unusable:
    for one in found:
        if isinstance(one, Unusable):
            return one
    pixels, padded = (
        np.stack([getattr(a, name) for a, _ in found]) for name in ("pixels", "padded")
    )
    masks = [augmented.mask for augmented, _ in found]
    label = None if masks[0] is None else torch.from_numpy(np.stack(masks))
    return torch.from_numpy(pixels), torch.from_numpy(padded), label, [row for _, row in found]


class AugmentedSource:
    """Pictures of any size, newly augmented and encoded in every step.

    Epochs are shuffled: every picture comes once before any comes again.

    Args:
        images: Masks of `MaskedImages` teach the decoder: full supervision.
        crop: Pixels a side.
        rows: Of them to train on; None: all.
        workers: Processes that decode and augment; 0: none.
        scales: Range of the rescaling; (1, 1) for none.
    """

    def __init__(
        self,
        images: LabelledImages,
        crop: int,
        *,
        rows: Sequence[int] | None = None,
        workers: int = 0,
        scales: tuple[float, float] = SCALES,
    ) -> None:
        self.images, self.crop, self.workers, self.scales = images, crop, workers, scales
        self._shuffled: tuple[tuple[int, int], np.ndarray] | None = None  # the last epoch's order
        self.pool = list(range(len(images)) if rows is None else rows)
        self.about = {**images.digests, "rows": _digest((self.pool, crop, scales))}
        self.key = _digest(self.about)

    def __len__(self) -> int:
        return len(self.pool)

    def names(self, rows: Sequence[int]) -> list[str]:
        """Return picture names."""
        return [self.images.names[row] for row in rows]

    def drawn(self, seed: int, step: int, size: int) -> list[int]:
        """Draw the rows of a step."""
        found = []
        for place in range(step * size, (step + 1) * size):
            epoch, position = divmod(place, len(self))
            found.append(self.pool[self._order(seed, epoch)[position]])
        return found

    def _order(self, seed: int, epoch: int) -> Integer[np.ndarray, " image"]:
        if self._shuffled is None or self._shuffled[0] != (seed, epoch):
            order = np.random.default_rng([seed, epoch, len(self)]).permutation(len(self))
            self._shuffled = (seed, epoch), order
        return self._shuffled[1]

    def batches(
        self, model: WeCLIP, seed: int, steps: range, size: int, parts: Sequence[int], of: int
    ) -> Iterator[Batch]:
        """Yield batches; each worker is two ahead of the trainer."""

        def places() -> Iterator[list[tuple[int, int, int]]]:
            for step in steps:
                drawn = [(row, step, i) for i, row in enumerate(self.drawn(seed, step, size))]
                yield from (part_of(drawn, part, of) for part in parts)

        device = model.foreground.device
        loader = DataLoader(
            _Crops(self.images, self.crop, seed, self.scales),
            batch_sampler=places(),
            num_workers=self.workers,
            collate_fn=_joined,
            generator=torch.Generator(),  # else it shares the generator of dropout
            pin_memory=device.type == "cuda",
        )
        for found in loader:
            if isinstance(found, Unusable):
                raise found
            pixels, padded, label, rows = found
            images = pixels.to(device, non_blocking=True)
            side = self.crop // model.backbone.patch_size
            yield EncodedBatch(
                rows=rows,
                image_labels=self.images.image_labels[rows],
                grid=(side, side),
                label=None if label is None else label.to(device).long(),
                padded=padded.to(device),
                model=model,
                images=normalise_pixels(images, model.backbone.statistics),
            )


Source = CachedSource | AugmentedSource
