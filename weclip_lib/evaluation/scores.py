"""Run inference (single scale; multi-scale with flip), and score decoders and pseudo labels.

Memory is bounded for pictures of any size. There are limits for the patches that the network sees,
for the logits at the picture's size, and for the pixels of the CRF.
"""

import math
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer, UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from weclip_lib.backbone import Backbone
from weclip_lib.config import CRF
from weclip_lib.data.datasets import MaskedImages, batches, normalise
from weclip_lib.decoder import Decoder
from weclip_lib.evaluation.quality import ImageCounts, joined
from weclip_lib.evaluation.regions import Regions, regions_of
from weclip_lib.ops.crf import dense_crf

Key = TypeVar("Key", bound=Hashable)
MOST_PATCHES = 4096  # of a picture in the network: 1024x1024 pixels of a ViT-B/16
LOGITS_AT_ONCE = 2**24  # at a picture's size: 64 MB
CRF_PIXELS = 2**19  # of a picture, at most: 0.7 GB with 21 classes; VOC and COCO have fewer
AHEAD = 16  # pictures that wait for their CRF, so that all cores have work
AHEAD_PIXELS = 3 * 2**19  # pixels of these, for any number of cores: 2 GB with 21 classes
Logits = Float[Tensor, "batch cls grid_h grid_w"]


@torch.no_grad()
def predict(
    backbone: Backbone,
    decoders: Sequence[Decoder],
    images: Float[Tensor, "batch 3 height width"],
    *,
    scales: Sequence[float] = (1.0, 0.75),
    flip: bool = True,
) -> list[tuple[Logits, Logits]]:
    """Return the logits of each decoder: single scale, and averaged over scales and flips.

    The backbone runs once a scale for all decoders. The logits of plain and flipped pictures are
    averaged at each scale, then over all scales on the first one's grid. No CAM is computed.
    Source: official test_msc_flip_voc.py; REFERENCE 40, 41.

    Args:
        images: Normalised; any size from one patch up.
        scales: The first is the single scale, and has to be 1.
        flip: Whether to use mirror images, too. Without them, at one scale, both logits of a
            decoder are one tensor.
    """
    single: list[Logits] = []
    scaled: list[list[Logits]] = [[] for _ in decoders]
    for scale in scales:
        resized = images
        if scale != 1:
            resized = F.interpolate(
                images, scale_factor=scale, mode="bilinear", align_corners=False
            )
        shown = torch.cat([resized, resized.flip(-1)]) if flip else resized
        features = backbone.encode_image(shown, maps=0)
        patches = features.tokens[:, :, 1:]
        for number, decoder in enumerate(decoders):
            plain, *mirrored = decoder(patches, features.grid)[0].split(len(images))
            if len(single) < len(decoders):
                single.append(plain)
            mean = torch.stack([plain, *(logits.flip(-1) for logits in mirrored)]).mean(0)
            size = single[number].shape[-2:]
            scaled[number].append(
                F.interpolate(mean, size=size, mode="bilinear", align_corners=False)
            )
    if len(scales) == 1 and not flip:
        return [(one, one) for one in single]
    return [(one, torch.stack(all_).mean(0)) for one, all_ in zip(single, scaled, strict=True)]


def enlarge(logits: Logits, size: tuple[int, int]) -> Float[Tensor, "batch cls height width"]:
    """Resize logits to `size` pixels, bilinearly."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def label_map(logits: Logits, size: tuple[int, int]) -> UInt8[Tensor, "batch height width"]:
    """Return class ids: enlarge the logits bilinearly to `size` pixels, and take the best class.

    A few classes are enlarged at a time. Of equal logits, the first wins.
    """
    together = max(1, LOGITS_AT_ONCE // (len(logits) * size[0] * size[1]))
    best, found = _best(logits[:, :together], size)
    for start in range(together, logits.shape[1], together):
        values, ids = _best(logits[:, start : start + together], size)
        better = values > best
        found[better] = ids[better] + start
        best = torch.maximum(best, values)
    return found


def _best(logits: Logits, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    values, ids = enlarge(logits, size).max(dim=1)
    return values, ids.to(torch.uint8)


def resize_longer(
    images: Float[Tensor, "batch 3 height width"], long_side: int
) -> Float[Tensor, "batch 3 new_h new_w"]:
    """Scale pictures so that their longer side has `long_side` pixels; 0: no change.

    Differs: the official code truncates, and so makes 511 pixels of some widths (REFERENCE 40).
    """
    height, width = images.shape[-2:]
    if long_side in (0, max(height, width)):
        return images
    size = [max(1, round(side * long_side / max(height, width))) for side in (height, width)]
    return F.interpolate(images, size, mode="bilinear", align_corners=False)


def shown_to(
    backbone: Backbone,
    images: Float[Tensor, "batch 3 height width"],
    long_side: int,
    scales: Sequence[float] = (1.0,),
) -> Float[Tensor, "batch 3 new_h new_w"]:
    """Scale pictures for the network: to `long_side`, and to 4096 patches at most.

    At every scale, the shorter side keeps at least a patch, however long the other is.

    Args:
        long_side: Pixels of the longer side; 0: its own, up to 4096 patches.
        scales: Of inference; the largest one has to keep within 4096 patches.
    """
    height, width = images.shape[-2:]
    longer = max(height, width)
    patches = height * width * (max(1.0, *scales) / backbone.patch_size) ** 2
    most = int(longer * math.sqrt(MOST_PATCHES / patches))
    least = math.ceil(longer * backbone.patch_size / (min(1.0, *scales) * min(height, width)))
    return resize_longer(images, max(least, min(long_side or longer, most)))


def crf_size(height: int, width: int) -> tuple[int, int]:
    """Return the size for the CRF: the picture's own, or about half a megapixel."""
    shrink = min(1.0, math.sqrt(CRF_PIXELS / (height * width)))
    return max(1, int(height * shrink)), max(1, int(width * shrink))


def with_crf(
    logits: Float[Tensor, "cls grid_h grid_w"], image: UInt8[np.ndarray, "height width 3"], crf: CRF
) -> UInt8[np.ndarray, "height width"]:
    """Apply the dense CRF to one picture; return class ids at the picture's size.

    Above half a megapixel, it works on a smaller copy, and its ids are enlarged (nearest).
    """
    height, width = image.shape[:2]
    small = crf_size(height, width)
    shown = Image.fromarray(image).resize(small[::-1])
    odds = enlarge(logits[None], small)[0].softmax(dim=0).float().cpu().numpy()
    ids = dense_crf(odds, np.asarray(shown), crf).argmax(axis=0).astype(np.uint8)
    return np.array(Image.fromarray(ids).resize((width, height), Image.Resampling.NEAREST))


def count_decoders(
    backbone: Backbone,
    decoders: Mapping[Key, Decoder],
    dataset: MaskedImages,
    *,
    scales: Sequence[float] = (1.0, 0.75),
    flip: bool = True,
    long_side: int = 0,
    batch: int = 8,
    crf: CRF | None = None,
) -> dict[Key, tuple[ImageCounts, ...]]:
    """Count the pixels of each decoder: single scale, scales and flips, with CRF.

    All pictures of a batch need one size; use `batch=1` where sizes differ.

    Args:
        long_side: Pixels of the longer side in the network (`shown_to`); 0: its own. Class ids
            are compared at the mask's size.
        crf: For the averaged logits, on all cores; None: two counts a decoder.
    """
    modes = {name: decoder.training for name, decoder in decoders.items()}
    for decoder in decoders.values():
        decoder.eval()
    count, device = dataset.labels.class_count, next(backbone.parameters()).device
    found: dict[Key, tuple[list[np.ndarray], ...]] = {n: ([], [], []) for n in decoders}
    pending: deque[tuple[Key, int, Future]] = deque()  # key, pixels, result

    def refined(logits: Tensor, image: np.ndarray, mask: Regions) -> np.ndarray:
        return mask.count(with_crf(logits, image, crf))

    def collect(left: int, pixels: int) -> None:
        while len(pending) > left or sum(own for _, own, _ in pending) > pixels:
            name, _, waiting = pending.popleft()
            found[name][2].append(waiting.result())

    with ThreadPoolExecutor() as pool:
        for rows in tqdm(
            list(batches(range(len(dataset)), batch)), desc=f"scoring {dataset.split}", unit="batch"
        ):
            pictures = [dataset.image(row) for row in rows]
            images = normalise(pictures, backbone.statistics).to(device)
            images = shown_to(backbone, images, long_side, scales)
            outputs = predict(backbone, list(decoders.values()), images, scales=scales, flip=flip)
            masks = [regions_of(dataset.mask(row), count) for row in rows]
            for name, (single, mean) in zip(decoders, outputs, strict=True):
                for place, (image, mask) in enumerate(zip(pictures, masks, strict=True)):
                    one, other = single[place : place + 1], mean[place : place + 1]
                    size = mask.known.shape
                    entries = mask.count(label_map(one, size)[0].cpu().numpy())
                    found[name][0].append(entries)
                    if mean is not single:
                        entries = mask.count(label_map(other, size)[0].cpu().numpy())
                    found[name][1].append(entries)
                    if crf:
                        pixels = math.prod(crf_size(*size))
                        collect(AHEAD - 1, AHEAD_PIXELS - pixels)
                        waiting = pool.submit(refined, other[0], image, mask)
                        pending.append((name, pixels, waiting))
        collect(0, 0)
    for name, decoder in decoders.items():
        decoder.train(modes[name])
    names, kinds = tuple(dataset.names), 3 if crf else 2
    return {
        key: tuple(ImageCounts(names, count, joined(parts)) for parts in lists[:kinds])
        for key, lists in found.items()
    }


def score_decoders(
    backbone: Backbone, decoders: Mapping[Key, Decoder], dataset: MaskedImages, **how
) -> dict[Key, tuple[Integer[Tensor, "cls cls"], ...]]:
    """Return confusion matrices of each decoder: the totals of `count_decoders`."""
    counted = count_decoders(backbone, decoders, dataset, **how)
    return {key: tuple(counts.total() for counts in kinds) for key, kinds in counted.items()}


def count_labels(
    label: Callable[[list[int]], Mapping[str, Integer[Tensor, "batch height width"]]],
    dataset: MaskedImages,
    *,
    rows: Sequence[int] | None = None,
    batch: int = 8,
) -> dict[str, ImageCounts]:
    """Count the pixels of pseudo labels against masks, which training never sees.

    Args:
        label: Returns the label maps of some rows of the data set, by name of the variant.
        rows: Of the pictures; all by default.
    """
    chosen = range(len(dataset)) if rows is None else rows
    count = dataset.labels.class_count
    counted: dict[str, list[np.ndarray]] = {}
    for part in tqdm(list(batches(chosen, batch)), desc="scoring labels", unit="batch"):
        masks = [regions_of(dataset.mask(row), count) for row in part]
        for name, found in label(part).items():
            entries = [m.count(f.cpu().numpy()) for f, m in zip(found, masks, strict=True)]
            counted.setdefault(name, []).extend(entries)
    names = tuple(dataset.names[row] for row in chosen)
    return {name: ImageCounts(names, count, joined(parts)) for name, parts in counted.items()}


def score_labels(
    label: Callable[[list[int]], Mapping[str, Integer[Tensor, "batch height width"]]],
    dataset: MaskedImages,
    **how,
) -> dict[str, Integer[Tensor, "cls cls"]]:
    """Return confusion matrices of pseudo labels: the totals of `count_labels`."""
    counted = count_labels(label, dataset, **how)
    return {name: counts.total() for name, counts in counted.items()}
