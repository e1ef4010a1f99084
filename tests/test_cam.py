"""Grad-CAM against autograd one target at a time, against small steps, and at every block."""

import open_clip
import pytest
import torch
from torch.testing import assert_close

from weclip_lib.backbone import IMAGENET_STATISTICS, Backbone, attend, load_backbone, run_block
from weclip_lib.cam import grad_cam, with_background
from weclip_lib.explore.affinities import head_attention


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
@pytest.mark.parametrize("number", [0, 1, 2])
def test_maps_are_autograds_one_target_at_a_time(quick_gelu, layer_scale, number) -> None:
    torch.manual_seed(0)
    backbone = small_backbone(quick_gelu=quick_gelu, layer_scale=layer_scale)
    features = backbone.encode_image(torch.randn(2, 3, 12, 20).double())
    texts = torch.nn.functional.normalize(torch.randn(7, 10).double(), dim=-1)
    labels = torch.tensor([[1.0, 0, 1, 0, 1], [0, 1, 0, 0, 0]]).double()
    found = grad_cam(backbone, features, texts[:5], texts[5:], labels, block=number)

    for image in range(2):
        block = backbone.blocks[number]
        tokens = backbone.entering(features, number)[image : image + 1]
        activation = block.ln_1(tokens).detach().requires_grad_()
        hidden = tokens + block.ls_1(attend(block.attn, activation)[0])
        hidden = hidden + block.ls_2(block.mlp(block.ln_2(hidden)))
        for later in backbone.blocks[number + 1 :]:
            hidden = later(hidden)
        mean = backbone.visual.ln_post(hidden[:, 1:]).mean(dim=1) @ backbone.visual.proj
        present = [*labels[image].nonzero()[:, 0].tolist(), 5, 6]
        logits = backbone.logit_scale * (mean / mean.norm()) @ texts[present].T
        probabilities = logits.softmax(dim=-1)[0]
        assert_close(found.probabilities[image, present], probabilities)
        for place, target in enumerate(present[:-2]):
            (gradient,) = torch.autograd.grad(probabilities[place], activation, retain_graph=True)
            weights = gradient[0, 1:].mean(dim=0)
            expected = (activation[0, 1:] @ weights).view(3, 5)
            assert_close(found.raw[image, target], expected.float(), atol=1e-7, rtol=1e-5)
    assert not found.cam[labels == 0].any()
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("MiniCLIP", "miniclip")


@pytest.fixture(scope="module")
def features(backbone):
    images = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    return backbone.encode_image(images)


def test_the_gradient_at_an_earlier_block_is_that_of_a_small_step(backbone, features) -> None:
    """The map is the derivative along the activation: check one class against a difference."""
    double = backbone.double()
    try:
        tokens = features.tokens.double()
        texts = torch.nn.functional.normalize(torch.randn(3, 64).double(), dim=-1)

        def score(activation):
            block = double.blocks[9]
            hidden = tokens[8] + block.ls_1(attend(block.attn, activation)[0])
            hidden = hidden + block.ls_2(block.mlp(block.ln_2(hidden)))
            for later in double.blocks[10:]:
                hidden, _ = run_block(later, hidden)
            mean = double.visual.ln_post(hidden[:, 1:]).mean(1) @ double.visual.proj
            unit = torch.nn.functional.normalize(mean, dim=-1)
            return (double.logit_scale * unit @ texts.T).softmax(-1)[0, 0]

        activation = double.blocks[9].ln_1(tokens[8])
        step = 1e-6 * torch.eye(128).double()
        slopes = []
        for channel in range(0, 128, 16):
            moved = activation.clone()
            moved[0, 1:] += step[channel]  # of all patches alike: 15 times their mean gradient
            slopes.append((score(moved) - score(activation)) / 1e-6 / 15)
        moved = activation.detach().requires_grad_()
        exact = torch.autograd.grad(score(moved), moved)[0][0, 1:].mean(0)[::16]
        assert_close(torch.stack(slopes).detach(), exact, rtol=1e-3, atol=1e-9)
    finally:
        backbone.float()


def test_heads_average_to_the_attention_of_the_features(backbone, features) -> None:
    for block in (0, 4, 10):
        heads = head_attention(backbone, features, block)
        assert heads.shape == (2, 4, 16, 16)
        assert_close(heads.sum(-1), torch.ones(2, 4, 16))
        assert_close(heads.mean(1), features.attention[block], atol=1e-5, rtol=1e-4)


def test_a_block_that_is_not_there_is_named(backbone, features) -> None:
    texts = torch.nn.functional.normalize(torch.randn(3, 64), dim=-1)
    with pytest.raises(ValueError, match="there is no block 12: choose 0 to 11"):
        grad_cam(backbone, features, texts[:2], texts[2:], torch.ones(2, 2), block=12)


def test_background_is_one_minus_the_highest_map() -> None:
    cam = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.0]]]])
    maps = with_background(cam, (1, 2))
    assert_close(
        maps[0, :, 0], torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), atol=1e-6, rtol=0
    )
