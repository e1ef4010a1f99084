"""Train and compare decoders of many settings on one data set (notebooks 02 to 05 and 07)."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from weclip_lib.backbone import load_backbone
from weclip_lib.config import Budget, in_range
from weclip_lib.data.datasets import LabelledImages, MaskedImages, normalise
from weclip_lib.data.profiles import Profile
from weclip_lib.evaluation.kept import Row
from weclip_lib.evaluation.quality import ImageCounts
from weclip_lib.evaluation.scores import count_decoders
from weclip_lib.model import WeCLIP
from weclip_lib.ops.metrics import confusion_matrix, scores
from weclip_lib.storage.files import locked, whole
from weclip_lib.storage.provenance import seed_everything, source_hash
from weclip_lib.training.checkpoints import checkpoints
from weclip_lib.training.distributed import Group
from weclip_lib.training.features import FeatureCache, StaticLabels, static_labels
from weclip_lib.training.loop import RunOptions, Trained, train_decoder
from weclip_lib.training.sources import AugmentedSource, CachedSource, Source
from weclip_lib.training.train import (
    CHECKPOINT_EVERY,
    NEVER,
    decoder_key,
    trained_decoder,
    trained_note,
)
from weclip_lib.training.watch import Watcher, curve_writer

WORKERS = 2  # processes that decode and augment
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Variant:
    """One setting of a study; the profile sets all else."""

    name: str
    method: dict = field(default_factory=dict)  # fields of config.Method
    shape: dict = field(default_factory=dict)  # fields of config.DecoderShape
    backgrounds: int | None = None  # number of first background prompts; None: all
    masks: float = 0.0  # fraction taught by true masks; 0: all, by pseudo labels


class Study:
    """The frozen part of a profile, and decoders trained on it; finished ones are kept.

    If the profile augments pictures, training encodes them again in every step. Inspected
    pictures are then the first ones, as squares of the crop's size.

    Args:
        setting: The profile.
        folder: Of the data set.
        work: Folder of frozen features and finished decoders.
        pictures: Number of first pictures of every split to use; 0: all.
        device: Of models and computation; features and labels are kept in files.

    Raises:
        ValueError: If the data set cannot be used.
    """

    def __init__(
        self,
        setting: Profile,
        folder: Path,
        work: Path,
        *,
        pictures: int = 0,
        device: torch.device = CPU,
    ) -> None:
        self.setting, self.folder, self.work = setting, folder, work
        self.pictures, self.device = pictures, device
        backbone = load_backbone(setting.backbone, setting.weights, setting.statistics)
        self.backbone = backbone.to(device)
        self.train = self._images(LabelledImages, setting.train_split, pictures)
        self.inspected_count = min(setting.inspected or len(self.train), len(self.train))
        self.inspected = self.train
        if setting.augment:
            self.inspected = self._images(
                LabelledImages,
                setting.train_split,
                self.inspected_count,
                square=setting.budget.crop,
            )
        # Rows whose pseudo labels are kept during training: a tenth, at least four.
        self.watched_rows = list(
            range(min(self.inspected_count, max(4, self.inspected_count // 10)))
        )
        self._caches: dict[tuple, FeatureCache] = {}
        self.counts: dict[Row, ImageCounts] = {}  # pixels behind the scores, by row of the table

    def _images(
        self, kind: type[LabelledImages], split: str, limit: int, *, square: int = 0
    ) -> LabelledImages:
        size = self.backbone.patch_size
        return kind(
            self.folder, split, self.setting.labels, min_size=size, limit=limit, square=square
        )

    def masked(self, split: str, limit: int) -> MaskedImages:
        """Open the first pictures of a split, of their own sizes, with masks; 0: all."""
        return self._images(MaskedImages, split, limit)

    def inspected_masked(self, name: str = "") -> MaskedImages:
        """Open pictures with masks, of one size: the `inspected` ones, or split `name`."""
        square = self.setting.budget.crop if self.setting.augment else 0
        limit = 0 if name else self.inspected_count
        return self._images(MaskedImages, name or self.setting.train_split, limit, square=square)

    def pixels(
        self, images: LabelledImages, rows: Sequence[int]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Normalise pictures of one size, on the device."""
        chosen = [images.image(row) for row in rows]
        return normalise(chosen, self.backbone.statistics).to(self.device)

    def model(self, variant: Variant) -> WeCLIP:
        """Build a model; torch's seed decides its decoder's first weights."""
        setting = self.setting
        labels = setting.labels
        if variant.backgrounds is not None:
            in_range("backgrounds", variant.backgrounds, 1, len(labels.backgrounds))
        labels = replace(labels, backgrounds=labels.backgrounds[: variant.backgrounds])
        method = replace(setting.method, **variant.method)
        shape = replace(setting.decoder, **variant.shape)
        return WeCLIP(self.backbone, labels, method, shape).to(self.device)

    def cache(self, variant: Variant) -> FeatureCache:
        """Cache features of inspected pictures; variants with equal prompts and maps share them."""
        method = replace(self.setting.method, **variant.method)
        layers = max(method.attention_layers, self.setting.method.attention_layers)
        key = variant.backgrounds, method.template, layers
        if key not in self._caches:
            read = {name: getattr(method, name) for name in ("template", "static_layers")}
            model = self.model(replace(variant, method=read | {"rfm_layers": layers}, shape={}))
            self._caches[key] = FeatureCache(model, self.inspected, self.work / "cache")
        return self._caches[key]

    def static(self, variant: Variant) -> StaticLabels:
        """Make static pseudo labels of the inspected pictures."""
        model = self.model(variant)
        return static_labels(model, self.cache(variant), self.work / "cache")

    @cached_property
    def _masked_train(self) -> MaskedImages:
        """Training pictures with masks; their files are checked once."""
        return self.masked(self.setting.train_split, self.pictures)

    @cached_property
    def true_labels(self) -> UInt8[Tensor, "row height width"]:
        """Masks in the order of the features' rows."""
        dataset = self.inspected_masked()
        masks = torch.from_numpy(np.stack([dataset.mask(row) for row in range(len(dataset))]))
        return torch.cat([masks, masks.flip(-1)])

    def masked_rows(self, variant: Variant, seed: int) -> list[int]:
        """Choose the pictures whose masks teach, by the seed.

        Raises:
            ValueError: If the fraction gives no picture.
        """
        in_range("masks", variant.masks, 0.0, 1.0)
        count = len(self.train)
        chosen = round(variant.masks * count)
        if not chosen:
            least = f"{1 / count:.4f} is one"
            raise ValueError(f"masks is {variant.masks}, none of {count} pictures: {least}")
        order = np.random.default_rng([seed, 1]).permutation(count)
        return sorted(order[:chosen].tolist())

    def source(self, variant: Variant, seed: int) -> Source:
        """Return the pictures and labels that teach the decoder."""
        rows = self.masked_rows(variant, seed) if variant.masks else None
        if self.setting.augment:
            images = self._masked_train if variant.masks else self.train
            return AugmentedSource(images, self.setting.budget.crop, rows=rows, workers=WORKERS)
        if not variant.masks:
            return CachedSource(self.cache(variant), self.static(variant).label)
        mirrored = [row + len(self.train) for row in rows]
        return CachedSource(self.cache(variant), self.true_labels, [*rows, *mirrored])

    def train_decoder(
        self, variant: Variant, budget: Budget, seed: int, *, watched_rows: Sequence[int] = ()
    ) -> Trained:
        """Train the variant's decoder, or load a finished one.

        Raises:
            ValueError: If the masked pictures do not fill a batch.
        """
        source = self.source(variant, seed)
        if variant.masks:
            variant = replace(variant, method={**variant.method, "rfm_start": NEVER})
        return trained_decoder(
            lambda: self.model(variant),
            source,
            budget,
            seed=seed,
            folder=self.work / "decoders",
            cache=self.cache(variant) if watched_rows else None,
            watched_rows=watched_rows,
            progress=f"{variant.name}, seed {seed}",
        )

    def watched_run(self, variant: Variant, budget: Budget, seed: int, *, count: int = 16) -> Path:
        """Train, or find, a run that watched the first pictures; return its folder.

        Args:
            count: Watched pictures; at most all inspected ones.
        """
        count = min(count, self.inspected_count)
        seed_everything(seed)
        model, source = self.model(variant), self.source(variant, seed)
        key = decoder_key(model, source, budget, seed)
        folder = self.work / "watched_runs" / f"{key}-{count}-{source_hash('training.watch')[:8]}"
        with locked(folder):
            if not folder.exists():
                square = self.setting.budget.crop if self.setting.augment else 0
                images = self._images(
                    LabelledImages, self.setting.train_split, count, square=square
                )
                unfinished = self.work / "decoders" / "unfinished" / folder.name
                watcher = Watcher(images, unfinished, trained_note(self.setting, budget.steps))
                options = RunOptions(
                    folder=unfinished if self.setting.augment else None,
                    checkpoint_every=CHECKPOINT_EVERY,
                    group=Group(device=str(self.device)),
                    note=curve_writer(unfinished),
                )
                train_decoder(model, source, budget, seed=seed, watcher=watcher, options=options)
                for path in checkpoints(unfinished):
                    shutil.rmtree(path)
                with whole(folder) as partial:
                    unfinished.replace(partial)
        return folder

    def confusions(
        self,
        trained: dict[tuple[str, int], Trained],
        split: str,
        *,
        every_scale: bool = False,
        metrics: Sequence[str] = ("miou",),
    ) -> tuple[dict[tuple[str, int], tuple[Tensor, ...]], int]:
        """Return confusion matrices of every (variant, seed), and the number of pictures.

        Args:
            every_scale: Whether to use several scales and mirror images, too.
            metrics: Names of these scores in the table; `counts` keeps their pixels.
        """
        dataset, setting = self.masked(split, self.pictures), self.setting
        found = count_decoders(
            self.backbone,
            {key: run.model.decoder for key, run in trained.items()},
            dataset,
            scales=setting.scales if every_scale else (1.0,),
            flip=every_scale,
            long_side=setting.long_side,
            batch=1 if setting.augment else 8,
        )
        for (variant, seed), kinds in found.items():
            for metric, counted in zip(metrics, kinds, strict=False):
                self.counts[Row(variant, split, metric, seed)] = counted
        tables = {key: tuple(one.total() for one in kinds) for key, kinds in found.items()}
        return tables, len(dataset)

    def score(self, trained: dict[tuple[str, int], Trained], splits: Iterable[str]) -> list[dict]:
        """Make rows of a score table: single-scale mIoU of every (variant, seed) and split."""
        rows = []
        for split in splits:
            found, count = self.confusions(trained, split)
            for (variant, seed), (single, *_) in found.items():
                rows.append(self.row(variant, seed, split, "miou", scores(single).miou, count))
        return rows

    def row(
        self, variant: str, seed: int, split: str, metric: str, value: float, n_images: int
    ) -> dict:
        """Make a row of a score table, in percent."""
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
        """Make rows of a curve: mIoU of the labels kept during training, against masks."""
        rows = []
        for (variant, seed), run in trained.items():
            for step, labels in zip(run.watched_at, run.watched, strict=True):
                point = {"variant": variant, "seed": seed, "iteration": step}
                rows.append(
                    point | {"metric": "label_miou", "value": self.label_miou(labels, watch)}
                )
        return rows

    def label_miou(self, labels: UInt8[Tensor, "row height width"], rows: Sequence[int]) -> float:
        """Return mIoU of pseudo labels of some rows against their masks, in percent."""
        count = self.setting.labels.class_count
        pairs = zip(labels.long(), self.true_labels[list(rows)], strict=True)
        return scores(sum(confusion_matrix(a, b, count) for a, b in pairs)).miou
