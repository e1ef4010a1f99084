"""The real geometry: ViT-B/16 with random weights, at the paper's size and at awkward ones."""

import open_clip
import pytest
import torch

from weclip_lib.backbone import IMAGENET_STATISTICS, Backbone
from weclip_lib.config import Budget, DecoderShape, Method
from weclip_lib.labels import VOC
from weclip_lib.model import WeCLIP
from weclip_lib.training.loop import build_optimizer

NAME = "ViT-B-16-quickgelu"
LABELS = torch.zeros(2, len(VOC.classes))
LABELS[0, [1, 4, 7, 14, 19]] = 1  # five classes beside one
LABELS[1, 3] = 1


@pytest.fixture(scope="module")
def model() -> WeCLIP:
    torch.manual_seed(0)
    clip = open_clip.create_model(NAME, load_weights=False)
    assert clip.visual.image_mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)
    backbone = Backbone(clip, open_clip.get_tokenizer(NAME), IMAGENET_STATISTICS)
    return WeCLIP(backbone, VOC, Method(), DecoderShape())


def test_a_training_step(model) -> None:
    """Forward, CAM, RFM, losses, backward and optimizer step at 320x320, batch 2."""
    images = torch.randn(2, 3, 320, 320)
    optimizer = build_optimizer(model, Budget())
    features = model.extract(images, LABELS)
    assert features.tokens.shape == (11, 2, 400, 768)
    assert features.attention.shape == (8, 2, 400, 400)
    logits, affinity = model.decoder(features.tokens, (20, 20))
    refined = model.refine_cam(features, affinity)
    assert refined.isfinite().all()
    assert torch.equal(refined.amax((2, 3)) > 0, LABELS > 0)
    label = model.pseudo_label(refined, images, LABELS)
    assert label.shape == (2, 320, 320)
    segmentation, pairwise = model.losses(logits, affinity, label)
    (segmentation + 0.1 * pairwise).backward()
    before = model.decoder.classify.weight.clone()
    optimizer.step()
    assert not torch.equal(model.decoder.classify.weight, before)
    assert not any(p.grad is not None for p in model.backbone.parameters())


@pytest.mark.parametrize(
    ("size", "grid"),
    [((64, 304), (4, 19)), ((113, 95), (7, 5)), ((48, 48), (3, 3))],
    ids=["76 patches", "not divisible by 16", "small"],
)
def test_awkward_sizes(model, size, grid) -> None:
    """76 patches and a class token are as many tokens as a text has: no matter here."""
    images = torch.randn(2, 3, *size)
    labels = LABELS.clone()
    labels[1] = 0  # a picture without foreground
    features = model.extract(images, labels)
    assert features.cam.shape == (2, 20, *grid)
    label = model.pseudo_label(model.refine_cam(features), images, labels)
    assert label.shape == (2, *size)
    assert set(label[0].unique().tolist()) <= {0, 2, 5, 8, 15, 20}
    assert label[1].eq(0).all()
