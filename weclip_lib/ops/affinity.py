"""Pure tensor maths on patches: transition matrices, CAM propagation, boxes, affinity labels.

All functions work on batches of images. They need neither weights nor data.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from weclip_lib.labels import IGNORE_INDEX


def min_max(maps: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch height width"]:
    """Scale every map to about [0, 1]: (x - min) / (1e-7 + max of the shifted map).

    Source: official clip/clip_tool.py scale_cam_image; REFERENCE 12. A constant map becomes 0.
    """
    shifted = maps - maps.amin(dim=(-2, -1), keepdim=True)
    return shifted / (1e-7 + shifted.amax(dim=(-2, -1), keepdim=True))


def transition_matrix(
    attention: Float[Tensor, "batch patch patch"], *, rounds: int = 3
) -> Float[Tensor, "batch patch patch"]:
    """Turn attention between patches into a symmetric transition matrix (Sinkhorn).

    Each round divides by the column sums, then by the row sums. At the end the matrix is made
    symmetric. The official code also squares it; here `propagate_cam` takes two steps, which costs
    patches^2, not patches^3. Source: official clip/clip_tool.py compute_trans_mat; REFERENCE 21.

    Args:
        attention: Non-negative, without class token; rows are queries.
        rounds: Number of column-and-row normalisations.
    """
    matrix = attention
    for _ in range(rounds):
        matrix = matrix / matrix.sum(dim=-2, keepdim=True)
        matrix = matrix / matrix.sum(dim=-1, keepdim=True)
    return (matrix + matrix.transpose(-2, -1)) / 2


def connected_parts(
    above: Bool[Tensor, "map height width"],
) -> Integer[Tensor, "map cell"]:
    """Find for every cell the first cell (row-major) of its 8-connected part.

    In each round a cell takes the lowest number among its neighbours and gives it to the cell of
    its old number. Then each number is replaced by that cell's number. This settles in log2(cells)
    rounds (FastSV, Zhang et al. 2020). So the rounds are fixed, and no device has to be waited for.

    Returns:
        Cell numbers 0 to height * width - 1. A cell outside all parts has height * width. One
        extra cell at the end also has this number and stands for all such cells.
    """
    height, width = above.shape[-2:]
    none = height * width
    inside = F.pad(above.flatten(1), (0, 1))
    first = torch.where(inside, torch.arange(none + 1, device=above.device), none)
    for _ in range(none.bit_length() + 2):
        before = first
        grid = first[:, :none].view(-1, 1, height, width).float()
        lowest = F.pad(-F.max_pool2d(-grid, 3, stride=1, padding=1).flatten(1), (0, 1))
        lowest = torch.where(inside, lowest.long(), none)
        first = first.scatter_reduce(1, first, lowest, "amin").minimum(lowest)
        first = first.gather(1, first)
    torch._assert_async((first == before).all(), "connected parts did not settle")
    return first


def box_mask(
    cam: Float[Tensor, "batch cls grid_h grid_w"], threshold: float, *, keep_last: bool = True
) -> Bool[Tensor, "batch cls grid_h grid_w"]:
    """Mark the bounding box of every 8-connected part of `cam` above the threshold.

    As in the official code, the comparison uses 255 levels: floor(255 * cam) must be strictly
    above floor(threshold * highest level). This is 101 for threshold 0.4 and highest level 254.
    An empty map gives an empty mask.
    Source: official clip/clip_tool.py and utils scoremap2bbox; REFERENCE 13, 18, 19.

    Args:
        cam: In [0, 1].
        threshold: In [0, 1]; published: 0.4 for VOC, 0.7 for COCO.
        keep_last: If True, boxes at the right or lower edge keep their last column or row;
            the official code loses it.
    """
    height, width = cam.shape[-2:]
    levels = (cam * 255).floor()
    above = levels > (levels.amax(dim=(-2, -1), keepdim=True).double() * threshold).floor()
    first = connected_parts(above.flatten(0, 1))
    cells = torch.arange(height * width + 1, device=cam.device).expand_as(first)
    rows, columns = cells // width, cells % width
    # The box of a part is stored at its first cell, which is in its top row.
    last = 0 if keep_last else 1
    low, high = torch.full_like(first, width), torch.zeros_like(first)
    left = low.scatter_reduce(1, first, columns, "amin")
    right = high.scatter_reduce(1, first, columns + 1, "amax").clamp(max=width - last)
    bottom = high.scatter_reduce(1, first, rows + 1, "amax").clamp(max=height - last)
    # Mark the corners of the boxes; two cumulative sums fill them.
    marks = cam.new_zeros(len(first), (height + 1) * (width + 1))
    weight = ((first == cells) & (rows < height)).to(cam.dtype)
    corners = ((rows, left, 1), (rows, right, -1), (bottom, left, -1), (bottom, right, 1))
    for y, x, sign in corners:
        place = torch.where(weight > 0, y * (width + 1) + x, 0)
        marks.scatter_add_(1, place, sign * weight)
    filled = marks.view(-1, height + 1, width + 1).cumsum(1).cumsum(2)[:, :height, :width]
    return (filled > 0.5).view(cam.shape)


def propagate_cam(
    cam: Float[Tensor, "batch cls grid_h grid_w"],
    transition: Float[Tensor, "batch patch patch"],
    mask: Bool[Tensor, "batch cls grid_h grid_w"],
    *,
    steps: int = 2,
) -> Float[Tensor, "batch cls grid_h grid_w"]:
    """Cut each class map to its boxes, then spread it along the patch affinity in `steps` steps.

    The mask cuts only the input: the result can reach outside the boxes.
    Source: official clip/clip_tool.py:185-191; REFERENCE 20.

    Raises:
        ValueError: If the grid does not hold exactly `patch` cells.
    """
    grid_h, grid_w = cam.shape[-2:]
    if grid_h * grid_w != transition.shape[-1]:
        raise ValueError(
            f"a {grid_h}x{grid_w} CAM has {grid_h * grid_w} cells but the transition matrix "
            f"has {transition.shape[-1]} patches: make both from the same image"
        )
    spread = rearrange(cam * mask, "b c h w -> b (h w) c")
    for _ in range(steps):
        spread = transition @ spread
    return rearrange(spread, "b (h w) c -> b c h w", h=grid_h)


def radius_mask(
    grid_h: int, grid_w: int, radius: int, device: torch.device | None = None
) -> Bool[Tensor, "patch patch"]:
    """Mark pairs of patches at most `radius` patches apart along both axes (Chebyshev).

    Source: official scripts/dist_clip_voc.py:116-135; REFERENCE 36.
    """
    y = torch.arange(grid_h, device=device).repeat_interleave(grid_w)
    x = torch.arange(grid_w, device=device).repeat(grid_h)
    return ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)


def affinity_labels(
    label: Integer[Tensor, "batch height width"], grid: tuple[int, int], *, radius: int = 8
) -> Integer[Tensor, "batch patch patch"]:
    """Return 1 for two patches of the same label, 0 for different labels, else IGNORE_INDEX.

    A patch has the label of its top-left pixel (nearest resize). A pair is ignored if one patch is
    ignored or if they are more than `radius` patches apart. A patch also pairs with itself.
    Source: official utils/camutils.py cams_to_affinity_label; REFERENCE 36.
    """
    patches = F.interpolate(label[:, None].float(), size=grid, mode="nearest").flatten(1).long()
    ignored = patches == IGNORE_INDEX
    target = (patches[:, :, None] == patches[:, None, :]).long()
    far = ~radius_mask(*grid, radius, device=label.device)
    target[ignored[:, :, None] | ignored[:, None, :] | far] = IGNORE_INDEX
    return target
