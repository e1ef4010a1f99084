"""Train decoders: kept by all that they depend on (studies), or at length from the command line."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from jaxtyping import UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from weclip_lib.cache import FrozenDataset
from weclip_lib.checkpoint import load_weights, read_note, save_weights
from weclip_lib.config import Budget
from weclip_lib.files import locked, whole
from weclip_lib.loop import Trained, train_decoder
from weclip_lib.model import WeCLIP
from weclip_lib.repro import seed_everything, source_hash
from weclip_lib.sources import FrozenSource

MADE_BY = ("affinity", "cam", "decoder", "loop", "losses", "model", "par", "rfm", "sources")


def trained_decoder(
    build: Callable[[], WeCLIP],
    features: FrozenDataset,
    labels: UInt8[Tensor, "image height width"],
    budget: Budget,
    *,
    seed: int,
    folder: Path,
    rows: Sequence[int] = (),
    watch: Sequence[int] = (),
    progress: str = "training",
) -> Trained:
    """`train_decoder` on a new model, or the same run's weights from `folder` if they are there.

    Args:
        build: Makes the model; called after seeding, so that its decoder follows from the seed.
        folder: Finished decoders, named by a hash of all that they depend on.
    """
    seed_everything(seed)
    model = build()
    source = FrozenSource(features, labels, rows)
    about = (
        asdict(model.method),
        asdict(budget),
        seed,
        sha256(labels.numpy().tobytes()).hexdigest(),
        [tuple(p.shape) for p in model.decoder.parameters()],
        features.key,
        source_hash(*MADE_BY),
        list(rows),
    )
    path = folder / f"{sha256(repr(about).encode()).hexdigest()[:16]}.safetensors"
    watching = sha256(repr(list(watch)).encode()).hexdigest()[:16]
    beside = folder / "watched" / f"{path.stem}-{watching}.safetensors"
    with locked(path):
        if path.exists() and (not watch or beside.exists()):
            load_weights(model.decoder, load_file(path), str(path))
            nothing = {"labels": labels.new_empty(0, 0, *labels.shape[1:]), "at": torch.empty(0)}
            kept = load_file(beside) if watch else nothing
            at = kept["at"].tolist()
            return Trained(model.eval(), **read_note(path), watched=kept["labels"], watched_at=at)
        trained = train_decoder(model, source, budget, seed=seed, watch=watch, progress=progress)
        if watch:
            at = torch.tensor(trained.watched_at)
            with whole(beside) as partial:
                save_file({"labels": trained.watched, "at": at}, partial)
        note = {"history": trained.history, "cpu_seconds": trained.cpu_seconds}
        save_weights(model.decoder, path, note)
        return trained
