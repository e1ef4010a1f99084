"""Parity with the official code, step by step; tolerances of tests/golden/MANIFEST.md."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import GOLDEN, load_golden, normalise
from tests.golden import golden_gen
from weclip_lib import cam, par, rfm
from weclip_lib.affinity import (
    affinity_labels,
    box_mask,
    min_max,
    propagate_cam,
    radius_mask,
    transition_matrix,
)
from weclip_lib.checkpoint import from_official
from weclip_lib.config import OFFICIAL, PROFILES, Budget, DecoderShape, Method, official
from weclip_lib.evaluate import label_map, predict
from weclip_lib.labels import COCO, VOC, VOC_BACKGROUNDS
from weclip_lib.losses import affinity_loss, segmentation_loss
from weclip_lib.metrics import confusion_matrix, scores
from weclip_lib.model import WeCLIP
from weclip_lib.train import build_optimizer, learning_rate

CASES = ("img1", "img2")


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, atol=tolerance, rtol=0)


def same_labels(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours != theirs).double().mean() <= 0.002


def multi_hot(keys: torch.Tensor, classes: int) -> torch.Tensor:
    return F.one_hot(keys.long(), classes).sum(0)[None].float()


class Case:
    """One golden picture and what the library's steps make of it."""

    def __init__(self, name: str, model) -> None:
        self.golden = load_golden(name)
        self.images = normalise(self.golden["image_u8"])[None]
        self.labels = multi_hot(self.golden["keys"], len(VOC.classes))
        self.features = model.backbone.encode_image(self.images)
        self.grad = cam.grad_cam(
            model.backbone, self.features, model.foreground, model.background, self.labels
        )
        self.frozen = model.freeze(self.images, self.labels)
        with torch.no_grad():
            patches = self.features.tokens[:, :, 1:]
            self.logits, self.affinity = model.decoder(patches, self.features.grid)
        self.keys = self.golden["keys"].long()


@pytest.fixture(scope="module", params=CASES)
def case(request, golden_model) -> Case:
    return Case(request.param, golden_model)


@pytest.mark.parametrize(("labels", "suffix"), [(VOC, ""), (COCO, "_coco")], ids=["voc", "coco"])
def test_text(golden_backbone, labels, suffix) -> None:
    golden = load_golden("text")
    for ours, names in (("fg", labels.class_prompts), ("bg", labels.backgrounds)):
        tokens = golden_backbone.tokenizer([OFFICIAL.template.format(n) for n in names])
        assert torch.equal(tokens.int(), golden[f"tokens_{ours}{suffix}"])
        text = golden_backbone.encode_text(names, OFFICIAL.template)
        close(text, golden[ours + suffix], 1e-5)


def test_tokens_and_attention(case) -> None:
    golden = case.golden
    blocks = range(11) if len(golden["tokens"]) == 11 else (2, 10)
    close(case.features.tokens[list(blocks), 0], golden["tokens"], 1e-3)
    maps = torch.cat([case.features.attention, case.grad.attention[None]])[:, 0]
    shown = range(12) if len(golden["attn"]) == 12 else (3, 8, 11)
    close(maps[list(shown)], golden["attn"], 1e-4)
    close(maps[:, 1:, 1:].sum((1, 2)), golden["attn_cls_mass"], 1e-2)


def test_grad_cam(case) -> None:
    columns = torch.cat([case.keys, torch.arange(len(VOC_BACKGROUNDS)) + len(VOC.classes)])
    close(case.grad.probabilities[:, columns], case.golden["probs"], 1e-4)
    close(case.grad.cam[0, case.keys], case.golden["gradcam.gray"], 1e-3)
    absent = torch.ones(len(VOC.classes), dtype=torch.bool)
    absent[case.keys] = False
    assert case.grad.cam[0, absent].eq(0).all()


def test_box_mask(case) -> None:
    ours = box_mask(case.frozen.cam, 0.4, keep_last=False)[0, case.keys]
    assert torch.equal(ours, case.golden["box.mask"].bool())


def test_static_refinement_and_label(case, golden_model) -> None:
    golden = case.golden
    attention = rfm.static_attention(case.frozen.attention)
    close(attention[0], golden["static.trans_in"], 1e-4)
    close(transition_matrix(attention)[0], golden["static.trans"], 1e-4)
    refined = golden_model.refine_cam(case.frozen)
    close(refined[0, case.keys], golden["static.refined"], 2e-3)
    large = F.interpolate(min_max(refined[:, case.keys]), (160, 160), mode="bilinear")
    close(large[0], golden["static.refined_up"], 2e-3)
    stack = torch.cat([1 - large.amax(1, keepdim=True), large], dim=1)
    close(par.refine(case.images, stack)[0], golden["static.par_out"], 2e-3)
    same_labels(
        golden_model.pseudo_label(refined, case.images, case.labels)[0],
        golden["static.label"],
    )


def test_rfm_refinement_and_label(case, golden_model) -> None:
    golden = case.golden
    close(case.affinity[0], golden["attn_pred"], 1e-3)
    last = case.frozen.attention[-6:]
    attention, selected = rfm.refine_attention(last, case.affinity, rule="signed")
    assert torch.equal(selected[:, 0], golden["rfm.selected"].bool())
    close(attention[0], golden["rfm.trans_in"], 1e-4)
    close(transition_matrix(attention)[0], golden["rfm.trans"], 1e-4)
    refined = golden_model.refine_cam(case.frozen, case.affinity)
    close(refined[0, case.keys], golden["rfm.refined"], 2e-3)
    label = golden_model.pseudo_label(refined, case.images, case.labels)
    same_labels(label[0], golden["rfm.label"])
    small = F.interpolate(
        case.images, golden["val.label"].shape, mode="bilinear", align_corners=True
    )
    label = golden_model.pseudo_label(refined, small, case.labels)
    same_labels(label[0], golden["val.label"])


@pytest.mark.parametrize("name", CASES)
def test_given_affinity_tells_the_rules_apart(name, golden_model) -> None:
    case = Case(name, golden_model)
    random = golden_gen.u(golden_gen.SALT_PUBLIC, f"{name}/seg_attn", (1, 100, 100))
    affinity = torch.sigmoid(1.5 * torch.from_numpy(random.astype(np.float32)) - 2)
    attention, selected = rfm.refine_attention(case.frozen.attention[-6:], affinity, rule="signed")
    assert torch.equal(selected[:, 0], case.golden["rfm_given.selected"].bool())
    close(attention[0], case.golden["rfm_given.trans_in"], 1e-4)
    close(transition_matrix(attention)[0], case.golden["rfm_given.trans"], 1e-4)
    refined = golden_model.refine_cam(case.frozen, affinity)
    close(refined[0, case.keys], case.golden["rfm_given.refined"], 2e-3)
    absolute = rfm.select_attention(case.frozen.attention[-6:], affinity, rule="absolute")
    assert not torch.equal(absolute, selected)


def test_coco(golden_backbone, golden_model) -> None:
    golden = load_golden("coco")
    images = normalise(load_golden("img2")["image_u8"])[None]
    keys = golden["img2.keys"].long()
    labels = multi_hot(keys, len(COCO.classes))
    features = golden_backbone.encode_image(images)
    texts = [
        golden_backbone.encode_text(names, OFFICIAL.template)
        for names in (COCO.class_prompts, COCO.backgrounds)
    ]
    grad = cam.grad_cam(golden_backbone, features, *texts, labels)
    close(grad.cam[0, keys], golden["img2.gray"], 1e-3)
    boxes = box_mask(grad.cam, 0.7, keep_last=False)
    assert torch.equal(boxes[0, keys], golden["img2.box_mask"].bool())
    attention = torch.cat([features.attention, grad.attention[None]])[..., 1:, 1:]
    static = transition_matrix(rfm.static_attention(attention))
    close(static[0], golden["img2.static.trans"], 1e-4)
    refined = propagate_cam(grad.cam, static, boxes)
    close(refined[0, keys], golden["img2.static.refined"], 2e-3)
    same_labels(cam.pseudo_label(refined, images, labels)[0], golden["img2.static.label"])
    # The COCO decoder's weights differ only in the classes; its affinity is that of VOC's.
    with torch.no_grad():
        _, affinity = golden_model.decoder(features.tokens[:, :, 1:], features.grid)
    chosen, selected = rfm.refine_attention(attention[-10:], affinity, rule="signed")
    assert torch.equal(selected[:, 0], golden["img2.rfm.selected"].bool())
    trans = transition_matrix(chosen)
    close(trans[0], golden["img2.rfm.trans"], 1e-4)
    refined = propagate_cam(grad.cam, trans, boxes)
    close(refined[0, keys], golden["img2.rfm.refined"], 2e-3)
    same_labels(cam.pseudo_label(refined, images, labels)[0], golden["img2.rfm.label"])


@pytest.fixture(scope="module")
def both(golden_model):
    """Both pictures as one batch: frozen features, labels, decoder outputs."""
    pictures = [load_golden(name) for name in CASES]
    images = torch.stack([normalise(p["image_u8"]) for p in pictures])
    labels = torch.cat([multi_hot(p["keys"], len(VOC.classes)) for p in pictures])
    return images, labels, golden_model.freeze(images, labels)


@pytest.mark.parametrize("branch", ["static", "rfm"])
def test_losses_and_gradients(branch, both, golden_model) -> None:
    golden = load_golden("train")
    names = np.load(GOLDEN / "train.npz")[f"{branch}.grad_names"]
    images, labels, frozen = both
    golden_model.zero_grad()
    logits, affinity = golden_model.decoder(frozen.tokens, (10, 10))
    close(logits.detach(), golden["logits"], 1e-3)
    close(affinity.detach(), golden["attn_pred"], 1e-3)
    refined = golden_model.refine_cam(frozen, affinity if branch == "rfm" else None)
    label = golden_model.pseudo_label(refined, images, labels)
    pairs = affinity_labels(label, (10, 10))
    assert (pairs != golden[f"{branch}.aff_label"]).double().mean() <= 0.002
    segmentation, pairwise = golden_model.losses(logits, affinity, label)
    total = segmentation + 0.1 * pairwise
    close(
        torch.stack([total, segmentation, pairwise]).detach().double(),
        golden[f"{branch}.losses"][:3],
        1e-4,
    )
    total.backward()
    ours = dict(golden_model.decoder.named_parameters())
    assert len(names) == len(ours) == 84
    for name, norm in zip(names, golden[f"{branch}.grad_norms"], strict=True):
        (key,) = from_official({str(name): norm})
        assert ours[key].grad.double().norm().item() == pytest.approx(
            norm.item(), rel=2e-3, abs=1e-5
        )
    golden_model.zero_grad()


def test_box_units() -> None:
    golden = load_golden("units")
    maps = golden["box.maps"][None]
    for threshold in (0.4, 0.7):
        ours = box_mask(maps, threshold, keep_last=False)
        assert torch.equal(ours[0], golden[f"box.mask_{threshold}"].bool())


def test_scale_and_transition_units() -> None:
    golden = load_golden("units")
    once = min_max(golden["scale.in"])
    close(once, golden["scale.once"], 1e-6)
    close(min_max(once), golden["scale.twice"], 1e-6)
    resized = F.interpolate(once[None], (40, 53), mode="bilinear", align_corners=False)[0]
    close(resized, golden["scale.resized"], 1e-5)
    close(transition_matrix(golden["trans.in"][None])[0], golden["trans.out"], 1e-6)


def test_par_units() -> None:
    golden = load_golden("units")
    image, masks = golden["par.image"][None], golden["par.masks"][None]
    close(par.refine(image, masks)[0], golden["par.out"], 1e-4)
    close(par.refine(image, masks, iterations=1)[0], golden["par.out_1iter"], 1e-5)
    larger = golden["par.masks_60x70"][None]
    close(par.refine(image, larger)[0], golden["par.out_60x70"], 1e-4)
    flat = image.clone()
    flat[:, :, :30, :40] = 0.25
    close(par.refine(flat, masks)[0], golden["par.out_flat"], 1e-4)


def test_loss_units() -> None:
    golden = load_golden("units")
    pairs = affinity_labels(golden["aff.label_in"][None], (10, 10))
    assert torch.equal(pairs[0], golden["aff.label_out"].long())
    loss, counts = affinity_loss(golden["aff.pred"][None], pairs)
    close(torch.stack([loss, *counts]).double(), golden["aff.loss"], 1e-4)
    expected = golden["radius_mask_7x9_r3"].bool()
    assert torch.equal(radius_mask(7, 9, 3), expected)
    logits, label = golden["seg.logits"][None], golden["seg.label"][None].long()
    close(segmentation_loss(logits, label)[0].double(), golden["seg.loss"][0], 1e-5)
    # Differs: an all-background label gives half the background's cross-entropy, not NaN.
    empty = torch.zeros_like(label)
    assert torch.isnan(golden["seg.loss"][1])
    expected = F.cross_entropy(logits, empty) / 2
    close(segmentation_loss(logits, empty)[0], expected, 1e-6)


def test_scores() -> None:
    golden = load_golden("units")
    table = confusion_matrix(golden["scores.pred"], golden["scores.gt"], 21)
    assert torch.equal(table, golden["scores.hist"])
    result = scores(table)
    summary = torch.tensor([result.miou, result.pixel_accuracy, result.mean_accuracy]).double()
    close(summary / 100, golden["scores.summary"], 1e-6)
    torch.testing.assert_close(result.class_iou / 100, golden["scores.iou"], equal_nan=True)


def test_official_preset_of_each_profile() -> None:
    assert official(PROFILES["voc"]).method == OFFICIAL
    coco = official(PROFILES["coco"])
    assert (coco.method.box_threshold, coco.method.rfm_layers) == (0.7, 10)
    assert (coco.method.rfm_rule, coco.method.rfm_start) == ("signed", 0.5)
    assert official(PROFILES["mini"]).statistics == coco.statistics == "imagenet"


def test_default_preset_differs_in_named_fields_only() -> None:
    assert (
        replace(
            OFFICIAL, keep_box_ends=True, rfm_rule="absolute", rfm_start=0.5, ignore_padding=True
        )
        == Method()
    )


def test_four_optimizer_steps(both, golden_backbone) -> None:
    golden = load_golden("train")
    model = WeCLIP(golden_backbone, VOC, OFFICIAL, DecoderShape(dim=64))
    state = {k: torch.tensor(v) for k, v in golden_gen.decoder_state().items()}
    model.decoder.load_state_dict(from_official(state))
    model.eval()
    images, labels, frozen = both
    label = model.pseudo_label(model.refine_cam(frozen), images, labels)
    budget = Budget(steps=10, warmup=2)
    optimizer = build_optimizer(model, budget)
    for step, expected in enumerate(golden["steps.losses"]):
        logits, affinity = model.decoder(frozen.tokens, (10, 10))
        segmentation, pairwise = model.losses(logits, affinity, label)
        total = segmentation + OFFICIAL.affinity_weight * pairwise
        found = torch.stack([total, segmentation, pairwise]).detach().double()
        close(found, expected, 1e-4)
        rate = learning_rate(step, budget)
        assert rate == pytest.approx(golden["steps.lr"][step].item(), rel=1e-9)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    close(model.decoder.classify.bias.detach(), golden["steps.linear_pred_bias"], 1e-6)


def test_multi_scale_inference(golden_model) -> None:
    golden, picture = load_golden("infer"), load_golden("img2")
    image = normalise(picture["image_u8"])[None]
    image = F.interpolate(image, (198, 198), mode="bilinear", align_corners=False)
    ((single, multi),) = predict(golden_model.backbone, [golden_model.decoder], image)
    close(single, golden["img2.segs"], 1e-3)
    close(multi, golden["img2.msc_segs"], 1e-3)
    truth = picture["label_png"]
    same_labels(label_map(single, tuple(truth.shape))[0], golden["img2.pred"])
    found = label_map(multi, tuple(truth.shape))[0]
    same_labels(found, golden["img2.msc_pred"])
    result = scores(confusion_matrix(found, truth, 21))
    assert result.miou / 100 == pytest.approx(golden["img2.msc_miou"][0].item(), abs=2e-3)
