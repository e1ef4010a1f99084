"""Train decoders: kept by all that they depend on (studies), or at length from the command line.

weclip train --profile voc --out runs/voc
accelerate launch -m weclip_lib train --profile voc --out runs/voc    (torchrun does as well)
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from weclip_lib.backbone import load_backbone
from weclip_lib.commands import Train
from weclip_lib.config import Budget, Profile
from weclip_lib.data.datasets import LabelledImages, MaskedImages, open_profile
from weclip_lib.evaluation.plan import refuse_data_set
from weclip_lib.evaluation.scores import score_decoders
from weclip_lib.model import WeCLIP
from weclip_lib.ops.metrics import scores
from weclip_lib.storage.files import check_writable, locked, only_one, whole, write_text
from weclip_lib.storage.provenance import outside_results, seed_everything, source_hash
from weclip_lib.storage.tensors import load_weights, read_note, read_tensors, save_weights
from weclip_lib.training.checkpoints import checkpoints
from weclip_lib.training.distributed import Group, joined
from weclip_lib.training.features import FeatureCache, features_key
from weclip_lib.training.loop import NOTHING, RunOptions, Trained, train_decoder
from weclip_lib.training.sources import AugmentedSource, Source
from weclip_lib.training.watch import Watcher, curve_writer, rfm_labels


def decoder_key(model: WeCLIP, source: Source, budget: Budget, seed: int) -> str:
    """Hash of all that a trained decoder depends on."""
    about = (
        asdict(model.method),
        asdict(budget),
        seed,
        [tuple(p.shape) for p in model.decoder.parameters()],
        features_key(model),
        source.key,
        source_hash("training.train"),
    )
    return sha256(repr(about).encode()).hexdigest()[:16]


def trained_decoder(
    build: Callable[[], WeCLIP],
    source: Source,
    budget: Budget,
    *,
    seed: int,
    folder: Path,
    cache: FeatureCache | None = None,
    watched_rows: Sequence[int] = (),
    progress: str = "training",
) -> Trained:
    """`train_decoder` on a new model, or the same run's weights from `folder` if they are there.

    Args:
        build: Makes the model; called after seeding, so that its decoder follows from the seed.
        folder: Finished decoders, named by a hash of all that they depend on.
        cache: Of pictures that are watched.
        watched_rows: Of `cache`; their pseudo labels are kept on the way.
    """
    seed_everything(seed)
    model = build()
    path = folder / f"{decoder_key(model, source, budget, seed)}.safetensors"
    watched = (cache.key, list(watched_rows)) if watched_rows else ""
    watching = sha256(repr(watched).encode()).hexdigest()[:16]
    beside = folder / "watched" / f"{path.stem}-{watching}.safetensors"
    with locked(path):
        if path.exists() and (not watched_rows or beside.exists()):
            load_weights(model.decoder, read_tensors(path), str(path))
            kept = load_file(beside) if watched_rows else {"labels": NOTHING, "at": torch.empty(0)}
            at = kept["at"].tolist()
            return Trained(model.eval(), **read_note(path), watched=kept["labels"], watched_at=at)
        watcher = (lambda now, _: rfm_labels(now, cache, watched_rows)) if watched_rows else None
        trained = train_decoder(
            model, source, budget, seed=seed, watcher=watcher, progress=progress
        )
        if watched_rows:
            at = torch.tensor(trained.watched_at)
            with whole(beside) as partial:
                save_file({"labels": trained.watched, "at": at}, partial)
        note = {"history": trained.history, "cpu_seconds": trained.cpu_seconds}
        save_weights(model.decoder, path, note)
        return trained


def validation(setting: Profile, model: WeCLIP, images: MaskedImages) -> Callable[[WeCLIP], float]:
    """Single-scale mIoU of the decoder as it is, in percent."""

    def score(trained: WeCLIP) -> float:
        found = score_decoders(
            model.backbone,
            {"now": trained.decoder},
            images,
            scales=(1.0,),
            flip=False,
            long_side=setting.long_side,
            batch=1,
        )
        return scores(found["now"][0]).miou

    return score


def trained_note(setting: Profile, steps: int) -> dict:
    """What has to be known to use a decoder again: kept in its file."""
    return {
        "profile": setting.name,
        "backbone": setting.backbone,
        "weights": str(setting.weights),
        "statistics": setting.statistics,
        "classes": list(setting.labels.classes),
        "decoder": asdict(setting.decoder),
        "scales": list(setting.scales),
        "long_side": setting.long_side,
        "steps": steps,
    }


def run(arguments: Train) -> None:
    """`weclip train`.

    Raises:
        ValueError: If something is wrong with the data, the settings or a checkpoint.
        FloatingPointError: If the loss is not finite.
    """
    refuse_data_set(outside_results(arguments.out))
    check_writable(arguments.out)
    with joined(arguments.device) as group:
        alone = only_one(arguments.out / "trained.safetensors")
        with alone if group.is_first else nullcontext():
            _run(arguments, group)


def _run(arguments: Train, group: Group) -> None:
    setting, data = open_profile(arguments.profile, arguments.data_dir)
    chosen = {name: getattr(arguments, name) for name in ("backbone", "weights")}
    setting = replace(setting, **{name: value for name, value in chosen.items() if value})
    if arguments.supervised:
        setting = replace(setting, method=replace(setting.method, rfm_start=1.0))
    numbers = {name: getattr(arguments, name) for name in ("steps", "batch", "crop")}
    budget = replace(setting.budget, **{name: v for name, v in numbers.items() if v})
    folder, finished = arguments.out, arguments.out / "trained.safetensors"
    if finished.exists() and not checkpoints(folder):
        raise ValueError(
            f"{finished} is there without the checkpoints of its run: choose another --out"
        )
    backbone = load_backbone(setting.backbone, setting.weights, setting.statistics)
    size = backbone.patch_size
    if budget.crop % size:
        raise ValueError(f"crops of {budget.crop} pixels are no multiple of a patch of {size}")
    kind = MaskedImages if arguments.supervised else LabelledImages
    split = arguments.split or setting.train_split
    images = kind(
        data, split, setting.labels, min_size=size, limit=arguments.pictures,
        skip_broken=arguments.skip_broken,
    )  # fmt: skip
    if images.broken and group.is_first:
        write_text(folder / "skipped.txt", "".join(f"{problem}\n" for problem in images.broken))
        tqdm.write(f"{len(images.broken)} picture(s) left out: see {folder / 'skipped.txt'}")
    if not images.image_labels.any():
        raise ValueError(f"no picture of {split} in {data} has a tag: there is nothing to learn")
    seed_everything(arguments.seed)
    model = WeCLIP(backbone, setting.labels, setting.method, setting.decoder).to(group.device)
    validate = None
    if arguments.validate_every:
        masked = MaskedImages(
            data, arguments.val, setting.labels, min_size=size, limit=arguments.validate_pictures
        )
        validate = validation(setting, model, masked)
    options = RunOptions(
        folder=folder,
        checkpoint_every=arguments.checkpoint_every,
        validate=validate,
        validate_every=arguments.validate_every,
        accumulate=arguments.accumulate,
        bf16=arguments.bf16,
        group=group,
        note=curve_writer(folder) if group.is_first else None,
    )
    source = AugmentedSource(images, budget.crop, workers=arguments.workers)
    note = trained_note(setting, budget.steps)
    watcher = None
    if arguments.watch:
        shown = LabelledImages(
            data, split, setting.labels, min_size=size, limit=arguments.watch,
            square=budget.crop, skip_broken=arguments.skip_broken,
        )  # fmt: skip
        watcher = Watcher(shown, folder, note, writes=group.is_first)
    train_decoder(model, source, budget, seed=arguments.seed, watcher=watcher, options=options)
    if group.is_first:
        save_weights(model.decoder, finished, note)
        tqdm.write(f"wrote {finished}", file=sys.stderr)
