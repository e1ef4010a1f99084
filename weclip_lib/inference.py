"""Use a trained decoder: masks and overlays of pictures, and scores of a split.

python -m weclip_lib.inference predict --decoder runs/voc/trained.safetensors IMAGES --out DIR
python -m weclip_lib.inference score --decoder runs/voc/trained.safetensors --split val --out DIR
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Integer, UInt8
from PIL import Image
from tqdm import tqdm

from weclip_lib.backbone import Backbone, load_backbone
from weclip_lib.checkpoint import load_weights, read_note, read_tensors
from weclip_lib.config import CRF
from weclip_lib.datasets import MaskedImages, batches, normalise, open_profile
from weclip_lib.decoder import Decoder
from weclip_lib.evaluate import enlarge, predict, resize_longer, score_decoders, with_crf
from weclip_lib.files import check_writable, whole, write_text
from weclip_lib.metrics import scores
from weclip_lib.pictures import read_image, write_mask
from weclip_lib.plotting import colours, matrix

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LARGEST = 2048  # pixels of the longer side at which class ids are decided; beyond, they are copied
VOC_SERVER = Path("results/VOC2012/Segmentation/comp6_test_cls")  # trained on outside data, too


@dataclass(frozen=True)
class Segmenter:
    """A trained decoder on its backbone, and how pictures are shown to it."""

    backbone: Backbone
    decoder: Decoder
    classes: tuple[str, ...]  # foreground, in the order of their ids
    scales: tuple[float, ...]
    long_side: int  # pixels; 0: pictures as they are
    profile: str  # that it was trained with

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    @torch.no_grad()
    def label(
        self, images: Sequence[UInt8[np.ndarray, "height width 3"]], *, crf: CRF | None = None
    ) -> list[UInt8[np.ndarray, "height width"]]:
        """Class ids of pictures of one size, averaged over scales and mirror images.

        A picture is scaled to `long_side` for the network, and its logits back to the picture's
        size (at most 2048 pixels; of larger pictures, class ids are copied to their neighbours).
        """
        height, width = images[0].shape[:2]
        pixels = normalise(images, self.backbone.statistics).to(self.device)
        pixels = resize_longer(pixels, self.long_side)
        ((_, logits),) = predict(self.backbone, [self.decoder], pixels, scales=self.scales)
        shrink = min(1.0, LARGEST / max(height, width))
        size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        found = []
        for one, image in zip(logits.split(1), images, strict=True):
            large = enlarge(one, size)[0]
            if crf:
                small = np.asarray(Image.fromarray(image).resize(size[::-1]))
                ids = with_crf(large, small, crf)
            else:
                ids = large.max(dim=0).indices.cpu().numpy()
            label = Image.fromarray(ids.astype(np.uint8))
            found.append(np.asarray(label.resize((width, height), Image.Resampling.NEAREST)))
        return found


def load_segmenter(path: Path, *, weights: str = "", device: str = "cpu") -> Segmenter:
    """What `python -m weclip_lib.train` wrote: a decoder that says which backbone it belongs to.

    Args:
        weights: Of the backbone, instead of those that the decoder names.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged, or does not say what it is.
    """
    state = read_tensors(path)
    note = read_note(path)
    if "classes" not in note:
        raise ValueError(
            f"{path} does not say which classes and backbone it belongs to: give a "
            "trained.safetensors of `python -m weclip_lib.train`"
        )
    backbone = load_backbone(note["backbone"], weights or note["weights"], note["statistics"])
    fused = len(backbone.blocks) - 1
    decoder = Decoder.described(note, width=backbone.width, block_count=fused)
    load_weights(decoder, state, str(path))
    return Segmenter(
        backbone.to(device),
        decoder.to(device).eval(),
        tuple(note["classes"]),
        tuple(note["scales"]),
        note["long_side"],
        note["profile"],
    )


def overlay(
    image: UInt8[np.ndarray, "height width 3"], label: Integer[np.ndarray, "height width"]
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture with its classes laid over it in colour; background as it is."""
    shown = colours(256)[label]
    mixed = (image.astype(np.uint16) + shown) // 2
    return np.where((label > 0)[..., None], mixed, image).astype(np.uint8)


def find_images(places: Sequence[Path], names: Sequence[str] = ()) -> dict[str, Path]:
    """Pictures by name: files as they are, and those of folders and what lies below.

    Args:
        names: Only these, without their ending.

    Raises:
        ValueError: If a place or a name is not there, or a name comes twice.
    """
    found: dict[str, Path] = {}
    for place in places:
        if not place.exists():
            raise ValueError(f"{place} is not there: give pictures, or folders of them")
        inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
        for path in inside if place.is_dir() else [place]:
            name = str(path.relative_to(place).with_suffix("")) if place.is_dir() else path.stem
            if name in found:
                raise ValueError(f"{found[name]} and {path} would write the same mask: rename one")
            found[name] = path
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{missing[0]} is not among the pictures ({len(missing)} such names)")
    found = {name: found[name] for name in names} if names else found
    if not found:
        raise ValueError(f"no picture in {', '.join(map(str, places))}: looked for {SUFFIXES}")
    return found


def segment_files(
    segmenter: Segmenter,
    images: dict[str, Path],
    *,
    batch: int = 1,
    crf: CRF | None = None,
) -> Iterator[tuple[str, UInt8[np.ndarray, "height width 3"], UInt8[np.ndarray, "height width"]]]:
    """Name, picture and class ids of files; successive ones of one size are shown together.

    Raises:
        ValueError: Naming a file that cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        for names in batches(range(len(images)), 4 * batch):
            chosen = [list(images)[number] for number in names]
            pictures = list(pool.map(lambda name: read_image(images[name]), chosen))
            pairs = zip(chosen, pictures, strict=True)
            for _, same in groupby(pairs, key=lambda pair: pair[1].shape):
                together = list(same)
                for part in batches(range(len(together)), batch):
                    shown = [together[number] for number in part]
                    labels = segmenter.label([picture for _, picture in shown], crf=crf)
                    for (name, picture), label in zip(shown, labels, strict=True):
                        yield name, picture, label


def _predict(arguments: argparse.Namespace, segmenter: Segmenter, crf: CRF | None) -> None:
    names = arguments.names.read_text().split() if arguments.names else ()
    images = find_images(arguments.images, names)
    out = arguments.out / VOC_SERVER if arguments.voc_server else arguments.out
    found = segment_files(segmenter, images, batch=arguments.batch, crf=crf)
    for name, picture, label in tqdm(found, total=len(images), desc="pictures", unit="picture"):
        write_mask(out / f"{name}.png", label)
        if arguments.overlays:
            with whole(arguments.out / "overlays" / f"{name}.png") as partial:
                Image.fromarray(overlay(picture, label)).save(partial, format="PNG")
    legend = "".join(f"{n},{c}\n" for n, c in enumerate(("background", *segmenter.classes)))
    write_text(arguments.out / "classes.csv", f"id,class\n{legend}")
    tqdm.write(f"wrote {len(images)} masks to {out}", file=sys.stderr)


def _score(arguments: argparse.Namespace, segmenter: Segmenter) -> None:
    setting, folder = open_profile(arguments.profile or segmenter.profile, arguments.data_dir)
    if setting.labels.classes != segmenter.classes:
        raise ValueError(
            f"{arguments.decoder} knows {len(segmenter.classes)} classes, "
            f"{segmenter.classes[:3]}..., the data {len(setting.labels.classes)}, "
            f"{setting.labels.classes[:3]}...: choose the data that it was trained for"
        )
    dataset = MaskedImages(folder, arguments.split, setting.labels, limit=arguments.pictures)
    found = score_decoders(
        segmenter.backbone,
        {"it": segmenter.decoder},
        dataset,
        scales=segmenter.scales,
        long_side=segmenter.long_side,
        batch=1,
        crf=CRF(),
    )["it"]
    kinds = ("single scale", "scales and flips", "with CRF")
    judged = [scores(table) for table in found]
    names = ("background", *setting.labels.classes)
    per_class = pd.DataFrame({k: s.class_iou.tolist() for k, s in zip(kinds, judged, strict=True)})
    per_class.insert(0, "class", names)
    with whole(arguments.out / "per_class.csv") as partial:
        per_class.round(2).to_csv(partial, index=False, lineterminator="\n")
    total = pd.DataFrame(
        {
            "prediction": kinds,
            "miou": [s.miou for s in judged],
            "pixel accuracy": [s.pixel_accuracy for s in judged],
            "pictures": len(dataset),
        }
    )
    with whole(arguments.out / "scores.csv") as partial:
        total.round(2).to_csv(partial, index=False, lineterminator="\n")
    parts = found[1].double() / found[1].sum(dim=1, keepdim=True).clamp(min=1)
    title = "share of the true pixels (rows) that are predicted as (columns)"
    figure = matrix(parts.numpy(), rows=names, columns=names, title=title)
    figure.savefig(arguments.out / "confusion.png", dpi=100)
    sys.stdout.write(f"{per_class.round(2).to_string(index=False)}\n\n")
    sys.stdout.write(f"{total.round(2).to_string(index=False)}\n")


def main(given: Sequence[str] | None = None) -> None:
    """Masks of pictures, or scores of a split, by a trained decoder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    predicting = commands.add_parser("predict", help="masks as indexed PNG with VOC's palette")
    predicting.add_argument("images", type=Path, nargs="+", help="files, or folders of them")
    predicting.add_argument("--names", type=Path, help="only those of a list, as in ImageSets")
    predicting.add_argument("--crf", action="store_true", help="dense CRF after the network")
    predicting.add_argument("--overlays", action="store_true", help="pictures with classes, too")
    predicting.add_argument(
        "--voc-server", action="store_true", help="in the folders that VOC's server expects"
    )
    predicting.add_argument("--batch", type=int, default=1, help="pictures of one size together")
    scoring = commands.add_parser("score", help="mIoU: single scale, scales and flips, with CRF")
    scoring.add_argument("--profile", default="", help="of the data; default the decoder's")
    scoring.add_argument("--data-dir", default="", help="default data/<profile>")
    scoring.add_argument("--split", default="val")
    scoring.add_argument("--pictures", type=int, default=0, help="the first so many; 0: all")
    for command in (predicting, scoring):
        command.add_argument("--decoder", type=Path, required=True, help="a trained.safetensors")
        command.add_argument("--weights", default="", help="of the backbone, if they moved")
        command.add_argument("--out", type=Path, required=True, help="folder")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(given)
    try:
        check_writable(arguments.out)
        segmenter = load_segmenter(
            arguments.decoder, weights=arguments.weights, device=arguments.device
        )
        if arguments.command == "predict":
            _predict(arguments, segmenter, CRF() if arguments.crf else None)
        else:
            _score(arguments, segmenter)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
