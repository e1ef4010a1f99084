"""Use a trained decoder: write masks and overlays of pictures, or score a split.

weclip predict --decoder runs/voc/trained.safetensors IMAGES --out DIR
weclip score --decoder runs/voc/trained.safetensors --split val --out DIR
"""

import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from weclip_lib.backbone import Backbone, find_device, load_backbone
from weclip_lib.commands import Predict, Score
from weclip_lib.config import CRF, STATISTICS, DecoderShape, in_range, one_of
from weclip_lib.data.datasets import MaskedImages, normalise, open_profile
from weclip_lib.data.profiles import Profile, check_scales, get_profile
from weclip_lib.data.settings import effective, read_pairs, with_settings
from weclip_lib.decoder import Decoder
from weclip_lib.evaluation.kept import SUFFIX, Row, write_counts
from weclip_lib.evaluation.plan import (
    LEGEND,
    LIST,
    Plan,
    Written,
    find_images,
    plan_outputs,
    refuse_data_set,
)
from weclip_lib.evaluation.quality import ImageCounts
from weclip_lib.evaluation.report import DECIMALS, KEYS, KINDS, SCORES, score_tables
from weclip_lib.evaluation.scores import count_decoders, label_map, predict, shown_to, with_crf
from weclip_lib.figures.plotting import colours, matrix, overlay
from weclip_lib.storage.files import Unusable, check_writable, in_a_line, only_one, reading
from weclip_lib.storage.lists import Report, refuse
from weclip_lib.storage.pictures import read_image, write_mask
from weclip_lib.storage.provenance import write_provenance
from weclip_lib.storage.tensors import load_weights, read_note, read_tensors

READ_AHEAD = 4  # pictures that are decoded in advance
BATCH_PIXELS = 2**22  # of all pictures in one batch
FIGURE = "confusion.png"
PROVENANCE = "score.json"
MOST_CONFUSED = 10  # pairs of classes that `weclip score` prints
NO_SEED = -1  # as in the tables of the notebooks
GIVE = "give a trained.safetensors of `weclip train`"


OF_INFERENCE = ("scales", "long_side")  # settings, beside those of the CRF


@dataclass(frozen=True)
class Segmenter:
    """A trained decoder, its backbone, and how they scale pictures."""

    backbone: Backbone
    decoder: Decoder
    classes: tuple[str, ...]  # foreground, in the order of their ids
    scales: tuple[float, ...]
    long_side: int  # pixels; 0: pictures as they are
    profile: str  # of its training

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    @torch.no_grad()
    def label(
        self, images: Sequence[UInt8[np.ndarray, "height width 3"]], *, crf: CRF | None = None
    ) -> list[UInt8[np.ndarray, "height width"]]:
        """Predict class ids of pictures of one size; average logits over scales and mirror images.

        The network sees a picture at `long_side`, with 4096 patches at most. The class ids have
        the picture's own size.

        Args:
            crf: Applied at half a megapixel at most (`scores.with_crf`); None: no CRF.
        """
        pixels = normalise(images, self.backbone.statistics).to(self.device)
        pixels = shown_to(self.backbone, pixels, self.long_side, self.scales)
        ((_, logits),) = predict(self.backbone, [self.decoder], pixels, scales=self.scales)
        if crf:
            return [with_crf(*pair, crf) for pair in zip(logits, images, strict=True)]
        return list(label_map(logits, images[0].shape[:2]).cpu().numpy())


def read_about(path: Path) -> dict:
    """Read and check the note in a trained decoder's file (`train.trained_note`).

    Raises:
        ValueError: If the file is missing or damaged, or its note is incomplete.
    """
    note = read_note(path)
    needed = ("classes", "backbone", "weights", "statistics", "profile", "decoder", "scales")
    missing = [key for key in (*needed, "long_side") if key not in note]
    if missing:
        raise Unusable(f"{path} does not say which {missing[0]} it belongs to: {GIVE}")
    try:
        for key in ("backbone", "weights", "profile"):
            _check_words(key, [note[key]])
        _check_words("classes", note["classes"])
        one_of("statistics", note["statistics"], STATISTICS)
        in_range("long_side", note["long_side"], 0)
        check_scales(note["scales"])
        return {**note, "decoder": asdict(DecoderShape(**note["decoder"]))}
    except (ValueError, TypeError, KeyError) as error:
        said = in_a_line(error)
        raise Unusable(f"what {path} says of itself is damaged ({said}): {GIVE}") from error


def _check_words(name: str, words: object) -> None:
    fits = isinstance(words, list) and all(isinstance(w, str) and w.strip() for w in words)
    if not fits or not 0 < len(set(words)) == len(words) < 255:
        raise ValueError(f"{name} are {str(words)[:80]}, not 1 to 254 different words")


def described_decoder(note: dict, backbone: Backbone) -> Decoder:
    """Build a decoder of the size in the note of a trained file (`read_about`)."""
    size = dict(note["decoder"])
    fused = size.pop("blocks") or len(backbone.blocks) - 1
    classes = 1 + len(note["classes"])
    return Decoder(width=backbone.width, class_count=classes, block_count=fused, **size)


def load_segmenter(path: Path, *, weights: str = "", device: str = "cpu") -> Segmenter:
    """Load a decoder that `weclip train` wrote, and the backbone that it names.

    Args:
        weights: Of the backbone, if not those that the decoder names.
        device: Its name (`backbone.find_device`); empty: a GPU if there is one.

    Raises:
        ValueError: If the file is missing or damaged, its note is incomplete, or there is no
            such device.
        FileNotFoundError: If the backbone's weights are missing.
    """
    place, note, state = find_device(device), read_about(path), read_tensors(path)
    backbone = load_backbone(note["backbone"], weights or note["weights"], note["statistics"])
    decoder = described_decoder(note, backbone)
    load_weights(decoder, state, str(path))
    return Segmenter(
        backbone.to(place),
        decoder.to(place).eval(),
        tuple(note["classes"]),
        tuple(note["scales"]),
        note["long_side"],
        note["profile"],
    )


def segment_files(
    segmenter: Segmenter,
    images: dict[str, Path],
    *,
    batch: int = 1,
    crf: CRF | None = None,
    report: Report = refuse,
) -> Iterator[tuple[str, UInt8[np.ndarray, "height width 3"], UInt8[np.ndarray, "height width"]]]:
    """Yield name, picture and class ids of files; neighbours of one size form a batch.

    Args:
        batch: Most pictures in a batch; several have 4 megapixels at most.
        report: Called with what is wrong with a picture, which is left out; by default, the
            first is raised.

    Raises:
        ValueError: By default, if a file is unreadable or smaller than a patch.
    """
    for together in _of_one_size(images, batch, report):
        try:
            labels = segmenter.label([picture for _, picture in together], crf=crf)
        except ValueError as error:
            for name, _ in together:
                report(f"{images[name]} cannot be labelled: {error}")
            continue
        for (name, picture), label in zip(together, labels, strict=True):
            yield name, picture, label


def _of_one_size(
    images: dict[str, Path], batch: int, report: Report
) -> Iterator[list[tuple[str, UInt8[np.ndarray, "height width 3"]]]]:
    together: list[tuple[str, np.ndarray]] = []
    for name, coming in _read_ahead(images):
        try:
            picture = coming.result()
        except Unusable as error:
            report(str(error))
            continue
        pixels = (len(together) + 1) * picture.shape[0] * picture.shape[1]
        full = len(together) == batch or pixels > BATCH_PIXELS
        if together and (full or picture.shape != together[0][1].shape):
            yield together
            together = []
        together.append((name, picture))
    if together:
        yield together


def _read_ahead(images: dict[str, Path]) -> Iterator[tuple[str, Future]]:
    """Yield pictures in order, while threads decode the next."""
    with ThreadPoolExecutor() as pool:
        coming: deque[tuple[str, Future]] = deque()
        for name, path in images.items():
            coming.append((name, pool.submit(read_image, path)))
            if len(coming) > READ_AHEAD:
                yield coming.popleft()
        yield from coming


def run_predict(arguments: Predict) -> None:
    """Run `weclip predict`.

    Raises:
        ValueError: If an input cannot be used, or pictures were not labelled.
    """
    _inference(arguments)  # checks it
    images = find_images(arguments.images, names=arguments.names, out=arguments.out)
    plan = plan_outputs(
        images, arguments.out, overlays=arguments.overlays, voc_server=arguments.voc_server
    )
    segmenter = _loaded(arguments)
    legend = "".join(f"{n},{c}\n" for n, c in enumerate(("background", *segmenter.classes)))
    legend = f"id,class\n{legend}"
    before = arguments.out / LEGEND
    if before.exists() and before.read_text("utf-8") != legend:
        raise Unusable(f"{before} has other classes than {arguments.decoder}: choose another --out")
    check_writable(arguments.out)
    with only_one(arguments.out / LIST):
        problems = _write_masks(arguments, plan, segmenter, legend)
    count = len(images) - len(problems)
    tqdm.write(f"wrote {count} masks to {plan.masks}", file=sys.stderr)
    if problems:
        listed = "\n".join(problems)
        raise Unusable(
            f"{len(problems)} of {len(images)} pictures could not be labelled:\n{listed}"
        )


def _write_masks(arguments: Predict, plan: Plan, segmenter: Segmenter, legend: str) -> list[str]:
    """Write all masks that it can; return what is wrong with the others."""
    written, problems = Written(plan.out), []
    with written.whole(plan.out / LEGEND) as partial:
        partial.write_text(legend, encoding="utf-8", newline="")
    crf = _inference(arguments).crf if arguments.crf else None
    found = segment_files(
        segmenter, plan.images, batch=arguments.batch, crf=crf, report=problems.append
    )
    bar = tqdm(found, total=len(plan.images), desc="pictures", unit="picture")
    for name, picture, label in bar:
        mask, *overlays = plan.targets(name)
        try:
            with written.whole(mask) as partial:
                write_mask(partial, label)
            for path in overlays:
                with written.whole(path) as partial:
                    Image.fromarray(overlay(picture, label, colours(256))).save(
                        partial, format="PNG"
                    )
        except Unusable as error:
            problems.append(str(error))
    return problems


def _inference(arguments: Predict | Score) -> Profile:
    """Return a profile with the decoder's settings of inference, changed by the command line.

    Raises:
        ValueError: If a setting is wrong, or has no effect on inference.
    """
    about = read_about(arguments.decoder)
    trained = replace(
        get_profile("voc"), scales=tuple(about["scales"]), long_side=about["long_side"]
    )
    given = read_pairs(trained, arguments.s)
    known = _of_inference(trained)
    for name in given:
        if name not in known:
            raise ValueError(f"{name} has no effect on inference: choose of {', '.join(known)}")
    unused = [name for name in given if name[:4] == "crf_"]
    if unused and not getattr(arguments, "crf", True):
        raise ValueError(f"{unused[0]} has no effect without --crf")
    return with_settings(trained, given)


def _of_inference(setting: Profile) -> dict[str, object]:
    """Return the settings of inference, with their values."""
    found = effective(setting).items()
    return {name: v for name, v in found if name in OF_INFERENCE or name[:4] == "crf_"}


def _loaded(arguments: Predict | Score) -> Segmenter:
    setting = _inference(arguments)
    loaded = load_segmenter(arguments.decoder, weights=arguments.weights, device=arguments.device)
    return replace(loaded, scales=setting.scales, long_side=setting.long_side)


def run_score(arguments: Score) -> None:
    """Run `weclip score`.

    Raises:
        ValueError: If the decoder, the data or the folder cannot be used.
    """
    find_device(arguments.device)
    inference = _inference(arguments)
    about = read_about(arguments.decoder)
    refuse_data_set(arguments.out)
    setting, folder = open_profile(arguments.profile or about["profile"], arguments.data_dir)
    classes = tuple(about["classes"])
    if setting.labels.classes != classes:
        raise ValueError(
            f"{arguments.decoder} knows {len(classes)} classes, {classes[:3]}..., the data "
            f"{len(setting.labels.classes)}, {setting.labels.classes[:3]}...: choose the data that "
            "it was trained for"
        )
    dataset = MaskedImages(folder, arguments.split, setting.labels, limit=arguments.pictures)
    check_writable(arguments.out)
    written = Written(arguments.out)
    for name in (*KEYS, FIGURE, f"scores{SUFFIX}", PROVENANCE):
        written.check(arguments.out / name)
    used = _of_inference(inference)
    _keep_other_scores(arguments, used)
    segmenter = _loaded(arguments)
    found = count_decoders(
        segmenter.backbone,
        {"it": segmenter.decoder},
        dataset,
        scales=segmenter.scales,
        long_side=segmenter.long_side,
        batch=1,
        crf=inference.crf,
    )["it"]
    counted = dict(zip(KINDS, found, strict=True))
    _write_scores(written, counted, ("background", *classes), arguments.split)
    with written.whole(arguments.out / PROVENANCE) as partial:
        write_provenance(partial, "score", asdict(arguments), segmenter.device, effective=used)
    sys.stdout.write(f"split {arguments.split} of {folder}: {len(dataset)} pictures\n\n")
    tables = score_tables(counted, ("background", *classes), arguments.split)
    for name, rows in (("per_class.csv", None), ("confused.csv", MOST_CONFUSED), (SCORES, None)):
        sys.stdout.write(f"{tables[name][:rows].round(DECIMALS).to_string(index=False)}\n\n")
    tqdm.write(f"wrote {arguments.out / SCORES}", file=sys.stderr)


def _keep_other_scores(arguments: Score, used: dict[str, object]) -> None:
    """Refuse to replace scores of another decoder, split or setting.

    Raises:
        Unusable: It names the first difference.
    """
    path = arguments.out / PROVENANCE
    if not path.exists():
        return
    with reading(path, "choose another --out"):
        told = json.loads(path.read_bytes())
        before = told["parameters"] | told["effective"]
    now = asdict(arguments) | used
    for name, value in json.loads(json.dumps(now, default=str)).items():
        if name not in ("out", "device", "s") and before.get(name) != value:
            raise Unusable(
                f"{arguments.out} holds scores with {name} {before.get(name)!r}, not {value!r}: "
                "choose another --out"
            )


def _write_scores(
    written: Written, counted: dict[str, ImageCounts], names: tuple[str, ...], split: str
) -> None:
    """Write tables, the figure of all confusions, and the counts behind them."""
    for name, table in score_tables(counted, names, split).items():
        with written.whole(written.out / name) as partial:
            table.round(DECIMALS).to_csv(partial, index=False, lineterminator="\n")
    total = counted[KINDS[1]].total().double()
    parts = total / total.sum(dim=1, keepdim=True).clamp(min=1)
    title = "share of the true pixels (rows) that are predicted as (columns)"
    figure = matrix(parts.numpy(), rows=names, columns=names, title=title)
    with written.whole(written.out / FIGURE) as partial:
        figure.savefig(partial, dpi=100, format="png")
    kept = {Row(kind, split, "miou", NO_SEED): counts for kind, counts in counted.items()}
    with written.whole(written.out / f"scores{SUFFIX}") as partial:
        write_counts(partial, kept, names)
