"""WeCLIP, made of frozen backbone, CAMs, RFM and decoder. It has no files, counters or modes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from weclip_lib import cam, rfm
from weclip_lib.backbone import Backbone
from weclip_lib.config import DecoderShape, Method, in_range
from weclip_lib.decoder import Decoder
from weclip_lib.labels import IGNORE_INDEX, LabelSet
from weclip_lib.ops.affinity import affinity_labels, box_mask, propagate_cam, transition_matrix
from weclip_lib.ops.losses import affinity_loss, segmentation_loss


@dataclass(frozen=True)
class Features:
    """The outputs of the frozen part for a batch; they do not change during training."""

    tokens: Float[Tensor, "block batch patch width"]  # patches of blocks 0 to L-2
    attention: Float[Tensor, "layer batch patch patch"]  # of the last blocks
    cam: Float[Tensor, "batch fg grid_h grid_w"]  # initial CAMs in [0, 1]


class WeCLIP(nn.Module):
    """The single-stage model; only the parameters of the decoder are trained.

    Args:
        backbone: Frozen CLIP.
        labels: Class names and background prompts.
        method: Settings for the way from CAMs to pseudo labels.
        shape: Size of the decoder.

    Raises:
        ValueError: If the method needs more maps, or the decoder more blocks, than there are.
    """

    foreground: Float[Tensor, "fg embedding"]  # unit text embeddings
    background: Float[Tensor, "bg embedding"]

    def __init__(
        self, backbone: Backbone, labels: LabelSet, method: Method, shape: DecoderShape
    ) -> None:
        super().__init__()
        maps = len(backbone.blocks)
        for name in ("static_layers", "rfm_layers"):
            in_range(name, getattr(method, name), 1, maps)
        in_range("blocks", shape.blocks, 0, maps - 1)
        self.backbone = backbone
        self.labels = labels
        self.method = method
        self.decoder = Decoder(
            width=backbone.width,
            class_count=labels.class_count,
            block_count=shape.blocks or len(backbone.blocks) - 1,
            dim=shape.dim,
            layers=shape.layers,
            heads=shape.heads,
            dropout=shape.dropout,
        )
        texts = (labels.class_prompts, labels.backgrounds)
        foreground, background = (backbone.encode_text(t, method.template) for t in texts)
        self.register_buffer("foreground", foreground, persistent=False)
        self.register_buffer("background", background, persistent=False)

    def extract(
        self,
        images: Float[Tensor, "batch 3 height width"],
        image_labels: Float[Tensor, "batch fg"],
    ) -> Features:
        """Compute everything that does not depend on the decoder, without gradients."""
        seen = self.backbone.encode_image(images, maps=self.method.attention_layers - 1)
        grad = cam.grad_cam(self.backbone, seen, self.foreground, self.background, image_labels)
        attention = torch.cat([seen.attention, grad.attention[None]])[..., 1:, 1:]
        return Features(seen.tokens[:, :, 1:], attention, grad.cam)

    def segment(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch cls grid_h grid_w"]:
        """Return logits on the patch grid from backbone and decoder alone, as at inference."""
        features = self.backbone.encode_image(images, maps=0)
        return self.decoder(features.tokens[:, :, 1:], features.grid)[0]

    @torch.no_grad()
    def refine_cam(
        self,
        features: Features,
        decoder_affinity: Float[Tensor, "batch patch patch"] | None = None,
    ) -> Float[Tensor, "batch fg grid_h grid_w"]:
        """Spread the initial CAMs: by RFM if the decoder's affinity is given, else statically.

        Raises:
            ValueError: If the features have fewer attention maps than the method needs.
        """
        method = self.method
        if len(features.attention) < method.attention_layers:
            raise ValueError(
                f"{len(features.attention)} attention maps were kept, the method reads "
                f"{method.attention_layers}: extract the features with this method"
            )
        if decoder_affinity is None:
            attention = rfm.static_attention(features.attention, last=method.static_layers)
        else:
            attention, _ = rfm.refine_attention(
                features.attention[-method.rfm_layers :],
                decoder_affinity.detach(),
                rule=method.rfm_rule,
                select=method.rfm_select,
                multiply=method.rfm_multiply,
            )
        boxes = box_mask(features.cam, method.box_threshold, keep_last=method.keep_box_ends)
        transition = transition_matrix(attention, rounds=method.sinkhorn_rounds)
        return propagate_cam(features.cam, transition, boxes)

    def pseudo_label(
        self,
        refined_cam: Float[Tensor, "batch fg grid_h grid_w"],
        images: Float[Tensor, "batch 3 height width"],
        image_labels: Float[Tensor, "batch fg"],
        *,
        padded: Bool[Tensor, "batch height width"] | None = None,
    ) -> Integer[Tensor, "batch height width"]:
        """Turn CAMs of `refine_cam` into class ids per pixel, with image-level labels only."""
        return cam.pseudo_label(
            refined_cam,
            images,
            image_labels,
            padded=padded if self.method.ignore_padding else None,
            par_iterations=self.method.par_iterations,
        )

    def label(
        self,
        features: Features,
        images: Float[Tensor, "batch 3 height width"],
        image_labels: Float[Tensor, "batch fg"],
        decoder_affinity: Float[Tensor, "batch patch patch"] | None = None,
        *,
        padded: Bool[Tensor, "batch height width"] | None = None,
    ) -> Integer[Tensor, "batch height width"]:
        """Run `refine_cam` (by RFM if the affinity is given, else static), then `pseudo_label`."""
        refined = self.refine_cam(features, decoder_affinity)
        return self.pseudo_label(refined, images, image_labels, padded=padded)

    def losses(
        self,
        logits: Float[Tensor, "batch cls grid_h grid_w"],
        decoder_affinity: Float[Tensor, "batch patch patch"],
        label: Integer[Tensor, "batch height width"],
        totals: Float[Tensor, "2 2"] | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the segmentation loss at label size and the unweighted affinity loss on the grid.

        Args:
            totals: `loss_counts` of a larger batch, if this batch is a part of it.
        """
        logits = logits.contiguous()  # cross-entropy is slower with channels last
        large = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=False)
        grid_h, grid_w = logits.shape[-2:]
        pairs = affinity_labels(label, (grid_h, grid_w), radius=self.method.affinity_radius)
        pixels, patches = (None, None) if totals is None else totals
        segmentation, _ = segmentation_loss(large, label, pixels)
        return segmentation, affinity_loss(decoder_affinity, pairs, patches)[0]

    @torch.no_grad()
    def loss_counts(
        self, label: Integer[Tensor, "batch height width"], grid: tuple[int, int]
    ) -> Float[Tensor, "2 2"]:
        """Count what `losses` divides by: background, foreground pixels; equal, different pairs."""
        pairs = affinity_labels(label, grid, radius=self.method.affinity_radius)
        known = ((label > 0) & (label != IGNORE_INDEX)).sum()
        counts = [(label == 0).sum(), known, (pairs == 1).sum(), (pairs == 0).sum()]
        return torch.stack(counts).view(2, 2).float()
