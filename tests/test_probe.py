import pytest
import torch
from torch.testing import assert_close

from weclip_lib.backbone import attend, load_backbone, run_block
from weclip_lib.cam import grad_cam
from weclip_lib.explore.probe import block_grad_cam, entering, head_attention


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("MiniCLIP", "miniclip")


@pytest.fixture(scope="module")
def seen(backbone):
    images = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    return images, backbone.encode_image(images)


def test_at_the_last_block_it_is_the_closed_form(backbone, seen) -> None:
    images, features = seen
    foreground = backbone.encode_text(["boat", "cat", "tv"], "a photo of {}.")
    background = backbone.encode_text(["water", "grass"], "a photo of {}.")
    expected = grad_cam(backbone, features, foreground, background, torch.ones(2, 3))
    cam, scores = block_grad_cam(backbone, images, features, foreground, background, 11)
    assert cam.shape == (2, 3, 3, 5)
    assert_close(cam, expected.cam, atol=1e-4, rtol=1e-4)
    assert_close(scores, expected.probabilities)


def test_the_gradient_at_an_earlier_block_is_that_of_a_small_step(backbone, seen) -> None:
    """The map is the derivative along the activation: check one class against a difference."""
    _, features = seen
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


def test_heads_average_to_the_attention_of_the_features(backbone, seen) -> None:
    images, features = seen
    for block in (0, 4, 10):
        heads = head_attention(backbone, images, features, block)
        assert heads.shape == (2, 4, 16, 16)
        assert_close(heads.sum(-1), torch.ones(2, 4, 16))
        assert_close(heads.mean(1), features.attention[block], atol=1e-5, rtol=1e-4)


def test_a_block_that_is_not_there_is_named(backbone, seen) -> None:
    with pytest.raises(ValueError, match="there is no block 12: choose 0 to 11"):
        entering(backbone, *seen, 12)
