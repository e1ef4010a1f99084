"""The written-out backward pass against autograd."""

import open_clip
import pytest
import torch

from weclip_lib.backbone import IMAGENET_STATISTICS, Backbone, attend
from weclip_lib.ops.last_block import mean_gradient, run_last_block


def small_backbone(*, quick_gelu: bool, layer_scale: float | None) -> Backbone:
    clip = open_clip.CLIP(
        embed_dim=10,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=3,
            width=24,
            head_width=8,
            patch_size=4,
            image_size=16,
            ls_init_value=layer_scale,
        ),
        text_cfg=open_clip.CLIPTextCfg(8, vocab_size=20, width=16, heads=2, layers=1),
        quick_gelu=quick_gelu,
    ).double()
    for parameter in clip.parameters():  # norms, biases and scales as well
        torch.nn.init.normal_(parameter, std=0.4)
    return Backbone(clip, None, IMAGENET_STATISTICS)


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_mean_gradient_is_autograds(quick_gelu, layer_scale) -> None:
    torch.manual_seed(0)
    backbone = small_backbone(quick_gelu=quick_gelu, layer_scale=layer_scale)
    tokens = torch.randn(2, 1 + 3 * 5, 24, dtype=torch.double)
    d_mean = torch.randn(2, 7, 24, dtype=torch.double)
    last = run_last_block(backbone, tokens)
    ours = mean_gradient(backbone, last, d_mean)

    block = backbone.blocks[-1]
    activation = block.ln_1(tokens).requires_grad_()
    attended, attention = attend(block.attn, activation)
    hidden = tokens + block.ls_1(attended)
    hidden = hidden + block.ls_2(block.mlp(block.ln_2(hidden)))
    mean = backbone.visual.ln_post(hidden[:, 1:]).mean(dim=1)
    torch.testing.assert_close(last.mean, mean)
    torch.testing.assert_close(last.attention.mean(dim=1), attention)
    for target in range(7):
        objective = (mean * d_mean[:, target]).sum()
        (gradient,) = torch.autograd.grad(objective, activation, retain_graph=True)
        torch.testing.assert_close(ours[:, target], gradient[:, 1:].mean(dim=1))
