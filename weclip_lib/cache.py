"""Frozen features of a whole data set, computed once and kept on disk.

Only for pictures of one size that training shows plain or flipped. The folder's name is a hash
of everything the content depends on, so a changed picture, backbone or setting never finds it.
"""

import json
import time
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from weclip_lib.datasets import LabelledImages, batches, normalise
from weclip_lib.files import whole
from weclip_lib.model import Frozen, WeCLIP
from weclip_lib.repro import source_hash

MADE_BY = ("affinity", "backbone", "cache", "cam", "datasets", "model", "par", "rfm")


class FrozenDataset:
    """Features, CAMs and static pseudo labels of every picture, plain and flipped.

    Tokens and attention are kept in half precision, CAMs in single. Picture `index` flipped is
    row `len(dataset) + index`.

    Args:
        model: Its backbone and method make the content; the decoder plays no part.
        dataset: Pictures of one size.
        folder: Holds one folder per key.
        batch: Pictures a forward pass.

    Raises:
        ValueError: If the pictures differ in size.
    """

    def __init__(
        self, model: WeCLIP, dataset: LabelledImages, folder: Path, *, batch: int = 8
    ) -> None:
        self.labels = dataset.image_labels.repeat(2, 1)
        self.layers = model.method.rfm_layers
        self.key = self._key(model, dataset)
        path = folder / self.key
        if not path.exists():
            self._write(model, dataset, path, batch)
        shapes = json.loads((path / "shapes.json").read_text())
        self.cpu_seconds = shapes["cpu_seconds"]  # of computing all this, when it was done
        self.tokens = self._open(path / "tokens.f16", shapes["tokens"])
        self.attention = self._open(path / "attention.f16", shapes["attention"])
        small = load_file(path / "small.safetensors")
        self.cam: Float[Tensor, "image fg grid_h grid_w"] = small["cam"]
        self.static_cam: Float[Tensor, "image fg grid_h grid_w"] = small["static_cam"]
        self.static_label: UInt8[Tensor, "image height width"] = small["static_label"]
        self.images: UInt8[Tensor, "image height width 3"] = small["images"]
        self.statistics = model.backbone.statistics

    @staticmethod
    def _open(path: Path, shape: list[int]) -> np.memmap:
        return np.memmap(path, np.float16, "r", shape=tuple(shape))

    @staticmethod
    def _key(model: WeCLIP, dataset: LabelledImages) -> str:
        total = sha256()
        for tensor in (*model.backbone.state_dict().values(), model.foreground, model.background):
            total.update(tensor.cpu().numpy().tobytes())
        about = (
            source_hash(*MADE_BY),
            asdict(model.method),
            model.backbone.statistics,
            dataset.digest(),
        )
        total.update(repr(about).encode())
        return total.hexdigest()[:16]

    def _write(self, model: WeCLIP, dataset: LabelledImages, path: Path, batch: int) -> None:
        images = [dataset.image(index) for index in range(len(dataset))]
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                "the pictures differ in size: features can be cached for one size only"
            )
        images += [image[:, ::-1] for image in images]
        small: dict[str, list[Tensor]] = {"cam": [], "static_cam": [], "static_label": []}
        shapes: dict = {}
        began = time.process_time()
        progress = tqdm(total=len(images), desc="freezing features", unit="picture")
        with whole(path) as partial:
            partial.mkdir()
            with (
                (partial / "tokens.f16").open("wb") as tokens,
                (partial / "attention.f16").open("wb") as attention,
            ):
                for rows in batches(range(len(images)), batch):
                    pixels = normalise([images[row] for row in rows], model.backbone.statistics)
                    frozen = model.freeze(pixels, self.labels[rows])
                    refined = model.refine_cam(frozen)
                    label = model.pseudo_label(refined, pixels, self.labels[rows])
                    small["cam"].append(frozen.cam)
                    small["static_cam"].append(refined)
                    small["static_label"].append(label.to(torch.uint8))
                    for name, file, value in (
                        ("tokens", tokens, frozen.tokens),
                        ("attention", attention, frozen.attention[-self.layers :]),
                    ):
                        halves = value.transpose(0, 1).half().contiguous()
                        file.write(halves.numpy().tobytes())
                        shapes[name] = [len(images), *halves.shape[1:]]
                    progress.update(len(rows))
            progress.close()
            shapes["cpu_seconds"] = time.process_time() - began
            stacked = {name: torch.cat(values).contiguous() for name, values in small.items()}
            stacked["images"] = torch.from_numpy(np.stack(images))
            save_file(stacked, partial / "small.safetensors")
            (partial / "shapes.json").write_text(json.dumps(shapes))

    def frozen(self, rows: list[int]) -> Frozen:
        """The features of some rows, in single precision."""
        tokens, attention = (
            torch.from_numpy(store[rows]).float().transpose(0, 1)
            for store in (self.tokens, self.attention)
        )
        return Frozen(tokens, attention, self.cam[rows])

    def pixels(self, rows: list[int]) -> Float[Tensor, "batch 3 height width"]:
        """The normalised pictures of some rows."""
        return normalise(list(self.images[rows].numpy()), self.statistics)
