"""Pure tensor maths on patches: transition matrices, CAM propagation, boxes, affinity labels.

Everything is batched over images and needs neither weights nor data.
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

    Each round divides by the column sums, then by the row sums; the result is symmetrised. The
    official code squares it, too: `propagate_cam` takes two steps instead, which costs patches
    squared, not cubed. Source: official clip/clip_tool.py compute_trans_mat; REFERENCE 21.

    Args:
        attention: Non-negative, rows are queries, no class token.
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
    """For every cell, the first cell (row-major) of its 8-connected part.

    Each cell takes the lowest number in sight and passes it to the cell whose number it had, and
    numbers are followed one step further: parts agree within log2(cells) rounds (FastSV, Zhang
    et al. 2020). So the number of rounds is fixed and nothing has to be asked of the device.

    Returns:
        Cells 0 to height * width - 1; height * width where a cell is in no part, and so for one
        more cell at the end, which stands for all of those.
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
    """True inside the bounding box of every 8-connected part of `cam` above the threshold.

    The comparison is made on 255 levels, as in the official code: floor(255 * cam) is strictly
    above floor(threshold * its highest level), 101 where a CAM's highest is 254.
    An empty map gives an empty mask.
    Source: official clip/clip_tool.py and utils scoremap2bbox; REFERENCE 13, 18, 19.

    Args:
        cam: In [0, 1].
        threshold: In [0, 1]; published: 0.4 for VOC, 0.7 for COCO.
        keep_last: Whether boxes that touch the right or lower edge keep their last column or
            row; the official code loses it.
    """
    height, width = cam.shape[-2:]
    levels = (cam * 255).floor()
    above = levels > (levels.amax(dim=(-2, -1), keepdim=True).double() * threshold).floor()
    first = connected_parts(above.flatten(0, 1))
    cells = torch.arange(height * width + 1, device=cam.device).expand_as(first)
    rows, columns = cells // width, cells % width
    # The box of a part is gathered at its first cell, which is in its top row.
    last = 0 if keep_last else 1
    low, high = torch.full_like(first, width), torch.zeros_like(first)
    left = low.scatter_reduce(1, first, columns, "amin")
    right = high.scatter_reduce(1, first, columns + 1, "amax").clamp(max=width - last)
    bottom = high.scatter_reduce(1, first, rows + 1, "amax").clamp(max=height - last)
    # Boxes as corner marks, filled by two cumulative sums.
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
    """Spread each class map, cut to its boxes, along patch affinity, so many steps far.

    The mask cuts what is spread, not where it goes: the result may leave the boxes.
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
    """Pairs of patches at most `radius` patches apart along both axes (Chebyshev).

    Source: official scripts/dist_clip_voc.py:116-135; REFERENCE 36.
    """
    y = torch.arange(grid_h, device=device).repeat_interleave(grid_w)
    x = torch.arange(grid_w, device=device).repeat(grid_h)
    return ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)


def affinity_labels(
    label: Integer[Tensor, "batch height width"], grid: tuple[int, int], *, radius: int = 8
) -> Integer[Tensor, "batch patch patch"]:
    """1 where two patches have the same label, 0 where not, IGNORE_INDEX where neither counts.

    A patch has the label of its top-left pixel (nearest resize). Pairs with an ignored patch or
    further apart than `radius` patches are ignored; a patch is paired with itself.
    Source: official utils/camutils.py cams_to_affinity_label; REFERENCE 36.
    """
    patches = F.interpolate(label[:, None].float(), size=grid, mode="nearest").flatten(1).long()
    ignored = patches == IGNORE_INDEX
    target = (patches[:, :, None] == patches[:, None, :]).long()
    far = ~radius_mask(*grid, radius, device=label.device)
    target[ignored[:, :, None] | ignored[:, None, :] | far] = IGNORE_INDEX
    return target
