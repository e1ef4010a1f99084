"""Softmax Grad-CAM on CLIP's last block, for all classes of a batch at once; pseudo labels.

Source: official clip/clip_tool.py and pytorch_grad_cam; REFERENCE 10-14, 29, 30.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from weclip_lib.backbone import Backbone, ImageFeatures
from weclip_lib.labels import IGNORE_INDEX
from weclip_lib.ops import par
from weclip_lib.ops.affinity import min_max
from weclip_lib.ops.last_block import mean_gradient, run_last_block


@dataclass(frozen=True)
class GradCAM:
    """Initial CAMs and what the last block said on the way."""

    cam: Float[Tensor, "batch fg grid_h grid_w"]  # in [0, 1]; 0 for absent classes
    raw: Float[Tensor, "batch fg grid_h grid_w"]  # before ReLU and scaling; signed, tiny
    probabilities: Float[Tensor, "batch prompt"]  # foreground, then background; absent: 0
    attention: Float[Tensor, "batch token token"]  # of the last block, mean over heads


def present_classes(
    image_labels: Float[Tensor, "batch fg"],
) -> tuple[Integer[Tensor, "batch slot"], Bool[Tensor, "batch slot"]]:
    """Indices of each image's classes, ascending, padded to the longest list; and which are real.

    Lets a batch carry only as many maps as its richest image has classes. That number is read on
    the host: keep labels on the CPU, where they come from, and no device has to be waited for.
    """
    slots = max(1, int(image_labels.sum(dim=1).max()))
    order = image_labels.argsort(dim=1, descending=True, stable=True)[:, :slots]
    return order, image_labels.gather(1, order) > 0


@torch.no_grad()
def grad_cam(
    backbone: Backbone,
    features: ImageFeatures,
    foreground: Float[Tensor, "fg embedding"],
    background: Float[Tensor, "bg embedding"],
    image_labels: Float[Tensor, "batch fg"],
) -> GradCAM:
    """Class activation maps of the classes that each image is labelled with.

    The score of a class is its probability among the image's own classes and all background
    prompts; image and text meet at the mean over patches. Activation and gradient are taken at
    the output of the last block's first LayerNorm.

    Args:
        foreground: Unit text embeddings of the classes.
        background: Unit text embeddings of things that are never a class.
        image_labels: 1 for the classes in the image, else 0. All 0 is legal and gives maps of 0.
    """
    last = run_last_block(backbone, features.tokens[-1])
    device = last.mean.device
    slots, real = (found.to(device) for found in present_classes(image_labels))
    texts = torch.cat([foreground, background])
    projection, scale = backbone.visual.proj, backbone.logit_scale
    embedding = last.mean @ projection
    length = embedding.norm(dim=-1, keepdim=True)
    unit = embedding / length
    excluded = F.pad(image_labels.to(device) <= 0, (0, len(background)))  # no background is
    probabilities = (scale * unit @ texts.T).masked_fill(excluded, -torch.inf).softmax(dim=-1)
    # Backwards: softmax, cosine, projection; then the block.
    targets = probabilities.gather(1, slots)[..., None]
    d_scores = targets * (F.one_hot(slots, len(texts)) - probabilities[:, None])
    d_unit = scale * d_scores @ texts
    d_embedding = d_unit - (d_unit * unit[:, None]).sum(dim=-1, keepdim=True) * unit[:, None]
    d_mean = (d_embedding / length[:, None]) @ projection.T
    channel_weights = mean_gradient(backbone, last, d_mean)
    maps = einsum(channel_weights, last.activation[:, 1:], "b k w, b n w -> b k n")
    maps = rearrange(maps.float(), "b k (h w) -> b k h w", h=features.grid[0])
    maps = maps * real[..., None, None]
    scaled = min_max(min_max(maps.relu()))  # twice, as published: REFERENCE 12
    empty = maps.new_zeros(*image_labels.shape, *features.grid)
    places = slots[..., None, None].expand_as(maps)
    cam, raw = (empty.scatter(1, places, found) for found in (scaled, maps))
    return GradCAM(cam, raw, probabilities, last.attention.float().mean(dim=1))


def enlarge_cam(
    cam: Float[Tensor, "batch cls grid_h grid_w"], size: tuple[int, int]
) -> Float[Tensor, "batch cls height width"]:
    """Scale every map to [0, 1] on its grid, then enlarge it bilinearly to `size` pixels.

    Source: official clip/clip_tool.py generate_cam_label; REFERENCE 29.
    """
    return F.interpolate(min_max(cam), size=size, mode="bilinear", align_corners=False)


@torch.no_grad()
def pseudo_label(
    cam: Float[Tensor, "batch fg grid_h grid_w"],
    images: Float[Tensor, "batch 3 height width"],
    image_labels: Float[Tensor, "batch fg"],
    *,
    padded: Bool[Tensor, "batch height width"] | None = None,
    par_iterations: int = 20,
) -> Integer[Tensor, "batch height width"]:
    """Turn CAMs into class ids per pixel: scale, enlarge, add background, PAR, argmax.

    Background is 1 minus the highest class map.
    Source: official WeCLIP_model/model_attn_aff_voc.py:158-170; REFERENCE 29, 30.

    Args:
        images: In any linear scale of RGB, for PAR; their size is the label's.
        padded: Pixels that are no picture; they become IGNORE_INDEX. None: there are none, or
            they are trained on as content, as in the official code.
        par_iterations: 0 leaves PAR out.
    """
    slots, real = (found.to(cam.device) for found in present_classes(image_labels))
    maps = cam.gather(1, slots[..., None, None].expand(-1, -1, *cam.shape[-2:]))
    maps = enlarge_cam(maps.float(), tuple(images.shape[-2:])) * real[..., None, None]
    maps = torch.cat([1 - maps.amax(dim=1, keepdim=True), maps], dim=1)
    if par_iterations:
        maps = par.refine(images, maps, iterations=par_iterations)
    ids = F.pad(torch.where(real, slots + 1, 0), (1, 0))
    # max() walks the maps in memory order; argmax() does not, and takes several times as long.
    label = ids.gather(1, maps.max(dim=1).indices.flatten(1)).view(-1, *images.shape[-2:])
    return label if padded is None else label.masked_fill(padded, IGNORE_INDEX)
