"""Keep files of a run to look at: labels of fixed pictures, at ten times, and the curve.

Masks are not read here; `evaluation.errors` compares the labels with them afterwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from weclip_lib.backbone import Backbone
from weclip_lib.data.datasets import LabelledImages, batches, normalise
from weclip_lib.decoder import Decoder
from weclip_lib.evaluation.inference import described_decoder
from weclip_lib.evaluation.scores import label_map
from weclip_lib.model import Features, WeCLIP
from weclip_lib.storage.files import reading, whole, write_text
from weclip_lib.storage.tensors import load_weights, read_note, read_tensors, save_tensors
from weclip_lib.training.features import FeatureCache

FOLDER = "watched"
DECODER = "decoder."  # before the names of its tensors
KINDS = ("pseudo_label", "prediction")
COLUMNS = ["iteration", "metric", "value"]  # of the curve
REMEDY = "train again, into an empty folder"


def curve_writer(folder: Path) -> Callable[[list[dict[str, float]]], None]:
    """Make a writer of curve.csv, whole at every point, and of TensorBoard events if installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(folder / "tensorboard"))
    except ImportError:
        board = None

    def write(history: list[dict[str, float]]) -> None:
        rows = [
            (point["iteration"], name, value)
            for point in history
            for name, value in point.items()
            if name != "iteration"
        ]
        lines = "".join(f"{step},{name},{value:.6f}\n" for step, name, value in rows)
        write_text(folder / "curve.csv", f"iteration,metric,value\n{lines}")
        for name, value in history[-1].items() if board else ():
            board.add_scalar(name, value, history[-1]["iteration"])

    return write


@torch.no_grad()
def rfm_label(
    model: WeCLIP,
    features: Features,
    pixels: Float[Tensor, "batch 3 height width"],
    image_labels: Float[Tensor, "batch fg"],
) -> tuple[UInt8[Tensor, "batch height width"], Float[Tensor, "batch cls grid_h grid_w"]]:
    """Return the RFM's pseudo labels, and the decoder's logits, both without dropout."""
    training = model.training
    model.eval()
    logits, affinity = model.decoder(features.tokens, tuple(features.cam.shape[-2:]))
    model.train(training)
    return model.label(features, pixels, image_labels, affinity).to(torch.uint8), logits


def rfm_labels(
    model: WeCLIP, cache: FeatureCache, rows: Sequence[int], *, batch: int = 8
) -> UInt8[Tensor, "row height width"]:
    """Make labels by `rfm_label` for rows of a cache."""
    found = []
    for part in batches(rows, batch):
        given = (cache.features_of(part), cache.pixels_of(part), cache.image_labels[part])
        found.append(rfm_label(model, *given)[0].cpu())
    return torch.cat(found)


class KeptLabels:
    """Keeps labels of the RFM for some rows of a cache, in a folder (for `train_decoder`)."""

    def __init__(self, cache: FeatureCache, rows: Sequence[int], folder: Path) -> None:
        self.cache, self.rows, self.folder = cache, list(rows), folder

    def __call__(self, model: WeCLIP, step: int) -> None:
        """Write them."""
        with whole(self.folder / f"step-{step:07d}.safetensors") as partial:
            save_file({"label": rfm_labels(model, self.cache, self.rows)}, partial)

    def read(self) -> tuple[UInt8[Tensor, "time row height width"], list[int]]:
        """Read the labels of all steps, and the steps."""
        files = sorted(self.folder.glob("step-*.safetensors"))
        labels = torch.stack([load_file(file)["label"] for file in files])
        return labels, [int(file.stem.removeprefix("step-")) for file in files]


class Watcher:
    """Saves a decoder, and its and the RFM's labels of fixed pictures (for `train_decoder`).

    Args:
        images: Of one size; all of them are watched.
        folder: Of the run; files go into `watched/`.
        note: Describes the decoder (`train.trained_note`).
        writes: Whether this process writes the files.
    """

    def __init__(
        self, images: LabelledImages, folder: Path, note: dict, *, writes: bool = True
    ) -> None:
        self.images, self.folder, self.writes = images, folder / FOLDER, writes
        self.note = {**note, "names": images.names, "split": images.split}

    def __call__(self, model: WeCLIP, step: int) -> None:
        """Write `step-<step>.safetensors`."""
        if not self.writes:
            return
        device = next(model.decoder.parameters()).device
        labels, predictions = [], []
        for row in range(len(self.images)):
            pixels = normalise([self.images.image(row)], model.backbone.statistics).to(device)
            tags = self.images.image_labels[row : row + 1]
            label, logits = rfm_label(model, model.extract(pixels, tags), pixels, tags)
            labels.append(label.cpu())
            size = tuple(pixels.shape[-2:])
            predictions.append(label_map(logits, size).to(torch.uint8).cpu())
        kept = {"pseudo_label": torch.cat(labels), "prediction": torch.cat(predictions)}
        save_watched(self.folder / f"step-{step:07d}.safetensors", model, kept, self.note)


def save_watched(path: Path, model: WeCLIP, kept: dict[str, Tensor], note: dict) -> None:
    """Write label maps and their decoder; whole, or not at all."""
    weights = model.decoder.state_dict()
    save_tensors(kept | {DECODER + name: value for name, value in weights.items()}, path, note)


@dataclass(frozen=True)
class Run:
    """A run's watched pictures and its curve, read from its folder."""

    steps: list[int]
    names: list[str]  # of the watched pictures
    split: str
    classes: list[str]
    pseudo_labels: UInt8[Tensor, "step row height width"]  # of the RFM
    predictions: UInt8[Tensor, "step row height width"]  # of the decoder
    curve: pd.DataFrame  # iteration, metric, value
    note: dict  # of the decoder
    weights: list[dict[str, Tensor]]  # of the decoder, by step

    def decoders(self, backbone: Backbone) -> dict[str, Decoder]:
        """Build the decoder of every step, by name, on the backbone's device.

        Raises:
            ValueError: If it belongs to another backbone.
        """
        made, device = {}, next(backbone.parameters()).device
        for step, state in zip(self.steps, self.weights, strict=True):
            decoder = described_decoder(self.note, backbone)
            load_weights(decoder, state, f"the run's step {step}")
            made[f"step {step}"] = decoder.to(device).eval()
        return made


def read_run(folder: Path) -> Run:
    """Read what a run has written so far.

    Raises:
        ValueError: If nothing was watched there, or a file is damaged.
    """
    paths = sorted((folder / FOLDER).glob("step-*.safetensors"))
    if not paths:
        raise ValueError(
            f"{folder / FOLDER} holds no watched pictures: train with `--watch 8`, "
            "or give the folder of another run"
        )
    note, states = read_note(paths[0]), []
    for path in paths:
        states.append(_read_step(path, note, states))
    curve = pd.DataFrame(columns=COLUMNS)
    if (written := folder / "curve.csv").exists():
        with reading(written, REMEDY):
            curve = pd.read_csv(written)[COLUMNS].astype({"iteration": int, "value": float})
    with reading(paths[0], REMEDY):
        return Run(
            [int(path.stem.removeprefix("step-")) for path in paths],
            note["names"],
            note["split"],
            note["classes"],
            *(torch.stack([state[kind] for state in states]) for kind in KINDS),
            curve,
            note,
            [
                {n.removeprefix(DECODER): t for n, t in s.items() if n.startswith(DECODER)}
                for s in states
            ],
        )


def _read_step(path: Path, note: dict, before: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Read the tensors of one watched step; refuse those of another run."""
    state = read_tensors(path)
    with reading(path, REMEDY):
        for kind in KINDS:
            if state[kind].dtype != torch.uint8 or len(state[kind]) != len(note["names"]):
                raise ValueError(f"its {kind} is no label map for each watched picture")
            if read_note(path) != note or any(s[kind].shape != state[kind].shape for s in before):
                raise ValueError("it is of another run than those before")
    return state
