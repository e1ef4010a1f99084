"""CLIP's last block, forwards, and backwards for many targets of one picture at once.

Grad-CAM wants the gradient at the output of the block's first LayerNorm only as its mean over
patches: one vector a class. So the backward pass is written out instead of left to autograd.
What is linear in the patches is summed before it is multiplied, and what does not depend on the
class is computed once for all classes. In the names, `d_x` is the gradient with respect to x.
"""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from weclip_lib.backbone import Backbone, Heads, attention_heads

Tokens = Float[Tensor, "batch token width"]


@dataclass(frozen=True)
class Standardised:
    """A LayerNorm before its weights, over channels."""

    values: Float[Tensor, "batch patch width"]
    inverse: Float[Tensor, "batch patch 1"]  # 1 / standard deviation

    @classmethod
    def of(cls, inputs: Tensor, norm: nn.LayerNorm) -> "Standardised":
        centred = inputs - inputs.mean(dim=-1, keepdim=True)
        inverse = (centred.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt()
        return cls(centred * inverse, inverse)


@dataclass(frozen=True)
class LastBlock:
    """What the block's forward pass leaves behind; class token first where there is one."""

    activation: Tokens  # output of ln_1
    query: Heads
    key: Heads
    value: Heads
    attention: Float[Tensor, "batch head token token"]
    mixed: Heads  # attention @ value
    second: Standardised  # input of ln_2, patches only
    inner: Float[Tensor, "batch patch hidden"]  # before the MLP's non-linearity
    post: Standardised  # input of ln_post
    mean: Float[Tensor, "batch width"]  # over patches, of ln_post's output


def _scaled(linear: nn.Linear, scale: nn.Module) -> Float[Tensor, "out in"]:
    """The weight of a linear layer together with the LayerScale behind it, if there is one."""
    gamma = getattr(scale, "gamma", None)
    return linear.weight if gamma is None else gamma[:, None] * linear.weight


@torch.no_grad()
def run_last_block(backbone: Backbone, tokens: Tokens) -> LastBlock:
    """The forward pass, from the output of the block before to the mean over patches."""
    block, post_norm = backbone.blocks[-1], backbone.visual.ln_post
    activation = block.ln_1(tokens)
    query, key, value, attention = attention_heads(block.attn, activation)
    mixed = attention @ value
    attended = block.attn.out_proj(rearrange(mixed, "b h n c -> b n (h c)"))
    hidden = (tokens + block.ls_1(attended))[:, 1:]  # the class token is not needed any more
    second = Standardised.of(hidden, block.ln_2)
    inner = block.mlp.c_fc(second.values * block.ln_2.weight + block.ln_2.bias)
    outputs = hidden + block.ls_2(block.mlp.c_proj(block.mlp.gelu(inner)))
    post = Standardised.of(outputs, post_norm)
    mean = post.values.mean(dim=1) * post_norm.weight + post_norm.bias
    return LastBlock(activation, query, key, value, attention, mixed, second, inner, post, mean)


def _slope(function: nn.Module, inputs: Tensor) -> Tensor:
    """Derivative of an element-wise function."""
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        function(inputs).sum().backward()
    return inputs.grad


@torch.no_grad()
def mean_gradient(
    backbone: Backbone, last: LastBlock, d_mean: Float[Tensor, "batch target width"]
) -> Float[Tensor, "batch target width"]:
    """Gradient at the output of ln_1, averaged over patches, of every target of a picture.

    Args:
        d_mean: Gradient of each target with respect to `last.mean`.
    """
    block, patch_count = backbone.blocks[-1], last.inner.shape[1]
    post, second = last.post, last.second
    # ln_post. What arrives is the same at every patch; what leaves is a sum of two parts, one
    # that is the same but for a factor, and one along the patch itself.
    arriving = d_mean / patch_count * backbone.visual.ln_post.weight
    centred = arriving - arriving.mean(dim=-1, keepdim=True)
    along = einsum(arriving, post.values, "b k w, b n w -> b k n")[..., None] / arriving.shape[-1]
    inverse = post.inverse[:, None]
    d_outputs = (centred[:, :, None] - along * post.values[:, None]) * inverse
    # MLP: multiply the two parts instead of every target's sum of them.
    back = _scaled(block.mlp.c_proj, block.ls_2)
    d_inner = (centred @ back)[:, :, None] - along * (post.values @ back)[:, None]
    d_inner *= inverse * _slope(block.mlp.gelu, last.inner)[:, None]
    d_second = (d_inner @ block.mlp.c_fc.weight) * block.ln_2.weight
    along = (d_second * second.values[:, None]).mean(dim=-1, keepdim=True)
    d_second -= d_second.mean(dim=-1, keepdim=True) + along * second.values[:, None]
    d_hidden = d_outputs + d_second * second.inverse[:, None]
    # Attention: only patches ask, since the class token's output is not used.
    d_mixed = d_hidden @ _scaled(block.attn.out_proj, block.ls_1)
    d_mixed = rearrange(d_mixed, "b k n (h c) -> b h k n c", h=last.query.shape[1])
    asked = last.attention[:, :, 1:]  # rows of patches; columns of all tokens
    d_value = einsum(asked, d_mixed, "b h n m, b h k n c -> b h k m c")
    spent = einsum(d_mixed, last.mixed[:, :, 1:], "b h k n c, b h n c -> b h k n")
    d_columns = (d_value * last.value[:, :, None]).sum(dim=-1) - spent @ asked  # of the logits
    d_first = einsum(d_mixed, last.value[:, :, 0], "b h k n c, b h c -> b h k n") - spent
    d_first = d_first * asked[:, :, None, :, 0]  # the column of the class token
    scale = last.query.shape[-1] ** -0.5
    sums = [  # over patches; the logits' gradients of one query sum to zero
        scale * einsum(d_columns, last.key, "b h k m, b h m c -> b h k c"),
        -scale * einsum(d_first, last.query[:, :, 1:], "b h k n, b h n c -> b h k c"),
        d_value[..., 1:, :].sum(dim=-2),
    ]
    d_projected = rearrange(sums, "three b h k c -> b k (three h c)")
    return d_projected @ block.attn.in_proj_weight / patch_count
