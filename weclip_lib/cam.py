"""Softmax Grad-CAM on CLIP, for all classes of a batch at once, and pseudo labels from CAMs.

Source: official clip/clip_tool.py and pytorch_grad_cam; REFERENCE 10-14, 29, 30.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from weclip_lib.backbone import Backbone, ImageFeatures, run_block
from weclip_lib.labels import IGNORE_INDEX
from weclip_lib.ops import par
from weclip_lib.ops.affinity import min_max


@dataclass(frozen=True)
class GradCAM:
    """Initial CAMs, with the scores and the attention of the same run."""

    cam: Float[Tensor, "batch fg grid_h grid_w"]  # in [0, 1]; 0 for absent classes
    raw: Float[Tensor, "batch fg grid_h grid_w"]  # before ReLU and scaling; signed, tiny
    probabilities: Float[Tensor, "batch prompt"]  # foreground, then background; absent: 0
    attention: Float[Tensor, "batch token token"]  # of the last block, mean over heads


def present_classes(
    image_labels: Float[Tensor, "batch fg"],
) -> tuple[Integer[Tensor, "batch slot"], Bool[Tensor, "batch slot"]]:
    """Return the ascending class indices of each image, padded to one length, and which are real.

    So a batch holds only as many maps as the largest number of classes in one image. The CPU reads
    this number. Keep the labels on the CPU, so that it does not wait for another device.
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
    *,
    block: int | None = None,
) -> GradCAM:
    """Compute class activation maps (CAMs) for the labelled classes of each image.

    The score of a class is its probability among the image's own classes and all background
    prompts. The activation A and the gradient are taken at the output of a block's first
    LayerNorm. A channel's weight is the gradient of the class score, averaged over patches. The
    map is the weighted sum of the channels of A.

    Args:
        foreground: Unit text embeddings of the classes.
        background: Unit text embeddings of the background prompts.
        image_labels: 1 for the classes in the image, else 0. All 0 is legal and gives maps of 0.
        block: Number of the block, from 0; None: the last one, as published.

    Raises:
        ValueError: If there is no such block.
    """
    block = len(backbone.blocks) - 1 if block is None else block
    tokens = backbone.entering(features, block)
    slots, real = (found.to(tokens.device) for found in present_classes(image_labels))
    excluded = F.pad(image_labels.to(tokens.device) <= 0, (0, len(background)))  # background: no
    with torch.enable_grad():
        activation = backbone.blocks[block].ln_1(tokens).requires_grad_()
        hidden, attention = run_block(backbone.blocks[block], tokens, activation)
        for later in backbone.blocks[block + 1 :]:
            hidden, attention = run_block(later, hidden)
        texts = torch.cat([foreground, background])
        logits = backbone.logit_scale * backbone.pool(hidden) @ texts.T
        probabilities = logits.masked_fill(excluded, -torch.inf).softmax(dim=-1)
        scores = probabilities.gather(1, slots).sum(dim=0)  # images are independent
        each = torch.eye(len(scores)).to(scores)
        (gradient,) = torch.autograd.grad(scores, activation, each, is_grads_batched=True)
    channel_weights = gradient[:, :, 1:].mean(dim=2)
    maps = einsum(channel_weights, activation.detach()[:, 1:], "k b w, b n w -> b k n")
    maps = rearrange(maps.float(), "b k (h w) -> b k h w", h=features.grid[0])
    maps = maps * real[..., None, None]
    scaled = min_max(min_max(maps.relu()))  # twice, as published: REFERENCE 12
    empty = maps.new_zeros(*image_labels.shape, *features.grid)
    places = slots[..., None, None].expand_as(maps)
    cam, raw = (empty.scatter(1, places, found) for found in (scaled, maps))
    return GradCAM(cam, raw, probabilities.detach(), attention.detach().float())


def enlarge_cam(
    cam: Float[Tensor, "batch cls grid_h grid_w"], size: tuple[int, int]
) -> Float[Tensor, "batch cls height width"]:
    """Scale every map to [0, 1] on its grid, then enlarge it bilinearly to `size` pixels.

    Source: official clip/clip_tool.py generate_cam_label; REFERENCE 29.
    """
    return F.interpolate(min_max(cam), size=size, mode="bilinear", align_corners=False)


def with_background(
    cam: Float[Tensor, "batch cls grid_h grid_w"], size: tuple[int, int]
) -> Float[Tensor, "batch 1+cls height width"]:
    """Enlarge CAMs and put the background before them: 1 minus their maximum.

    Source: official WeCLIP_model/model_attn_aff_voc.py:158-170; REFERENCE 30.
    """
    maps = enlarge_cam(cam, size)
    return torch.cat([1 - maps.amax(dim=1, keepdim=True), maps], dim=1)


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

    Source: official WeCLIP_model/model_attn_aff_voc.py:158-170; REFERENCE 29, 30.

    Args:
        images: In any linear scale of RGB, for PAR; the label has the same size.
        padded: Pixels of padding; they become IGNORE_INDEX. None: there are none, or they are
            labelled like the image, as in the official code.
        par_iterations: 0 skips PAR.
    """
    slots, real = (found.to(cam.device) for found in present_classes(image_labels))
    maps = cam.gather(1, slots[..., None, None].expand(-1, -1, *cam.shape[-2:]))
    maps = maps.float() * real[..., None, None]
    height, width = images.shape[-2:]
    maps = with_background(maps, (height, width))
    if par_iterations:
        maps = par.refine(images, maps, iterations=par_iterations)
    ids = F.pad(torch.where(real, slots + 1, 0), (1, 0))
    # max() reads the maps in memory order; argmax() does not, and takes several times as long.
    label = ids.gather(1, maps.max(dim=1).indices.flatten(1)).view(-1, *images.shape[-2:])
    return label if padded is None else label.masked_fill(padded, IGNORE_INDEX)
