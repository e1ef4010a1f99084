"""Compute what the explorers show, stage by stage, without widgets.

Results are kept, so a changed setting recomputes only the stages after it. Every stage is the
library's own function, so the explorers show what training computes.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer, UInt8
from torch import Tensor

from weclip_lib import rfm
from weclip_lib.backbone import Backbone, ImageFeatures, run_block
from weclip_lib.cam import grad_cam, with_background
from weclip_lib.config import Method
from weclip_lib.data.datasets import LabelledImages, MaskedImages, normalise
from weclip_lib.labels import IGNORE_INDEX, LabelSet
from weclip_lib.ops import par
from weclip_lib.ops.affinity import box_mask, min_max, propagate_cam, transition_matrix

Made = TypeVar("Made")
KEPT = 24  # results of one stage, over all pictures and settings
KEPT_TEXTS = 512
KEPT_PAR = 4  # for PAR, which keeps every iteration


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture to explore; its sides are multiples of a patch."""

    name: str
    pixels: UInt8[np.ndarray, "height width 3"]
    tags: tuple[str, ...] = ()
    mask: UInt8[np.ndarray, "height width"] | None = None


def picture(dataset: LabelledImages, row: int) -> Picture:
    """Get a picture of a data set with its tags, and its mask if there are masks."""
    present = zip(dataset.labels.classes, dataset.image_labels[row].tolist(), strict=True)
    tags = tuple(name for name, value in present if value)
    mask = dataset.mask(row) if isinstance(dataset, MaskedImages) else None
    return Picture(dataset.names[row], dataset.image(row), tags, mask)


@dataclass(frozen=True)
class Settings:
    """Settings between a picture and its pseudo label."""

    words: tuple[str, ...]  # class names or prompts that count as present
    backgrounds: tuple[str, ...]  # prompts of things that are never a class
    template: str
    block: int  # whose first LayerNorm Grad-CAM looks at
    box_threshold: float  # of a CAM, in [0, 1]
    maps: int  # number of last attention maps to average
    rounds: int  # of Sinkhorn's normalisation
    steps: int  # along the transition matrix
    par_iterations: int

    @classmethod
    def published(
        cls, labels: LabelSet, method: Method, blocks: int, words: Sequence[str]
    ) -> "Settings":
        """Return the settings of a profile, for given words."""
        return cls(
            words=tuple(words),
            backgrounds=labels.backgrounds,
            template=method.template,
            block=blocks - 1,
            box_threshold=method.box_threshold,
            maps=method.static_layers,
            rounds=method.sinkhorn_rounds,
            steps=2,
            par_iterations=method.par_iterations,
        )


@dataclass(frozen=True)
class Stages:
    """All results from picture to pseudo label; maps in the order of the words."""

    probabilities: Float[Tensor, " prompt"]  # words, then backgrounds
    cam: Float[Tensor, "word grid_h grid_w"]  # in [0, 1]
    boxes: Bool[Tensor, "word grid_h grid_w"]
    refined: Float[Tensor, "word grid_h grid_w"]  # in [0, 1]
    smooth: Float[Tensor, "map height width"]  # after PAR; background first
    label: Integer[Tensor, "height width"]  # 0 background, 1 the first word, ...


class Keeper:
    """Keeps the last results of every stage, by their inputs."""

    def __init__(self) -> None:
        self.made: list[str] = []  # stages computed, in order
        self._kept: dict[str, OrderedDict] = {}

    def _once(self, stage: str, key: tuple, make: Callable[[], Made], room: int = KEPT) -> Made:
        kept = self._kept.setdefault(stage, OrderedDict())
        if key not in kept:
            kept[key] = make()
            self.made.append(stage)
        kept.move_to_end(key)
        if len(kept) > room:
            kept.popitem(last=False)
        return kept[key]


class Pipeline(Keeper):
    """Makes pseudo labels with the frozen parts, and keeps every stage.

    Args:
        backbone: Frozen CLIP.
        labels: Classes; a word that is one of them gets the data set's prompt.
    """

    def __init__(self, backbone: Backbone, labels: LabelSet) -> None:
        super().__init__()
        self.backbone, self.labels = backbone, labels

    def images(self, shown: Picture) -> Float[Tensor, "1 3 height width"]:
        """Normalise, on the backbone's device."""
        device = next(self.backbone.parameters()).device
        return self._once(
            "images",
            (shown,),
            lambda: normalise([shown.pixels], self.backbone.statistics).to(device),
        )

    def features(self, shown: Picture) -> ImageFeatures:
        """Get tokens and attention of all blocks but the last."""
        return self._once(
            "features", (shown,), lambda: self.backbone.encode_image(self.images(shown))
        )

    def attention(self, shown: Picture) -> Float[Tensor, "layer 1 patch patch"]:
        """Get it between patches, all blocks, mean over heads."""

        def make() -> Tensor:
            features = self.features(shown)
            with torch.no_grad():
                _, last = run_block(self.backbone.blocks[-1], features.tokens[-1])
            return torch.cat([features.attention, last.float()[None]])[..., 1:, 1:]

        return self._once("attention", (shown,), make)

    def _text(self, word: str, template: str) -> Float[Tensor, " embedding"]:
        def make() -> Tensor:
            prompt = self.labels.prompts.get(word, word)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # `remarks` says it
                return self.backbone.encode_text([prompt], template)[0]

        return self._once("text", (word, template), make, KEPT_TEXTS)

    def _texts(self, words: Sequence[str], template: str) -> Float[Tensor, "word embedding"]:
        width = self.backbone.visual.proj.shape[1]
        found = [self._text(word, template) for word in words]
        return torch.stack(found) if found else self.backbone.visual.proj.new_zeros(0, width)

    def _cam(self, shown: Picture, chosen: Settings) -> tuple[Tensor, Tensor]:
        features = self.features(shown)
        foreground = self._texts(chosen.words, chosen.template)
        background = self._texts(chosen.backgrounds, chosen.template)
        present = torch.ones(1, len(foreground))
        found = grad_cam(
            self.backbone, features, foreground, background, present, block=chosen.block
        )
        return found.cam[0], found.probabilities[0]

    def check(self, chosen: Settings) -> None:
        """Refuse invalid settings.

        Raises:
            ValueError: It names the setting and the remedy.
        """
        if not chosen.words or not all(word.strip() for word in chosen.words):
            raise ValueError("the class name is empty: type a word, such as boat")
        double = {word for word in chosen.words if chosen.words.count(word) > 1}
        if double:
            raise ValueError(f"{sorted(double)[0]!r} is given twice: name every class once")
        if chosen.template.count("{}") != 1:
            raise ValueError(f"the template {chosen.template!r} needs one {{}} where the word goes")

    def remarks(self, shown: Picture, chosen: Settings) -> list[str]:
        """Return warnings that help to read the maps."""
        found = []
        prompts = [chosen.template.format(word) for word in chosen.words]
        if unknown := self.backbone.unknown_words(prompts):
            found.append(
                f"This backbone was never trained on {', '.join(map(repr, unknown))}: "
                "its score is meaningless."
            )
        for word in chosen.words:
            if shown.tags and word in self.labels.classes and word not in shown.tags:
                found.append(
                    f"The tags of this picture do not name {word!r}: the map shows where the "
                    "backbone would look for one."
                )
        if not chosen.backgrounds and len(chosen.words) == 1:
            found.append(
                "With one word and no background prompt the probability is always 1, its gradient "
                "is 0, and there is no map."
            )
        return found

    def show(self, shown: Picture, chosen: Settings) -> Stages:
        """Compute all stages of a picture.

        Raises:
            ValueError: If a setting is invalid, or a prompt is too long.
        """
        self.check(chosen)
        scored = (shown, chosen.words, chosen.backgrounds, chosen.template, chosen.block)
        cam, probabilities = self._once("cam", scored, lambda: self._cam(shown, chosen))
        boxed = (*scored, chosen.box_threshold)
        boxes = self._once("boxes", boxed, lambda: box_mask(cam[None], chosen.box_threshold)[0])
        tied = (shown, chosen.maps, chosen.rounds)
        transition = self._once("transition", tied, lambda: self._transition(shown, chosen))
        spread = (*boxed, *tied[1:], chosen.steps)
        refined = self._once(
            "refined",
            spread,
            lambda: min_max(propagate_cam(cam[None], transition, boxes[None], steps=chosen.steps))[
                0
            ],
        )
        iterates = self._once("PAR", spread, lambda: [self._start(shown, refined)], KEPT_PAR)
        while len(iterates) <= chosen.par_iterations:
            kernel = self._once("kernel", (shown,), lambda: self._kernel(shown))
            iterates.append(par.smooth(iterates[-1], kernel, par.DILATIONS))
        smooth = iterates[chosen.par_iterations][0]
        label = smooth.max(dim=0).indices
        return Stages(probabilities, cam, boxes, refined, smooth, label)

    def _transition(self, shown: Picture, chosen: Settings) -> Tensor:
        attention = rfm.static_attention(self.attention(shown), last=chosen.maps)
        return transition_matrix(attention, rounds=chosen.rounds)

    @staticmethod
    def _start(shown: Picture, refined: Tensor) -> Float[Tensor, "1 map height width"]:
        """Enlarge maps to the picture's size, background first, for PAR."""
        return with_background(refined[None], shown.pixels.shape[:2])

    def _kernel(self, shown: Picture) -> Tensor:
        return par.par_kernel(self.images(shown), par.DILATIONS)

    def word_iou(
        self, shown: Picture, chosen: Settings, label: Integer[Tensor, "height width"]
    ) -> dict[str, float]:
        """Return IoU in percent of every word that is a class; empty without a mask."""
        if shown.mask is None:
            return {}
        known, found = shown.mask != IGNORE_INDEX, label.cpu().numpy()
        scores = {}
        for number, word in enumerate(chosen.words, start=1):
            if word in self.labels.classes:
                truth = shown.mask == 1 + self.labels.classes.index(word)
                guess = (found == number) & known
                union = (truth | guess).sum()
                scores[word] = 100 * float((truth & guess).sum() / union) if union else 0.0
        return scores
