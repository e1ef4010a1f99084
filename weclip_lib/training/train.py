"""Train decoders: for studies, which reuse finished ones, or from the command line.

weclip train --profile voc --out runs/voc
accelerate launch -m weclip_lib train --profile voc --out runs/voc    (or with torchrun)
"""

import shutil
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
from weclip_lib.config import Budget
from weclip_lib.data.datasets import LabelledImages, MaskedImages, open_profile
from weclip_lib.data.profiles import Profile, get_profile
from weclip_lib.data.settings import effective, read_pairs
from weclip_lib.evaluation.plan import refuse_data_set
from weclip_lib.evaluation.scores import score_decoders
from weclip_lib.model import WeCLIP
from weclip_lib.ops.metrics import scores
from weclip_lib.storage.files import check_writable, locked, only_one, whole, write_text
from weclip_lib.storage.provenance import (
    outside_results,
    seed_everything,
    source_hash,
    write_provenance,
)
from weclip_lib.storage.tensors import load_weights, read_note, read_tensors, save_weights
from weclip_lib.training.checkpoints import checkpoints
from weclip_lib.training.distributed import Group, joined
from weclip_lib.training.features import FeatureCache, features_key
from weclip_lib.training.loop import NOTHING, RunOptions, Trained, train_decoder
from weclip_lib.training.sources import AugmentedSource, Source
from weclip_lib.training.watch import KeptLabels, Watcher, curve_writer

CHECKPOINT_EVERY = 200  # steps of a notebook's long run
NEVER = 1.0  # an `rfm_start` at which the RFM does not start
OPTIONS = ("backbone", "steps", "batch", "crop", "bf16")  # of `weclip train`, which are settings


def decoder_key(model: WeCLIP, source: Source, budget: Budget, seed: int) -> str:
    """Hash all that a trained decoder depends on."""
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
    """Call `train_decoder` on a new model, or load the same run from `folder`.

    A run that encodes pictures in every step takes hours. It keeps checkpoints below `folder`, and
    continues from the newest after a stop.

    Args:
        build: Makes the model after seeding, so that the seed decides its decoder.
        folder: Of finished decoders, each named by `decoder_key`.
        cache: Features of watched pictures.
        watched_rows: Rows of `cache`; their pseudo labels are kept during training.
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
        unfinished = folder / "unfinished" / f"{path.stem}-{watching}"
        watcher = KeptLabels(cache, watched_rows, unfinished) if watched_rows else None
        options = RunOptions(
            folder=unfinished if isinstance(source, AugmentedSource) else None,
            checkpoint_every=CHECKPOINT_EVERY,
            group=Group(device=str(model.foreground.device)),
        )
        trained = train_decoder(
            model, source, budget, seed=seed, watcher=watcher, progress=progress, options=options
        )
        if watcher:
            labels, at = watcher.read()
            trained = replace(trained, watched=labels, watched_at=at)
            with whole(beside) as partial:
                save_file({"labels": labels, "at": torch.tensor(at)}, partial)
        note = {"history": trained.history, "cpu_seconds": trained.cpu_seconds}
        save_weights(model.decoder, path, note)
        shutil.rmtree(unfinished, ignore_errors=True)
        return trained


def validation(setting: Profile, model: WeCLIP, images: MaskedImages) -> Callable[[WeCLIP], float]:
    """Make a function that returns single-scale mIoU in percent."""

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
    """Describe a decoder for later use; its file keeps this."""
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


def run(chosen: Train) -> None:
    """Run `weclip train`.

    Raises:
        ValueError: If the data, the settings or a checkpoint are wrong.
        FloatingPointError: If the loss is not finite.
    """
    refuse_data_set(outside_results(chosen.out))
    check_writable(chosen.out)
    with joined(chosen.device) as group:
        alone = only_one(chosen.out / "trained.safetensors")
        with alone if group.is_first else nullcontext():
            _run(chosen, group)


def _run(chosen: Train, group: Group) -> None:
    setting, data = _setting(chosen)
    finished = chosen.out / "trained.safetensors"
    if finished.exists() and not checkpoints(chosen.out):
        raise ValueError(
            f"{finished} is there without the checkpoints of its run: choose another --out"
        )
    backbone = load_backbone(setting.backbone, setting.weights, setting.statistics)
    size, crop = backbone.patch_size, setting.budget.crop
    if crop % size:
        raise ValueError(
            f"crops of {crop} pixels are no multiple of a patch of {size}: "
            f"give --crop {max(size, crop - crop % size)}"
        )
    images = _images(chosen, setting, data, size, group)
    seed_everything(chosen.seed)
    model = WeCLIP(backbone, setting.labels, setting.method, setting.decoder).to(group.device)
    note = trained_note(setting, setting.budget.steps)
    watcher = None
    if chosen.watch:
        shown = LabelledImages(
            data, images.split, setting.labels, min_size=size, limit=chosen.watch, square=crop,
            skip_broken=chosen.skip_broken,
        )  # fmt: skip
        watcher = Watcher(shown, chosen.out, note, writes=group.is_first)
    train_decoder(
        model,
        AugmentedSource(images, crop, workers=chosen.workers),
        setting.budget,
        seed=chosen.seed,
        watcher=watcher,
        options=_options(chosen, setting, model, data, group),
    )
    if group.is_first:
        save_weights(model.decoder, finished, note)
        told = {"effective": effective(setting)}
        device = torch.device(group.device)
        write_provenance(chosen.out / "train.json", "train", asdict(chosen), device, **told)
        tqdm.write(f"wrote {finished}", file=sys.stderr)


def _setting(chosen: Train) -> tuple[Profile, Path]:
    """Return the profile, changed by the command line, and the data folder.

    Raises:
        ValueError: If a setting is wrong, or given by two options.
    """
    given = read_pairs(get_profile(chosen.profile), chosen.s)
    options = {name: getattr(chosen, name) for name in OPTIONS if getattr(chosen, name)}
    if chosen.supervised:
        options["rfm_start"] = NEVER
    for name in options:
        if name in given:
            by = "supervised" if name == "rfm_start" else name
            raise ValueError(f"{name} is given twice, by -s and by --{by}: leave one out")
    if given.get("augment") is False:
        raise ValueError("augment is False: `weclip train` always augments, so leave it out")
    settings = {**given, **options, "augment": True}
    return open_profile(chosen.profile, chosen.data_dir, chosen.weights, settings)


def _images(chosen: Train, setting: Profile, data: Path, size: int, group: Group) -> LabelledImages:
    """Open the pictures to train on; list broken ones in skipped.txt."""
    kind = MaskedImages if chosen.supervised else LabelledImages
    split = chosen.split or setting.train_split
    images = kind(
        data, split, setting.labels, min_size=size, limit=chosen.pictures,
        skip_broken=chosen.skip_broken,
    )  # fmt: skip
    if images.broken and group.is_first:
        skipped = chosen.out / "skipped.txt"
        write_text(skipped, "".join(f"{problem}\n" for problem in images.broken))
        tqdm.write(f"{len(images.broken)} picture(s) left out: see {skipped}")
    if not images.image_labels.any():
        raise ValueError(f"no picture of {split} in {data} has a tag: there is nothing to learn")
    return images


def _options(
    chosen: Train, setting: Profile, model: WeCLIP, data: Path, group: Group
) -> RunOptions:
    """Set checkpoints, validation, precision and processes by the command line."""
    validate = None
    if chosen.validate_every:
        size, limit = model.backbone.patch_size, chosen.validate_pictures
        masked = MaskedImages(data, chosen.val, setting.labels, min_size=size, limit=limit)
        validate = validation(setting, model, masked)
    return RunOptions(
        folder=chosen.out,
        checkpoint_every=chosen.checkpoint_every,
        validate=validate,
        validate_every=chosen.validate_every,
        accumulate=chosen.accumulate,
        group=group,
        note=curve_writer(chosen.out) if group.is_first else None,
    )
