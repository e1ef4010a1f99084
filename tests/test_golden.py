"""Parity with the official code, step by step; tolerances of tests/golden/MANIFEST.md."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.golden import golden_gen
from tests.parity import GOLDEN, close, equal, load_golden, same_labels
from weclip_lib import cam, rfm
from weclip_lib.backbone import IMAGENET_STATISTICS
from weclip_lib.config import OFFICIAL, Budget, DecoderShape, Method
from weclip_lib.data.datasets import normalise
from weclip_lib.data.profiles import PROFILES, official
from weclip_lib.evaluation.scores import label_map, predict
from weclip_lib.labels import COCO, VOC, VOC_BACKGROUNDS
from weclip_lib.model import WeCLIP
from weclip_lib.ops import par
from weclip_lib.ops.affinity import (
    affinity_labels,
    box_mask,
    min_max,
    radius_mask,
    transition_matrix,
)
from weclip_lib.ops.losses import affinity_loss, segmentation_loss
from weclip_lib.ops.metrics import confusion_matrix, scores
from weclip_lib.storage.tensors import from_official
from weclip_lib.training.loop import build_optimizer, learning_rate

CASES = ("img1", "img2")


def picture(golden: dict[str, torch.Tensor]) -> torch.Tensor:
    return normalise([golden["image_u8"].numpy()], IMAGENET_STATISTICS)


def squared(matrix: torch.Tensor) -> torch.Tensor:
    """The official transition matrix: two of our steps."""
    return matrix @ matrix


def with_background(maps: torch.Tensor) -> torch.Tensor:
    return torch.cat([1 - maps.amax(1, keepdim=True), maps], dim=1)


def summary(prediction: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """mIoU, pixel accuracy and mean accuracy, as fractions."""
    found = scores(confusion_matrix(prediction, truth, VOC.class_count))
    figures = [found.miou, found.pixel_accuracy, found.mean_accuracy]
    return torch.tensor(figures, dtype=torch.double) / 100


def our_name(official: str) -> str:
    (name,) = from_official({str(official): torch.empty(0)})
    return name


def multi_hot(keys: torch.Tensor, classes: int) -> torch.Tensor:
    return F.one_hot(keys.long(), classes).sum(0)[None].float()


class Case:
    """One golden picture and what the library's steps make of it."""

    def __init__(self, name: str, model) -> None:
        self.golden = load_golden(name)
        self.images = picture(self.golden)
        self.labels = multi_hot(self.golden["keys"], len(VOC.classes))
        self.seen = model.backbone.encode_image(self.images)
        self.grad = cam.grad_cam(
            model.backbone, self.seen, model.foreground, model.background, self.labels
        )
        self.features = model.extract(self.images, self.labels)
        with torch.no_grad():
            patches = self.seen.tokens[:, :, 1:]
            self.logits, self.affinity = model.decoder(patches, self.seen.grid)
        self.keys = self.golden["keys"].long()


@pytest.fixture(scope="module", params=CASES)
def case(request, golden_model) -> Case:
    return Case(request.param, golden_model)


@pytest.mark.parametrize(("labels", "suffix"), [(VOC, ""), (COCO, "_coco")], ids=["voc", "coco"])
def test_text(golden_backbone, labels, suffix) -> None:
    golden = load_golden("text")
    for ours, names in (("fg", labels.class_prompts), ("bg", labels.backgrounds)):
        tokens = golden_backbone.tokenizer([OFFICIAL.template.format(n) for n in names])
        equal(tokens.int(), golden[f"tokens_{ours}{suffix}"])
        text = golden_backbone.encode_text(names, OFFICIAL.template)
        close(text, golden[ours + suffix], 1e-5)
    if labels is VOC:
        raw = golden_backbone.clip.encode_text(golden["tokens_fg"][:1].long())
        close(raw, golden["raw_fg0"], 1e-4)


def test_awkward_texts(golden_backbone) -> None:
    texts = [
        "it's a dog's life, 3.14 &amp; café!",
        "",
        "  MIXED   Case\ttabs ",
        "\u4f60\u597d \U0001f600",
        "motorbikemotorbikemotorbike",
    ]
    equal(golden_backbone.tokenizer(texts).int(), load_golden("text")["tokens_hard"])


def test_normalise() -> None:
    golden = load_golden("units")
    ours = normalise([golden["norm.u8"].numpy()], IMAGENET_STATISTICS)[0].permute(1, 2, 0)
    for path in ("norm.from_u8", "norm.from_f32"):  # official validation, official training
        close(ours, golden[path], 1e-6)


def test_tokens_and_attention(case) -> None:
    golden = case.golden
    blocks = range(11) if len(golden["tokens"]) == 11 else (2, 10)
    close(case.seen.tokens[list(blocks), 0], golden["tokens"], 1e-3)
    maps = torch.cat([case.seen.attention, case.grad.attention[None]])[:, 0]
    shown = range(12) if len(golden["attn"]) == 12 else (3, 8, 11)
    close(maps[list(shown)], golden["attn"], 1e-4)
    close(maps[:, 1:, 1:].sum((1, 2)), golden["attn_cls_mass"], 1e-2)


def test_grad_cam(case) -> None:
    columns = torch.cat([case.keys, torch.arange(len(VOC_BACKGROUNDS)) + len(VOC.classes)])
    close(case.grad.probabilities[:, columns], case.golden["probs"], 1e-4)
    close(case.grad.cam[0, case.keys], case.golden["gradcam.gray"], 1e-3)
    raw = case.golden["gradcam.raw"]
    close(case.grad.raw[0, case.keys], raw, 1e-3 * raw.abs().max().item())
    absent = torch.ones(len(VOC.classes), dtype=torch.bool)
    absent[case.keys] = False
    assert case.grad.cam[0, absent].eq(0).all()


def test_box_mask(case) -> None:
    ours = box_mask(case.features.cam, 0.4, keep_last=False)[0, case.keys]
    equal(ours, case.golden["box.mask"])


def test_static_refinement_and_label(case, golden_model) -> None:
    golden = case.golden
    attention = rfm.static_attention(case.features.attention)
    close(attention[0], golden["static.trans_in"], 1e-4)
    close(squared(transition_matrix(attention))[0], golden["static.trans"], 1e-4)
    refined = golden_model.refine_cam(case.features)
    close(refined[0, case.keys], golden["static.refined"], 2e-3)
    large = cam.enlarge_cam(refined[:, case.keys], (160, 160))
    close(large[0], golden["static.refined_up"], 2e-3)
    close(par.refine(case.images, with_background(large))[0], golden["static.par_out"], 2e-3)
    same_labels(
        golden_model.pseudo_label(refined, case.images, case.labels)[0],
        golden["static.label"],
    )


def test_rfm_refinement_and_label(case, golden_model) -> None:
    golden = case.golden
    close(case.affinity[0], golden["attn_pred"], 1e-3)
    last = case.features.attention[-6:]
    attention, selected = rfm.refine_attention(last, case.affinity, rule="signed")
    equal(selected[:, 0], golden["rfm.selected"])
    close(attention[0], golden["rfm.trans_in"], 1e-4)
    close(squared(transition_matrix(attention))[0], golden["rfm.trans"], 1e-4)
    refined = golden_model.refine_cam(case.features, case.affinity)
    close(refined[0, case.keys], golden["rfm.refined"], 2e-3)
    large = cam.enlarge_cam(refined[:, case.keys], (160, 160))
    close(large[0, :, ::4, ::4], golden["rfm.refined_up_s4"], 2e-3)
    smooth = par.refine(case.images, with_background(large))[0, :, ::4, ::4]
    close(smooth, golden["rfm.par_out_s4"], 2e-3)
    label = golden_model.pseudo_label(refined, case.images, case.labels)
    same_labels(label[0], golden["rfm.label"])
    size = tuple(golden["val.label"].shape)
    large = cam.enlarge_cam(refined[:, case.keys], size)
    close(large[0, :, ::4, ::4], golden["val.refined_up_s4"], 2e-3)
    small = F.interpolate(case.images, size, mode="bilinear", align_corners=True)
    label = golden_model.pseudo_label(refined, small, case.labels)
    same_labels(label[0], golden["val.label"])


@pytest.mark.parametrize("name", CASES)
def test_given_affinity_tells_the_rules_apart(name, golden_model) -> None:
    case = Case(name, golden_model)
    random = golden_gen.u(golden_gen.SALT_PUBLIC, f"{name}/seg_attn", (1, 100, 100))
    affinity = torch.sigmoid(1.5 * torch.from_numpy(random.astype(np.float32)) - 2)
    attention, selected = rfm.refine_attention(
        case.features.attention[-6:], affinity, rule="signed"
    )
    equal(selected[:, 0], case.golden["rfm_given.selected"])
    close(attention[0], case.golden["rfm_given.trans_in"], 1e-4)
    close(squared(transition_matrix(attention))[0], case.golden["rfm_given.trans"], 1e-4)
    refined = golden_model.refine_cam(case.features, affinity)
    close(refined[0, case.keys], case.golden["rfm_given.refined"], 2e-3)
    absolute = rfm.select_attention(case.features.attention[-6:], affinity, rule="absolute")
    assert not torch.equal(absolute, selected)


def test_layers_as_far_as_the_mean_are_kept() -> None:
    """The official comparison is "at most"; with equal maps, "less than" would keep none."""
    attention = torch.rand(1, 2, 5, 5).expand(4, -1, -1, -1)
    assert rfm.select_attention(attention, torch.rand(2, 5, 5)).all()


def test_coco(golden_backbone, golden_model) -> None:
    golden = load_golden("coco")
    model = WeCLIP(golden_backbone, COCO, official(PROFILES["coco"]).method, DecoderShape(dim=64))
    method = model.method
    images = picture(load_golden("img2"))
    keys = golden["img2.keys"].long()
    labels = multi_hot(keys, len(COCO.classes))
    features = model.extract(images, labels)
    close(features.cam[0, keys], golden["img2.gray"], 1e-3)
    boxes = box_mask(features.cam, method.box_threshold, keep_last=method.keep_box_ends)
    equal(boxes[0, keys], golden["img2.box_mask"])
    static = rfm.static_attention(features.attention, last=method.static_layers)
    close(squared(transition_matrix(static))[0], golden["img2.static.trans"], 1e-4)
    # The COCO decoder's weights differ only in the classes; its affinity is that of VOC's.
    with torch.no_grad():
        _, affinity = golden_model.decoder(features.tokens, (10, 10))
    last = features.attention[-method.rfm_layers :]
    chosen, selected = rfm.refine_attention(last, affinity, rule=method.rfm_rule)
    equal(selected[:, 0], golden["img2.rfm.selected"])
    close(squared(transition_matrix(chosen))[0], golden["img2.rfm.trans"], 1e-4)
    for branch, given in (("static", None), ("rfm", affinity)):
        refined = model.refine_cam(features, given)
        close(refined[0, keys], golden[f"img2.{branch}.refined"], 2e-3)
        label = model.pseudo_label(refined, images, labels)
        same_labels(label[0], golden[f"img2.{branch}.label"])


def test_coco_probabilities(golden_backbone) -> None:
    golden = load_golden("coco")
    images, keys = picture(load_golden("img2")), golden["img2.keys"].long()
    texts = [
        golden_backbone.encode_text(names, OFFICIAL.template)
        for names in (COCO.class_prompts, COCO.backgrounds)
    ]
    features = golden_backbone.encode_image(images)
    labels = multi_hot(keys, len(COCO.classes))
    found = cam.grad_cam(golden_backbone, features, *texts, labels).probabilities
    columns = torch.cat([keys, torch.arange(len(COCO.backgrounds)) + len(COCO.classes)])
    close(found[:, columns], golden["img2.probs"], 1e-4)


@pytest.fixture(scope="module")
def both(golden_model):
    """Both pictures as one batch: frozen features, labels, decoder outputs."""
    pictures = [load_golden(name) for name in CASES]
    images = torch.cat([picture(p) for p in pictures])
    labels = torch.cat([multi_hot(p["keys"], len(VOC.classes)) for p in pictures])
    return images, labels, golden_model.extract(images, labels)


def test_inside_the_decoder(both, golden_model) -> None:
    golden, seen = load_golden("train"), {}
    decoder = golden_model.decoder
    last = decoder.blocks[-1]
    hooks = [
        decoder.dropout.register_forward_hook(lambda _m, _i, out: seen.update(fused=out)),
        last.ln_1.register_forward_hook(lambda _m, _i, out: seen.update(normed=out)),
    ]
    logits, _ = decoder(both[2].tokens, (10, 10))
    for hook in hooks:
        hook.remove()
    close(seen["fused"], golden["fused"], 1e-3)
    close(last.attn(*[seen["normed"]] * 3)[1], golden["dec_attn_last"], 1e-4)
    large = F.interpolate(logits, (160, 160), mode="bilinear", align_corners=False)
    close(large[..., ::8, ::8], golden["logits_up_s8"], 1e-3)


@pytest.mark.parametrize("branch", ["static", "rfm"])
def test_losses_and_gradients(branch, both, golden_model) -> None:
    golden = load_golden("train")
    names = np.load(GOLDEN / "train.npz")[f"{branch}.grad_names"]
    images, labels, features = both
    golden_model.zero_grad()
    logits, affinity = golden_model.decoder(features.tokens, (10, 10))
    close(logits.detach(), golden["logits"], 1e-3)
    close(affinity.detach(), golden["attn_pred"], 1e-3)
    refined = golden_model.refine_cam(features, affinity if branch == "rfm" else None)
    label = golden_model.pseudo_label(refined, images, labels)
    pairs = affinity_labels(label, (10, 10))
    same_labels(pairs, golden[f"{branch}.aff_label"])
    segmentation, pairwise = golden_model.losses(logits, affinity, label)
    total = segmentation + OFFICIAL.affinity_weight * pairwise
    found = torch.stack([total, segmentation, pairwise]).double()
    close(found, golden[f"{branch}.losses"][:3], 1e-4)
    total.backward()
    ours = dict(golden_model.decoder.named_parameters())
    assert len(names) == len(ours) == 84
    norms = torch.stack([ours[our_name(name)].grad.double().norm() for name in names])
    close(norms, golden[f"{branch}.grad_norms"], 1e-5, relative=2e-3)
    for name, expected in golden.items():
        if name.startswith(f"{branch}.grad."):
            gradient = ours[our_name(name.removeprefix(f"{branch}.grad."))].grad
            close(gradient, expected, 1e-5, relative=2e-3)
    golden_model.zero_grad()


def test_box_units() -> None:
    golden = load_golden("units")
    maps = golden["box.maps"][None]
    for threshold in (0.4, 0.7):
        ours = box_mask(maps, threshold, keep_last=False)
        equal(ours[0], golden[f"box.mask_{threshold}"])


def test_scale_and_transition_units() -> None:
    golden = load_golden("units")
    once = min_max(golden["scale.in"])
    close(once, golden["scale.once"], 1e-6)
    close(min_max(once), golden["scale.twice"], 1e-6)
    resized = cam.enlarge_cam(golden["scale.in"][None], (40, 53))[0]
    close(resized, golden["scale.resized"], 1e-5)
    close(squared(transition_matrix(golden["trans.in"][None]))[0], golden["trans.out"], 1e-6)


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
    equal(pairs[0], golden["aff.label_out"])
    loss, counts = affinity_loss(golden["aff.pred"][None], pairs)
    close(torch.stack([loss, *(counts + 1)]).double(), golden["aff.loss"], 1e-4)
    equal(radius_mask(7, 9, 3), golden["radius_mask_7x9_r3"])
    packed = load_golden("train")["radius_mask_packed"].numpy()
    equal(radius_mask(10, 10, 8), torch.from_numpy(np.unpackbits(packed).reshape(100, 100)))
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
    equal(table, golden["scores.hist"])
    close(summary(golden["scores.pred"], golden["scores.gt"]), golden["scores.summary"], 1e-6)
    close(scores(table).class_iou / 100, golden["scores.iou"], 1e-7)


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
    images, labels, features = both
    label = model.pseudo_label(model.refine_cam(features), images, labels)
    budget = Budget(steps=10, warmup=2)
    optimizer = build_optimizer(model, budget)
    for step, expected in enumerate(golden["steps.losses"]):
        logits, affinity = model.decoder(features.tokens, (10, 10))
        segmentation, pairwise = model.losses(logits, affinity, label)
        total = segmentation + OFFICIAL.affinity_weight * pairwise
        found = torch.stack([total, segmentation, pairwise]).detach().double()
        close(found, expected, 1e-4)
        rate = learning_rate(step, budget)
        close(torch.tensor(rate, dtype=torch.double), golden["steps.lr"][step], 0, relative=1e-9)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    close(model.decoder.classify.bias, golden["steps.linear_pred_bias"], 1e-6)
    ours = dict(model.decoder.named_parameters())
    names = np.load(GOLDEN / "train.npz")["static.grad_names"]
    norms = torch.stack([ours[our_name(name)].double().norm() for name in names])
    close(norms, golden["steps.param_norms"], 1e-6, relative=1e-3)


def test_multi_scale_inference(golden_model) -> None:
    golden, img2 = load_golden("infer"), load_golden("img2")
    image = picture(img2)
    image = F.interpolate(image, (198, 198), mode="bilinear", align_corners=False)
    ((single, multi),) = predict(golden_model.backbone, [golden_model.decoder], image)
    close(single, golden["img2.segs"], 1e-3)
    close(multi, golden["img2.msc_segs"], 1e-3)
    truth = img2["label_png"]
    same_labels(label_map(single, tuple(truth.shape))[0], golden["img2.pred"])
    found = label_map(multi, tuple(truth.shape))[0]
    same_labels(found, golden["img2.msc_pred"])
    close(summary(found, truth), golden["img2.msc_miou"], 2e-3)
    # Official validation also makes a pseudo label, by the RFM, at the size of the mask.
    keys = img2["keys"].long()
    labels = multi_hot(keys, len(VOC.classes))
    features = golden_model.extract(image, labels)
    with torch.no_grad():
        _, affinity = golden_model.decoder(features.tokens, (12, 12))
    large = F.interpolate(image, tuple(truth.shape), mode="bilinear", align_corners=True)
    label = golden_model.pseudo_label(golden_model.refine_cam(features, affinity), large, labels)[0]
    same_labels(label, golden["img2.cam"])
    close(summary(label, truth), golden["img2.cam_miou"], 2e-3)
