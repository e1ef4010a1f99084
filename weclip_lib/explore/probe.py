"""Look inside the frozen backbone: Grad-CAM at any block, attention of any block and head.

Training needs neither. `cam.py` has the last block's Grad-CAM, written out and batched; this one
goes back through as many blocks as it has to, by autograd.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from weclip_lib.backbone import Backbone, ImageFeatures, attend, attention_heads, embed, run_block
from weclip_lib.ops.affinity import min_max


def entering(
    backbone: Backbone,
    images: Float[Tensor, "batch 3 height width"],
    features: ImageFeatures,
    block: int,
) -> Float[Tensor, "batch token channel"]:
    """Tokens that enter a block.

    Args:
        features: Of `images`.
        block: Counts from 0.

    Raises:
        ValueError: If the backbone has no such block.
    """
    if not 0 <= block < len(backbone.blocks):
        raise ValueError(f"there is no block {block}: choose 0 to {len(backbone.blocks) - 1}")
    return features.tokens[block - 1] if block else embed(backbone.visual, images)[0]


@torch.no_grad()
def head_attention(
    backbone: Backbone,
    images: Float[Tensor, "batch 3 height width"],
    features: ImageFeatures,
    block: int,
) -> Float[Tensor, "batch head token token"]:
    """Attention of every head of a block; rows are queries and sum to 1, class token first."""
    tokens = entering(backbone, images, features, block)
    chosen = backbone.blocks[block]
    return attention_heads(chosen.attn, chosen.ln_1(tokens))[3]


def block_grad_cam(
    backbone: Backbone,
    images: Float[Tensor, "batch 3 height width"],
    features: ImageFeatures,
    foreground: Float[Tensor, "fg embedding"],
    background: Float[Tensor, "bg embedding"],
    block: int,
) -> tuple[Float[Tensor, "batch fg grid_h grid_w"], Float[Tensor, "batch prompt"]]:
    """CAMs in [0, 1] from the output of any block's first LayerNorm, and the probabilities.

    All `foreground` classes count as present. At the last block this is `cam.grad_cam`.
    """
    tokens = entering(backbone, images, features, block)
    chosen, later = backbone.blocks[block], backbone.blocks[block + 1 :]
    with torch.enable_grad():
        activation = chosen.ln_1(tokens).detach().requires_grad_()
        hidden = tokens + chosen.ls_1(attend(chosen.attn, activation)[0])
        hidden = hidden + chosen.ls_2(chosen.mlp(chosen.ln_2(hidden)))
        for other in later:
            hidden, _ = run_block(other, hidden)
        mean = backbone.visual.ln_post(hidden[:, 1:]).mean(dim=1)
        unit = F.normalize(mean @ backbone.visual.proj, dim=-1)
        scores = backbone.logit_scale * unit @ torch.cat([foreground, background]).T
        probabilities = scores.softmax(dim=-1)
        totals = probabilities[:, : len(foreground)].sum(dim=0)
        gradients = [
            torch.autograd.grad(total, activation, retain_graph=True)[0] for total in totals
        ]
    weights = torch.stack(gradients, dim=1)[:, :, 1:].mean(dim=2)
    maps = einsum(weights, activation.detach()[:, 1:], "b k w, b n w -> b k n").relu()
    maps = rearrange(maps, "b k (h w) -> b k h w", h=features.grid[0])
    return min_max(min_max(maps)), probabilities.detach()
