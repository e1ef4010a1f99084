"""Grad-CAM against autograd one target at a time, against small steps, and at every block.

Batches of pictures with different numbers of classes are compared with the pictures one by one.
"""

import open_clip
import pytest
import torch
from torch.testing import assert_close

from weclip_lib import cam as module
from weclip_lib.backbone import IMAGENET_STATISTICS, Backbone, load_backbone, run_block
from weclip_lib.cam import grad_cam, present_classes, pseudo_label, with_background
from weclip_lib.explore.affinities import head_attention

RAGGED = torch.tensor(  # 2, 0, 1, 2 and 4 classes
    [[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 0, 1, 0], [1, 1, 0, 1, 1]]
).float()


def mixed(block, activation):
    """Torch's own attention module, after a block's first LayerNorm."""
    return block.ls_1(block.attn(activation, activation, activation)[0])


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
    return Backbone(clip, open_clip.get_tokenizer("ViT-B-32"), IMAGENET_STATISTICS)


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
        hidden = tokens + mixed(block, activation)
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
    return load_backbone("MiniCLIP", "miniclip-v1")


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
            hidden = tokens[8] + mixed(block, activation)
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


def test_pictures_with_equally_many_classes_go_together() -> None:
    groups = [
        (rows.tolist(), classes.tolist())
        for rows, classes in present_classes(RAGGED, torch.device("cpu"))
    ]
    assert groups == [
        ([1], [[]]),
        ([2], [[2]]),
        ([0, 3], [[1, 4], [0, 3]]),
        ([4], [[0, 1, 3, 4]]),
    ]


def test_a_ragged_batch_equals_its_pictures_one_by_one(backbone) -> None:
    torch.manual_seed(1)
    images = torch.randn(5, 3, 40, 56)
    texts = torch.nn.functional.normalize(torch.randn(8, 64), dim=-1)
    features = backbone.encode_image(images)
    together = grad_cam(backbone, features, texts[:5], texts[5:], RAGGED)
    label = pseudo_label(together.cam, images, RAGGED)
    for row in range(5):
        one = slice(row, row + 1)
        seen = backbone.encode_image(images[one])
        alone = grad_cam(backbone, seen, texts[:5], texts[5:], RAGGED[one])
        assert_close(together.cam[one], alone.cam, atol=3e-6, rtol=0)
        assert_close(together.probabilities[one], alone.probabilities, atol=3e-6, rtol=0)
        assert_close(together.attention[one], alone.attention, atol=3e-6, rtol=0)
        assert torch.equal(label[one], pseudo_label(together.cam[one], images[one], RAGGED[one]))
    assert together.cam.amax(dim=(-2, -1)).gt(0.9).equal(RAGGED > 0)
    assert together.probabilities[:, :5].gt(0).equal(RAGGED > 0)
    assert_close(together.probabilities.sum(dim=1), torch.ones(5))
    assert not label[1].any()


def test_a_picture_costs_its_own_classes_only(backbone, monkeypatch) -> None:
    """Gradients and refined maps are counted: none is made for a class of another picture."""
    gradients, refined = [], []
    grad, refine = torch.autograd.grad, module.par.refine

    def counted_grad(score, leaf, **settings):
        gradients.append(leaf.shape[1])
        return grad(score, leaf, **settings)

    def counted_refine(pixels, maps, **settings):
        refined.append(tuple(maps.shape[:2]))
        return refine(pixels, maps, **settings)

    monkeypatch.setattr(torch.autograd, "grad", counted_grad)
    monkeypatch.setattr(module.par, "refine", counted_refine)
    images, texts = torch.randn(5, 3, 24, 40), torch.randn(8, 64)
    found = grad_cam(backbone, backbone.encode_image(images), texts[:5], texts[5:], RAGGED)
    pseudo_label(found.cam, images, RAGGED, par_iterations=1)
    assert sum(gradients) == RAGGED.sum() == 9
    assert refined == [(1, 2), (2, 3), (1, 5)]  # pictures, and maps with the background


def test_labels_are_the_pictures_own_classes_in_their_order() -> None:
    """Two columns: the classes of a picture are high in one each, a class it lacks in both."""
    cam = torch.zeros(3, 4, 1, 2)
    cam[0, 1], cam[0, 3] = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    cam[1, 2] = torch.tensor([[1.0, 0.0]])
    cam[:, 0] = torch.tensor([[1.0, 2.0]])
    labels = torch.tensor([[0.0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    images = torch.randn(3, 3, 1, 2)
    found = pseudo_label(cam, images, labels, par_iterations=0)
    assert found.tolist() == [[[4, 2]], [[3, 0]], [[0, 0]]]
