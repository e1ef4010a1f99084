"""Pixel-adaptive refinement (PAR): smooth class maps along similar neighbouring pixels.

Source: official WeCLIP_model/PAR.py, after Ru et al., CVPR 2022; REFERENCE 31, 32. Written as
sums of shifted slices: no one-hot convolution, no tensor of all neighbours of all channels.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

DIRECTIONS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))
COLOUR_SCALE = 0.3  # w1: softens differences measured in local standard deviations
POSITION_WEIGHT = 0.01  # w2: share of the kernel that looks at distance only


def _neighbours(
    maps: Float[Tensor, "batch channel height width"], dilations: Sequence[int]
) -> Iterator[Float[Tensor, "batch channel height width"]]:
    """Views of `maps` shifted to each neighbour, edges replicated; dilation by dilation."""
    height, width = maps.shape[-2:]
    pad = max(dilations)
    padded = F.pad(maps, [pad] * 4, mode="replicate")
    for dilation in dilations:
        for dy, dx in DIRECTIONS:
            top, left = pad + dy * dilation, pad + dx * dilation
            yield padded[..., top : top + height, left : left + width]


def par_kernel(
    images: Float[Tensor, "batch 3 height width"], dilations: Sequence[int]
) -> Float[Tensor, "batch neighbour height width"]:
    """Weights of each pixel's 8 neighbours at every dilation; they sum to 1.01."""
    count = len(DIRECTIONS) * len(dilations)
    total, squares = torch.zeros_like(images), torch.zeros_like(images)
    for neighbour in _neighbours(images, dilations):
        difference = neighbour - images  # shifting by the centre keeps flat areas exactly 0
        total += difference
        squares.addcmul_(difference, difference)
    variance = (squares - total * total / count) / (count - 1)  # unbiased
    scale = 1 / ((variance.clamp(min=0).sqrt() + 1e-8) * COLOUR_SCALE)
    kernel = images.new_empty(len(images), count, *images.shape[-2:])
    for number, neighbour in enumerate(_neighbours(images, dilations)):
        kernel[:, number] = -((neighbour - images) * scale).square().mean(dim=1)
    distance = torch.tensor(
        [(dy * dy + dx * dx) ** 0.5 * dilation for dilation in dilations for dy, dx in DIRECTIONS]
    )
    position = -(distance / ((distance.std() + 1e-8) * COLOUR_SCALE)).square()
    nearness = POSITION_WEIGHT * position.softmax(dim=0).to(images)
    return kernel.softmax(dim=1).add_(nearness[:, None, None])


@torch.no_grad()
def refine(
    images: Float[Tensor, "batch 3 image_h image_w"],
    maps: Float[Tensor, "batch map height width"],
    *,
    iterations: int = 20,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
) -> Float[Tensor, "batch map height width"]:
    """Average every map over similar neighbours, `iterations` times.

    Maps grow by 1.01 an iteration, since the kernel sums to 1.01; their order is kept.

    Args:
        images: Any linear scale of RGB; differences are measured in local standard deviations.
            Resized (align_corners=True) where the maps have another size.
        maps: One map a class, background included.
        iterations: Published: 20.
        dilations: Distances of the neighbours, in pixels.
    """
    size = maps.shape[-2:]
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bilinear", align_corners=True)
    kernel = par_kernel(images, dilations)
    for _ in range(iterations):
        refined = torch.zeros_like(maps)
        for number, neighbour in enumerate(_neighbours(maps, dilations)):
            refined.addcmul_(neighbour, kernel[:, number : number + 1])
        maps = refined
    return maps
