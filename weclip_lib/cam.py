"""Softmax Grad-CAM on CLIP, for all classes of a batch at once, and pseudo labels from CAMs.

Source: official clip/clip_tool.py and pytorch_grad_cam; REFERENCE 10-14, 29, 30.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from weclip_lib.backbone import Backbone, ImageFeatures, project, run_block
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
    image_labels: Float[Tensor, "batch fg"], device: torch.device
) -> Iterator[tuple[Integer[Tensor, " image"], Integer[Tensor, "image slot"]]]:
    """Yield the images with equally many classes, as rows, and their classes in ascending order.

    No image is padded. The CPU reads the labels: keep them there, or it waits for another device.
    """
    present = image_labels.cpu() > 0
    counts = present.sum(dim=1)
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero()[:, 0]
        classes = present[rows].nonzero()[:, 1].view(len(rows), count)
        yield rows.to(device, non_blocking=True), classes.to(device, non_blocking=True)


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
    entering, (first, *later) = backbone.entering(features, block), backbone.blocks[block:]
    texts = torch.cat([foreground, background])
    excluded = F.pad(image_labels <= 0, (0, len(background))).to(entering.device, non_blocking=True)
    raw = entering.new_zeros(*image_labels.shape, *features.grid, dtype=torch.float32)
    attention = raw.new_empty(len(raw), *[entering.shape[1]] * 2)
    probabilities = entering.new_empty(excluded.shape)
    for rows, classes in present_classes(image_labels, entering.device):
        tokens = entering[rows]
        activation = first.ln_1(tokens)
        with torch.enable_grad():
            projected = project(first.attn, activation).requires_grad_()
            hidden, weights = run_block(first, tokens, projected)
            for other in later:
                hidden, weights = run_block(other, hidden)
            logits = backbone.logit_scale * backbone.pool(hidden) @ texts.T
            found = logits.masked_fill(excluded[rows], -torch.inf).softmax(-1, entering.dtype)
            scores = found.gather(1, classes).sum(dim=0).unbind()  # images are independent
        attention[rows], probabilities[rows] = weights.detach().float(), found.detach()
        for score, foreground_index in zip(scores, classes.T, strict=True):
            (gradient,) = torch.autograd.grad(score, projected, retain_graph=True)
            # P = W A + b for every patch. So the mean of ds/dA is the mean of ds/dP, times W.
            mean = rearrange(gradient[..., 1:, :].mean(dim=-2), "three b h d -> b (three h d)")
            channels = mean @ first.attn.in_proj_weight
            maps = einsum(channels, activation[:, 1:], "b w, b n w -> b n")
            raw[rows, foreground_index] = maps.view(-1, *features.grid).to(raw)
    cam = min_max(min_max(raw.relu()))  # twice, as published: REFERENCE 12
    return GradCAM(cam, raw, probabilities, attention)


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
    size = (images.shape[-2], images.shape[-1])
    label = torch.zeros(len(images), *size, dtype=torch.long, device=cam.device)
    for rows, classes in present_classes(image_labels, cam.device):
        if not classes.shape[1]:
            continue  # background everywhere
        maps = with_background(cam[rows[:, None], classes].float(), size)
        if par_iterations:
            maps = par.refine(images[rows], maps, iterations=par_iterations)
        ids = F.pad(classes + 1, (1, 0))
        # max() reads the maps in memory order; argmax() does not, and takes several times as long.
        label[rows] = ids.gather(1, maps.max(dim=1).indices.flatten(1)).view(-1, *size)
    return label if padded is None else label.masked_fill(padded, IGNORE_INDEX)
