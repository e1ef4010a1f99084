from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from weclip_lib import rfm
from weclip_lib.backbone import load_backbone
from weclip_lib.cam import grad_cam, pseudo_label
from weclip_lib.config import Method
from weclip_lib.data.datasets import normalise
from weclip_lib.decoder import Decoder
from weclip_lib.explore.affinities import Affinities
from weclip_lib.explore.stages import Picture, Pipeline, Settings
from weclip_lib.labels import IGNORE_INDEX, MINIVOC
from weclip_lib.ops.affinity import box_mask, min_max, propagate_cam, transition_matrix
from weclip_lib.world.minivoc import draw
from weclip_lib.world.settings import World

METHOD = Method()


def drawn(index: int, world: World = World()) -> Picture:
    scene = draw(77, index, world)
    return Picture(f"drawn {index}", scene.image, scene.classes, scene.mask)


@pytest.fixture(scope="module")
def shown() -> Picture:
    return next(found for found in map(drawn, range(50)) if len(found.tags) == 2)


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline(load_backbone("MiniCLIP", "miniclip-v2"), MINIVOC)


def published(words) -> Settings:
    return Settings.published(MINIVOC, METHOD, 12, words)


def test_it_is_what_training_sees(pipeline, shown) -> None:
    """With the published settings, every stage is that of the model's own functions."""
    backbone = pipeline.backbone
    found = pipeline.show(shown, published(shown.tags))
    images = normalise([shown.pixels], backbone.statistics)
    texts = [backbone.encode_text(t, METHOD.template) for t in (shown.tags, MINIVOC.backgrounds)]
    features = backbone.encode_image(images)
    grad = grad_cam(backbone, features, *texts, torch.ones(1, 2))
    attention = torch.cat([features.attention, grad.attention[None]])[..., 1:, 1:]
    boxes = box_mask(grad.cam, METHOD.box_threshold)
    step = transition_matrix(rfm.static_attention(attention, last=8), rounds=3)
    refined = propagate_cam(grad.cam, step, boxes)
    assert_close(found.cam, grad.cam[0])
    assert torch.equal(found.boxes, boxes[0])
    assert_close(found.refined, min_max(refined)[0])
    label = pseudo_label(refined, images, torch.ones(1, 2))
    assert (found.label == label[0]).float().mean() > 0.9995  # min-max once more: rounding
    assert_close(found.probabilities, grad.probabilities[0])


@pytest.mark.parametrize(
    ("change", "computed"),
    [
        ({"par_iterations": 3}, []),
        ({"steps": 1}, ["refined", "PAR"]),
        ({"rounds": 1}, ["transition", "refined", "PAR"]),
        ({"box_threshold": 0.6}, ["boxes", "refined", "PAR"]),
        ({"words": ("boat", "cat")}, ["text", "text", "cam", "boxes", "refined", "PAR"]),
    ],
)
def test_only_what_comes_after_a_change_is_computed(pipeline, shown, change, computed) -> None:
    chosen = published(("fish",))
    pipeline.show(shown, chosen)
    pipeline.made.clear()
    pipeline.show(shown, replace(chosen, **change))
    assert pipeline.made == computed
    pipeline.made.clear()
    pipeline.show(shown, chosen)
    assert pipeline.made == []


def test_par_goes_on_from_where_it_was(pipeline, shown) -> None:
    chosen = published(shown.tags)
    direct = pipeline.show(shown, replace(chosen, par_iterations=9)).smooth
    other = Pipeline(pipeline.backbone, MINIVOC)
    for count in (2, 5, 9):
        slowly = other.show(shown, replace(chosen, par_iterations=count)).smooth
    assert torch.equal(direct, slowly)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": ()}, "the class name is empty"),
        ({"words": (" ",)}, "the class name is empty"),
        ({"words": ("cat", "cat")}, "'cat' is given twice"),
        ({"template": "a photo"}, "needs one {} where the word goes"),
        ({"words": ("very " * 60 + "long",)}, "tokens, this backbone reads 30: shorten it"),
        ({"block": 12}, "there is no block 12"),
    ],
)
def test_what_makes_no_sense_is_refused(pipeline, shown, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.show(shown, replace(published(("cat",)), **change))


def test_remarks_name_what_a_reader_has_to_know(pipeline, shown) -> None:
    absent = next(name for name in MINIVOC.classes if name not in shown.tags)
    assert pipeline.remarks(shown, published(shown.tags)) == []
    (remark,) = pipeline.remarks(shown, published((absent,)))
    assert f"do not name '{absent}'" in remark
    (remark,) = pipeline.remarks(shown, published(("🚀",)))
    assert "never trained on '🚀'" in remark and "meaningless" in remark
    (remark,) = pipeline.remarks(shown, replace(published(shown.tags[:1]), backgrounds=()))
    assert "there is no map" in remark


def test_without_a_rival_there_is_no_map(pipeline, shown) -> None:
    chosen = replace(published(shown.tags[:1]), backgrounds=())
    assert (
        pipeline.show(shown, chosen).cam.max() < 0.5 or pipeline.show(shown, chosen).cam.eq(0).all()
    )


def test_iou_by_hand(pipeline) -> None:
    mask = np.array([[1, 1, 0, 0], [1, 1, 0, IGNORE_INDEX]], np.uint8)
    shown = Picture("x", np.zeros((2, 4, 3), np.uint8), ("aeroplane",), mask)
    label = torch.tensor([[0, 2, 2, 0], [0, 2, 1, 2]])
    chosen = published(("rocket", MINIVOC.classes[0]))
    assert pipeline.word_iou(shown, chosen, label) == {"aeroplane": 100 * 2 / 5}


def test_rows_of_a_patch_are_rows_of_the_matrices(pipeline, shown) -> None:
    torch.manual_seed(0)
    decoder = Decoder(width=128, class_count=13, block_count=11, dim=32, layers=1).eval()
    ties = Affinities(pipeline, METHOD, {"now": decoder})
    rows = ties.rows(shown, 47, block=10, head=None, decoder="now")
    features = pipeline.features(shown)
    assert_close(rows.head.flatten(), features.attention[10, 0, 48, 1:], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        affinity = decoder(features.tokens[:, :, 1:], features.grid)[1]
    assert_close(rows.affinity.flatten(), affinity[0, 47])
    product, selected = rfm.refine_attention(pipeline.attention(shown)[-6:], affinity)
    assert_close(rows.product.flatten(), product[0, 47])
    assert_close(rows.transition.flatten(), transition_matrix(product)[0, 47])
    one = ties.rows(shown, 47, block=10, head=2, decoder="now").head
    assert not torch.equal(one, rows.head)
    choice = ties.choice(shown, "now")
    assert choice.selected == selected[:, 0].tolist()
    assert choice.blocks == [6, 7, 8, 9, 10, 11]
    taken = zip(choice.selected, choice.difference, strict=True)
    assert all(yes == (value <= choice.limit) for yes, value in taken)
