"""The parts of notebook 09: data, an estimate, scores of every stage, differences to the paper.

Everything long is kept in the work folder, so a notebook that was stopped goes on where it was.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import torch
from jaxtyping import Integer
from torch import Tensor

from weclip_lib import cam
from weclip_lib.commands import Download
from weclip_lib.data import download
from weclip_lib.data.datasets import MaskedImages, data_folder, normalise
from weclip_lib.data.layouts import data_root, is_own
from weclip_lib.data.profiles import Profile, get_profile, official
from weclip_lib.data.settings import effective
from weclip_lib.evaluation.quality import ImageCounts
from weclip_lib.evaluation.scores import count_decoders, count_labels, shown_to
from weclip_lib.model import WeCLIP
from weclip_lib.storage.files import nearest_there
from weclip_lib.studies.experiment import Experiment
from weclip_lib.studies.study import Study, Variant
from weclip_lib.training.distributed import Group
from weclip_lib.training.loop import RunOptions, train_decoder

SOURCES = {"voc": ("voc", "sbd"), "coco": ("coco",)}  # what a profile's data set is fetched from
STAGES = ("initial CAM", "+ affinity", "+ PAR (static labels)", "labels of the RFM")
STAGED = {"voc": "train"}  # the split of published stages; others: the one to train on
# Names in results/published.csv of variants that have another one here.
PUBLISHED = {"+ PAR (static labels)": "static labels", "decoder": "decoder, RFM"}
CRF = {"yes": "miou with CRF"}  # of a decoder's row; without: several scales
TRIED_STEPS = 3  # measured for the estimate
TRIED_PICTURES = 2


def prepared_data(profile: Profile, data_dir: str, *, fetch: bool) -> Path:
    """Return the folder of the pictures; download and prepare them first if they are missing.

    Args:
        data_dir: Empty: the profile's own folder.
        fetch: Whether to download what is missing.

    Raises:
        ValueError: If something is missing and cannot be fetched.
    """
    if any(profile.drawn) or profile.name not in SOURCES:
        return data_folder(profile, data_dir)
    folder = Path(data_dir) if data_dir else profile.default_folder
    lists = data_root(folder) / "ImageSets" / "Segmentation"
    if is_own(folder) or (lists / f"{profile.train_split}.txt").exists():
        return data_folder(profile, data_dir)
    if not fetch:
        place = f" --to {data_dir}" if data_dir else ""
        wanted = " and ".join(f"`weclip download {name}{place}`" for name in SOURCES[profile.name])
        raise ValueError(
            f"{lists / profile.train_split}.txt is not there: run {wanted}, give the data_dir "
            "that has it, or set fetch to True (`-p fetch true`)"
        )
    for name in SOURCES[profile.name]:
        if name == "sbd" or not lists.exists():
            download.run(Download(name, to=folder))
    return data_folder(profile, data_dir)


def estimate(
    experiment: Experiment, study: Study, variant: Variant, staged: MaskedImages
) -> pd.DataFrame:
    """Measure a few steps and pictures, and estimate time, disk and memory of the whole run.

    Args:
        staged: Pictures whose stages are scored.

    Returns:
        One row each for training, stages, inference, disk and memory: `what`, `value`, `unit`.

    Raises:
        ValueError: If disk or memory are too small.
    """
    step, splits = _step_seconds(experiment, study, variant), study.setting.scored_splits
    scored = study.masked(splits[0], TRIED_PICTURES)
    picture = _seconds(lambda: count_decoder(study, study.model(variant), scored)) / len(scored)
    few = study.masked(staged.split, TRIED_PICTURES)
    stage = _seconds(lambda: count_stages(study, study.model(variant), few)) / len(few)
    count = sum(len(study.masked(split, study.pictures)) for split in splits)
    budget = experiment.budget
    parameters = sum(p.numel() for p in study.model(variant).decoder.parameters())
    disk = parameters * 4 * (3 * 3 + 2)  # three checkpoints with two moments; two finished files
    memory, there = _memory(experiment.device)
    free = shutil.disk_usage(nearest_there(experiment.work)).free
    if disk > free:
        raise ValueError(
            f"{experiment.work} has {free / 1e9:.1f} GB free, and checkpoints need "
            f"{disk / 1e9:.1f} GB: choose another work_dir"
        )
    if memory > there:
        raise ValueError(
            f"a step needs {memory / 1e9:.1f} GB of memory, and {there / 1e9:.1f} GB are there: "
            "give a smaller crop or batch in settings"
        )
    hours = {
        "training": step * budget.steps * len(experiment.seeds),
        f"stages of {len(staged)} pictures": stage * len(staged),
        f"inference on {count} pictures, with CRF": picture * count * len(experiment.seeds),
    }
    rows = [(what, seconds / 3600, "h") for what, seconds in hours.items()]
    rows.append(("all of it", sum(hours.values()) / 3600, "h"))
    rows.append(("one step", step, "s"))
    rows.append(("disk", disk / 1e9, "GB"))
    rows.append(("memory in use at the most", memory / 1e9, "GB"))
    return pd.DataFrame(rows, columns=["what", "value", "unit"])


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _step_seconds(experiment: Experiment, study: Study, variant: Variant) -> float:
    """Return the time of one training step with the RFM, which is the slower kind."""
    model = study.model(replace(variant, method={**variant.method, "rfm_start": 0.0}))
    source = study.source(variant, experiment.seeds[0])
    options = RunOptions(group=Group(device=str(experiment.device)))

    def train(steps: int) -> None:
        budget = replace(experiment.budget, steps=steps, warmup=0)
        train_decoder(model, source, budget, seed=0, progress="measuring", options=options)

    once = _seconds(lambda: train(1))  # starting workers takes as long in both
    return max(1e-6, _seconds(lambda: train(1 + TRIED_STEPS)) - once) / TRIED_STEPS


def _memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes in use at the most so far, and those that this process can have."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        return torch.cuda.max_memory_reserved(device), free + held
    used = psutil.Process().memory_info().rss
    return used, used + psutil.virtual_memory().available


def count_decoder(study: Study, model: WeCLIP, images: MaskedImages) -> tuple[ImageCounts, ...]:
    """Count the pixels of a decoder's masks: single scale, scales and flips, with CRF."""
    setting = study.setting
    return count_decoders(
        study.backbone,
        {"it": model.decoder},
        images,
        scales=setting.scales,
        long_side=setting.long_side,
        batch=1,
        crf=setting.crf,
    )["it"]


@torch.no_grad()
def stages(
    study: Study, model: WeCLIP, images: MaskedImages, row: int
) -> dict[str, Integer[Tensor, "1 height width"]]:
    """Make the labels of every stage for one training picture, at its own size."""
    shown = normalise([images.image(row)], study.backbone.statistics).to(study.device)
    pixels = shown_to(study.backbone, shown, 0)
    tags, method = images.image_labels[[row]], model.method
    features = model.extract(pixels, tags)
    spread = model.refine_cam(features)
    _, affinity = model.decoder(features.tokens, tuple(features.cam.shape[-2:]))
    made = {
        STAGES[0]: cam.pseudo_label(features.cam, pixels, tags, par_iterations=0),
        STAGES[1]: cam.pseudo_label(spread, pixels, tags, par_iterations=0),
        STAGES[2]: cam.pseudo_label(spread, pixels, tags, par_iterations=method.par_iterations),
        STAGES[3]: model.label(features, pixels, tags, affinity),
    }
    size = tuple(shown.shape[-2:])
    return {
        name: torch.nn.functional.interpolate(label[None].float(), size, mode="nearest")[0].long()
        for name, label in made.items()
    }


def count_stages(study: Study, model: WeCLIP, images: MaskedImages) -> dict[str, ImageCounts]:
    """Count the pixels of the labels of every stage, over training pictures with masks."""
    model.eval()
    return count_labels(lambda rows: stages(study, model, images, *rows), images, batch=1)


def differences(setting: Profile) -> pd.DataFrame:
    """List the settings that differ from the published run: on COCO, or else on VOC."""
    published = official(get_profile("coco" if setting.name == "coco" else "voc"))
    theirs, ours = effective(published), effective(setting)
    names = [name for name in theirs if name in ours and ours[name] != theirs[name]]
    rows = [(name, str(ours[name]), str(theirs[name])) for name in names]
    return pd.DataFrame(rows, columns=["setting", "here", "published run"])


def beside(table: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Set the scores of a run beside published ones of the same stage, split and CRF.

    A published decoder used several scales; where nothing is said of a CRF, there was none.

    Args:
        table: Scores of the run, as a notebook writes them.
        published: Rows of results/published.csv on one data set.

    Returns:
        The published rows, with a column `here`; those with a score here come first.
    """
    rows = []
    for row in published.itertuples():
        decoder = row.what.startswith("decoder")
        metric = CRF.get(row.crf, "miou multi-scale") if decoder else "miou"
        mine = table[
            (table["variant"].replace(PUBLISHED) == row.what)
            & (table["split"] == row.split)
            & (table["metric"] == metric)
        ]["value"]
        spread = f" ± {mine.std():.1f}" if len(mine) > 1 else ""
        here = f"{mine.mean():.1f}{spread}" if len(mine) else ""
        told = (row.what, row.split, row.crf, here, row.figure, row.method, row.read, row.source)
        rows.append(told)
    columns = ["what", "split", "CRF", "here", "published", "method", "read", "source"]
    found = pd.DataFrame(rows, columns=columns)
    return found.sort_values("here", key=lambda here: here == "", kind="stable", ignore_index=True)
