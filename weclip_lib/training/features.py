"""Compute frozen features and static pseudo labels of a data set once, and keep them on disk.

All pictures need one size; training uses them plain or flipped. The names on disk are hashes of
all that the content depends on, so a changed picture, backbone or setting never finds an old
copy. Many decoders, and many ways to make labels, share the features. New features replace those
that were unused for longest.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from weclip_lib.data.datasets import LabelledImages, batches, normalise, normalise_pixels
from weclip_lib.model import Features, WeCLIP
from weclip_lib.storage.files import locked, whole
from weclip_lib.storage.provenance import source_hash

LIMIT = 20_000_000_000  # bytes of features beside the newest; MiniVOC has 9 GB


def _drop_oldest(folder: Path, kept: Path) -> None:
    """Remove the features unused for longest, until the others fit the limit."""
    by_age = sorted(folder.glob("features-????????????????"), key=lambda p: p.stat().st_mtime)
    others = [path for path in by_age if path != kept]
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in others]
    for number, path in enumerate(others):
        if sum(sizes[number:]) <= LIMIT:
            break
        shutil.rmtree(path)


def _key(*about: object) -> str:
    return sha256(repr(about).encode()).hexdigest()[:16]


class FeatureCache:
    """Tokens, attention and initial CAMs of every picture, plain and flipped.

    Tokens and attention have half precision, CAMs single. Picture `index` flipped is row
    `len(dataset) + index`. What is read goes to the model's device.

    Args:
        model: Its backbone and prompts make the features; its decoder is not used.
        dataset: Pictures of one size.
        folder: Holds one folder per key.
        batch: Pictures per forward pass.

    Raises:
        ValueError: If the pictures differ in size.
    """

    def __init__(
        self, model: WeCLIP, dataset: LabelledImages, folder: Path, *, batch: int = 8
    ) -> None:
        self.image_labels = dataset.image_labels.repeat(2, 1)  # on the CPU
        self.device = model.foreground.device
        self.layers = model.method.attention_layers
        self.key = self._key(model, dataset)
        path = folder / f"features-{self.key}"
        with locked(path):
            if not path.exists():
                self._write(model, dataset, path, batch)
                _drop_oldest(folder, path)
        os.utime(path)
        about = json.loads((path / "about.json").read_text())
        self.cpu_seconds: float = about["cpu_seconds"]  # of the first computation
        self.tokens = np.memmap(path / "tokens.f16", np.float16, "r", shape=tuple(about["tokens"]))
        self.attention = np.memmap(
            path / "attention.f16", np.float16, "r", shape=tuple(about["attention"])
        )
        small = load_file(path / "small.safetensors")
        self.cam: Float[Tensor, "image fg grid_h grid_w"] = small["cam"]
        self.images: UInt8[Tensor, "image height width 3"] = small["images"]
        self.statistics = model.backbone.statistics

    def _key(self, model: WeCLIP, dataset: LabelledImages) -> str:
        about = features_key(model), model.backbone.statistics, self.layers, dataset.digest()
        return _key(source_hash("training.features"), *about)

    def _write(self, model: WeCLIP, dataset: LabelledImages, path: Path, batch: int) -> None:
        images = [dataset.image(index) for index in range(len(dataset))]
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                "the pictures differ in size: features can be cached for one size only"
            )
        images += [image[:, ::-1] for image in images]
        cams: list[Tensor] = []
        about: dict = {}
        began = time.process_time()
        with whole(path) as partial:
            partial.mkdir()
            with (
                (partial / "tokens.f16").open("wb") as tokens,
                (partial / "attention.f16").open("wb") as attention,
                tqdm(total=len(images), desc="caching features", unit="picture") as progress,
            ):
                for rows in batches(range(len(images)), batch):
                    pixels = normalise([images[row] for row in rows], model.backbone.statistics)
                    features = model.extract(pixels.to(self.device), self.image_labels[rows])
                    cams.append(features.cam.cpu())
                    for name, file, value in (
                        ("tokens", tokens, features.tokens),
                        ("attention", attention, features.attention),
                    ):
                        halves = value.transpose(0, 1).half().cpu().contiguous()
                        file.write(halves.numpy().tobytes())
                        about[name] = [len(images), *halves.shape[1:]]
                    progress.update(len(rows))
            about["cpu_seconds"] = time.process_time() - began
            maps = torch.cat(cams).contiguous()
            small = {"cam": maps, "images": torch.from_numpy(np.stack(images))}
            save_file(small, partial / "small.safetensors")
            (partial / "about.json").write_text(json.dumps(about))

    def tokens_of(self, rows: list[int]) -> Float[Tensor, "block batch patch width"]:
        """Return patch tokens of some rows, in single precision."""
        return self._read(self.tokens, rows)

    def features_of(self, rows: list[int]) -> Features:
        """Return all features of some rows, in single precision."""
        attention = self._read(self.attention, rows)
        return Features(self.tokens_of(rows), attention, self.cam[rows].to(self.device))

    def pixels_of(self, rows: list[int]) -> Float[Tensor, "batch 3 height width"]:
        """Return normalised pictures of some rows."""
        return normalise_pixels(self.images[rows].to(self.device), self.statistics)

    def _read(self, kept: np.ndarray, rows: list[int]) -> Float[Tensor, "part batch ..."]:
        halves = torch.from_numpy(kept[rows]).to(self.device)
        return halves.float().transpose(0, 1)


def _hash(tensors: Iterable[Tensor]) -> str:
    total = sha256()
    for tensor in tensors:
        total.update(tensor.cpu().numpy().tobytes())
    return total.hexdigest()


def backbone_key(model: WeCLIP) -> str:
    """Hash the backbone's weights."""
    return _hash(model.backbone.state_dict().values())


def features_key(model: WeCLIP) -> str:
    """Hash the backbone's weights and the prompts' embeddings."""
    return _hash((*model.backbone.state_dict().values(), model.foreground, model.background))


@dataclass(frozen=True)
class StaticLabels:
    """Static pseudo labels of every row of a `FeatureCache`."""

    cam: Float[Tensor, "image fg grid_h grid_w"]  # spread along the attention
    label: UInt8[Tensor, "image height width"]
    cpu_seconds: float  # of the first computation


def static_labels(
    model: WeCLIP, cache: FeatureCache, folder: Path, *, batch: int = 8
) -> StaticLabels:
    """Make static pseudo labels by the model's method, or read them in `folder`."""
    method = asdict(model.method)
    for later in [name for name in method if name.startswith(("rfm_", "affinity_"))]:
        method.pop(later)  # not used here
    key = _key(source_hash("training.features"), cache.key, method)
    path = folder / f"labels-{key}.safetensors"
    with locked(path):
        if not path.exists():
            began = time.process_time()
            cams, made = [], []
            rows = list(range(len(cache.image_labels)))
            with tqdm(total=len(rows), desc="making static labels", unit="picture") as progress:
                for part in batches(rows, batch):
                    refined = model.refine_cam(cache.features_of(part))
                    label = model.pseudo_label(
                        refined, cache.pixels_of(part), cache.image_labels[part]
                    )
                    cams.append(refined.cpu())
                    made.append(label.to(torch.uint8).cpu())
                    progress.update(len(part))
            seconds = torch.tensor(time.process_time() - began)
            maps = torch.cat(cams).contiguous()
            found = {"cam": maps, "label": torch.cat(made), "cpu_seconds": seconds}
            with whole(path) as partial:
                save_file(found, partial)
    found = load_file(path)
    return StaticLabels(found["cam"], found["label"], found["cpu_seconds"].item())
