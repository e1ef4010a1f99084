"""Pixel-adaptive refinement (PAR): smooth class maps along similar neighbouring pixels.

Source: official WeCLIP_model/PAR.py, after Ru et al., CVPR 2022; REFERENCE 31, 32. This code sums
shifted slices. It needs no one-hot convolution and no tensor of all neighbours of all channels.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

DIRECTIONS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))
DILATIONS = (1, 2, 4, 8, 12, 24)  # distances of the neighbours, in pixels; official
COLOUR_SCALE = 0.3  # w1: divides distances and colour differences, in standard deviations
POSITION_WEIGHT = 0.01  # w2: weight of the part of the kernel that uses distance only
CPU_PIXELS = 320 * 320  # refined at once; more do not fit into a cache and take longer
CPU_STRIP = 64  # rows of the kernel made at once, so that intermediate results stay in cache


def pad_edges(
    maps: Float[Tensor, "batch channel height width"], dilations: Sequence[int]
) -> Float[Tensor, "batch channel padded_h padded_w"]:
    """Replicate the edge pixels outwards, up to the largest dilation."""
    return F.pad(maps, [max(dilations)] * 4, mode="replicate")


def neighbours(
    padded: Float[Tensor, "batch channel padded_h padded_w"], dilations: Sequence[int]
) -> Iterator[Float[Tensor, "batch channel height width"]]:
    """Yield views of padded maps (`pad_edges`), shifted to each neighbour, dilation by dilation."""
    pad = max(dilations)
    height, width = padded.shape[-2] - 2 * pad, padded.shape[-1] - 2 * pad
    for dilation in dilations:
        for dy, dx in DIRECTIONS:
            top, left = pad + dy * dilation, pad + dx * dilation
            yield padded[..., top : top + height, left : left + width]


def _similarity(
    padded: Float[Tensor, "batch 3 padded_h padded_w"], dilations: Sequence[int]
) -> Float[Tensor, "batch neighbour height width"]:
    """Return a softmax over each pixel's neighbours; a similar colour gives a high value."""
    pad, count = max(dilations), len(DIRECTIONS) * len(dilations)
    centre = padded[..., pad:-pad, pad:-pad].contiguous()
    difference, total, squares = (torch.zeros_like(centre) for _ in range(3))
    for neighbour in neighbours(padded, dilations):
        # Differences from the centre keep flat areas exactly 0.
        torch.sub(neighbour, centre, out=difference)
        total += difference
        squares.addcmul_(difference, difference)
    variance = (squares - total * total / count) / (count - 1)  # unbiased
    scale = 1 / ((variance.clamp(min=0).sqrt() + 1e-8) * COLOUR_SCALE)
    scores = centre.new_zeros(len(centre), count, *centre.shape[-2:])
    for score, neighbour in zip(scores.unbind(1), neighbours(padded, dilations), strict=True):
        torch.sub(neighbour, centre, out=difference).mul_(scale)
        for channel in difference.unbind(1):
            score.addcmul_(channel, channel, value=-1 / 3)
    return scores.softmax(dim=1)


def par_kernel(
    images: Float[Tensor, "batch 3 height width"], dilations: Sequence[int]
) -> Float[Tensor, "batch neighbour height width"]:
    """Return the weights of each pixel's 8 neighbours at every dilation; their sum is 1.01."""
    distance = torch.tensor(
        [(dy * dy + dx * dx) ** 0.5 * dilation for dilation in dilations for dy, dx in DIRECTIONS]
    )
    position = -(distance / ((distance.std() + 1e-8) * COLOUR_SCALE)).square()
    nearness = (POSITION_WEIGHT * position.softmax(dim=0).to(images))[:, None, None]
    padded, height = pad_edges(images, dilations), images.shape[-2]
    kernel = images.new_empty(len(images), len(distance), *images.shape[-2:])
    strip = CPU_STRIP if images.device.type == "cpu" else height
    for top in range(0, height, strip):
        rows = kernel[:, :, top : top + strip]
        around = padded[..., top : top + rows.shape[-2] + 2 * max(dilations), :]
        torch.add(_similarity(around, dilations), nearness, out=rows)
    return kernel


def smooth(
    maps: Float[Tensor, "batch map height width"],
    kernel: Float[Tensor, "batch neighbour height width"],
    dilations: Sequence[int],
) -> Float[Tensor, "batch map height width"]:
    """Replace every pixel by the weighted sum of its neighbours, once."""
    views = neighbours(pad_edges(maps, dilations), dilations)
    total = torch.zeros_like(maps)
    for weight, view in zip(kernel.split(1, 1), views, strict=True):
        total.addcmul_(view, weight)
    return total


@torch.no_grad()
def refine(
    images: Float[Tensor, "batch 3 image_h image_w"],
    maps: Float[Tensor, "batch map height width"],
    *,
    iterations: int = 20,
    dilations: Sequence[int] = DILATIONS,
) -> Float[Tensor, "batch map height width"]:
    """Average every map over similar neighbours, `iterations` times.

    Each iteration scales the maps by 1.01, the sum of the kernel. This does not change the argmax.

    Args:
        images: RGB in any linear scale; differences are measured in local standard deviations.
            Images of another size than the maps are resized (align_corners=True).
        maps: One map per class, with background.
        iterations: Published: 20.
        dilations: Distances of the neighbours, in pixels.
    """
    together = max(1, CPU_PIXELS // maps[0, 0].numel())
    if maps.device.type == "cpu" and len(maps) > together:
        groups = zip(images.split(together), maps.split(together), strict=True)
        return torch.cat([refine(*g, iterations=iterations, dilations=dilations) for g in groups])
    size = maps.shape[-2:]
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bilinear", align_corners=True)
    kernel = par_kernel(images, dilations)
    for _ in range(iterations):
        maps = smooth(maps, kernel, dilations)
    return maps
