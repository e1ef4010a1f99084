"""Decoders of many settings on the same frozen features: what notebooks 03 to 05 compare."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from weclip_lib.backbone import load_backbone
from weclip_lib.cache import FrozenDataset, static_labels
from weclip_lib.config import Budget, Profile
from weclip_lib.datasets import LabelledImages, MaskedImages, data_folder
from weclip_lib.evaluate import score_decoders
from weclip_lib.loop import Trained
from weclip_lib.metrics import confusion_matrix, scores
from weclip_lib.model import WeCLIP
from weclip_lib.train import trained_decoder

NEVER = 1.0  # an `rfm_start` at which the RFM does not start


@dataclass(frozen=True)
class Variant:
    """One setting of a study; what it does not name is the profile's."""

    name: str
    method: dict = field(default_factory=dict)  # fields of config.Method
    shape: dict = field(default_factory=dict)  # fields of config.DecoderShape
    length: int = 1  # times the budget's steps
    backgrounds: int | None = None  # background prompts, the first ones; None: all
    masks: float = 0.0  # part of the pictures that teach, by true masks; 0: all, by pseudo labels


def checked_budget(setting: Profile, *, steps: int, seed_count: int, pictures: int) -> Budget:
    """The profile's budget, or one of so many steps.

    Raises:
        ValueError: If a number is none.
    """
    if seed_count < 1 or steps < 0 or pictures < 0:
        raise ValueError(
            f"seed_count {seed_count}, steps {steps}, pictures {pictures} are no budget: "
            "give 1 or more seeds, and 0 (the profile's) or more of the others"
        )
    return replace(setting.budget, steps=steps or setting.budget.steps)


class Study:
    """The frozen part of a profile, once; and decoders trained on it, kept by what they are.

    Args:
        setting: The profile.
        work: Folder of frozen features and finished decoders.
        data_dir: Of the data set; empty: the profile's.
        pictures: Of train, to train on; 0: all.

    Raises:
        ValueError: If something is wrong with the data set.
    """

    def __init__(
        self, setting: Profile, work: Path, *, data_dir: str = "", pictures: int = 0
    ) -> None:
        self.setting, self.work = setting, work
        self.backbone = load_backbone(setting.backbone, setting.weights, setting.statistics)
        self.folder = data_folder(setting, data_dir)
        self.train = LabelledImages(
            self.folder,
            "train",
            setting.labels,
            min_size=self.backbone.patch_size,
            limit=pictures,
        )
        self._features: dict[int | None, FrozenDataset] = {}

    def split(self, name: str) -> MaskedImages:
        """The pictures of a split with their masks; of train, those that are trained on."""
        limit = len(self.train) if name == "train" else 0
        size = self.backbone.patch_size
        return MaskedImages(self.folder, name, self.setting.labels, min_size=size, limit=limit)

    def model(self, variant: Variant) -> WeCLIP:
        """A new model; its decoder's first weights follow torch's seed."""
        setting = self.setting
        labels = setting.labels
        labels = replace(labels, backgrounds=labels.backgrounds[: variant.backgrounds])
        method = replace(setting.method, **variant.method)
        return WeCLIP(self.backbone, labels, method, replace(setting.decoder, **variant.shape))

    def features(self, variant: Variant) -> FrozenDataset:
        """Of the training pictures; variants with the same prompts share them."""
        key = variant.backgrounds
        if key not in self._features:
            model = self.model(replace(variant, method={}, shape={}))
            self._features[key] = FrozenDataset(model, self.train, self.work / "cache")
        return self._features[key]

    @cached_property
    def true_labels(self) -> UInt8[Tensor, "row height width"]:
        """The masks, in the order of the features' rows."""
        dataset = self.split("train")
        masks = torch.from_numpy(np.stack([dataset.mask(row) for row in range(len(dataset))]))
        return torch.cat([masks, masks.flip(-1)])

    def masked_rows(self, variant: Variant, seed: int) -> list[int]:
        """Rows, with their mirror images, whose masks teach; which ones follows the seed."""
        count = len(self.train)
        part = np.random.default_rng([seed, 1]).permutation(count)[: round(variant.masks * count)]
        return sorted([*part.tolist(), *(part + count).tolist()])

    def train_decoder(
        self, variant: Variant, budget: Budget, seed: int, *, watch: Sequence[int] = ()
    ) -> Trained:
        """Train the variant's decoder, or find it where it was kept.

        Raises:
            ValueError: If the masked pictures do not fill a batch.
        """
        features, rows = self.features(variant), []
        if variant.masks:
            labels, rows = self.true_labels, self.masked_rows(variant, seed)
            variant = replace(variant, method={**variant.method, "rfm_start": NEVER})
        else:
            labels = static_labels(self.model(variant), features, self.work / "cache").label
        return trained_decoder(
            lambda: self.model(variant),
            features,
            labels,
            replace(budget, steps=budget.steps * variant.length),
            seed=seed,
            folder=self.work / "decoders",
            rows=rows,
            watch=watch,
            progress=f"{variant.name}, seed {seed}",
        )

    def score(self, trained: dict[tuple[str, int], Trained], splits: Iterable[str]) -> list[dict]:
        """Rows of a score table: single-scale mIoU of every (variant, seed) on every split."""
        rows = []
        for split in splits:
            dataset = self.split(split)
            decoders = {key: found.model.decoder for key, found in trained.items()}
            found = score_decoders(self.backbone, decoders, dataset, scales=(1.0,), flip=False)
            for (variant, seed), (single, *_) in found.items():
                value = scores(single).miou
                rows.append(self.row(variant, seed, split, "miou", value, len(dataset)))
        return rows

    def row(
        self, variant: str, seed: int, split: str, metric: str, value: float, n_images: int
    ) -> dict:
        """A row of a score table, in percent."""
        return {
            "variant": variant,
            "split": split,
            "metric": metric,
            "value": value,
            "unit": "percent",
            "n_images": n_images,
            "seed": seed,
            "profile": self.setting.name,
        }

    def watched_scores(
        self, trained: dict[tuple[str, int], Trained], watch: Sequence[int]
    ) -> list[dict]:
        """Rows of a curve: mIoU of the labels that were kept during training, against masks."""
        rows = []
        for (variant, seed), run in trained.items():
            for step, labels in zip(run.watched_at, run.watched, strict=True):
                point = {"variant": variant, "seed": seed, "iteration": step}
                rows.append(
                    point | {"metric": "label_miou", "value": self.label_miou(labels, watch)}
                )
        return rows

    def label_miou(self, labels: UInt8[Tensor, "row height width"], rows: Sequence[int]) -> float:
        """mIoU of pseudo labels of some rows against their masks, in percent."""
        count = self.setting.labels.class_count
        pairs = zip(labels.long(), self.true_labels[list(rows)], strict=True)
        return scores(sum(confusion_matrix(a, b, count) for a, b in pairs)).miou
