"""A backbone's weights come from a tag of open_clip, a file, a folder, or MiniCLIP.

Nothing replaces missing weights: without its weights there is no backbone.
"""

import json
import logging
import math
from functools import cache
from hashlib import sha256
from pathlib import Path

import open_clip
from torch import nn

from weclip_lib.storage.archive import OPENAI_NUMBERS
from weclip_lib.storage.files import in_a_line, reading
from weclip_lib.storage.provenance import ROOT
from weclip_lib.storage.tensors import load_weights, read_tensors

MINICLIPS = {  # by version of MiniVOC; `round`: after less training
    tag: ROOT / "data" / tag
    for tag in ("miniclip-v1", "miniclip-v2", "miniclip-v2-round-2", "miniclip-v2-round-3")
}
IN_FOLDER = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # names of open_clip
MINICLIP_STATISTICS = ((0.5,) * 3, (64 / 255,) * 3)
NOTHING_LOADED = "No pretrained weights loaded"  # a warning of open_clip; weights follow here

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # (mean, std) by channel


@cache
def register_miniclip() -> None:
    """Register MiniCLIP with open_clip, by the configuration in the repository."""
    open_clip.add_model_config(MINICLIPS["miniclip-v2"] / "MiniCLIP.json")


def refusal(name: str) -> str | None:
    """Say why a model of open_clip cannot be a backbone here; None if it can.

    CAMs need a vision transformer with a class token and its last norm before pooling. Attention
    is read within the blocks, so the transformer has to be open_clip's own implementation.
    """
    register_miniclip()
    config = open_clip.get_model_config(name)
    if config is None:
        return f"unknown backbone {name!r}: choose one of open_clip.list_models()"
    vision, text = config["vision_cfg"], config["text_cfg"]
    reason = None
    if "timm_model_name" in vision:
        reason = (
            f"its image tower is timm's {vision['timm_model_name']} (SigLIP's have no class token)"
        )
    elif isinstance(vision.get("layers"), list):
        reason = "its image tower is a ResNet"
    elif vision.get("attentional_pool") or "multimodal_cfg" in config:
        reason = "it pools patches by attention (CoCa)"
    elif vision.get("pool_type", "tok") != "tok" or vision.get("final_ln_after_pool"):
        reason = "it averages patches before its last norm (CLIPA)"
    elif "hf_model_name" in text:
        reason = f"its text tower is {text['hf_model_name']} of another library"
    return reason and f"{name} cannot be a backbone here: {reason}; choose a ViT such as ViT-B-16"


def untrained(name: str) -> nn.Module:
    """Return an open_clip model without weights, and hide the warning about them."""
    register_miniclip()
    logger = logging.getLogger()  # open_clip logs to the root
    logger.addFilter(_says_something)
    try:
        return open_clip.create_model(name, load_weights=False)
    finally:
        logger.removeFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    return NOTHING_LOADED not in record.getMessage()


def miniclip_weights(tag: str) -> tuple[Path, frozenset[str]]:
    """Check the repository's weights; return their path and the words of their training captions.

    Args:
        tag: One of `MINICLIPS`.

    Raises:
        FileNotFoundError: If the weights, or the card that describes them, are not there.
        ValueError: If the card cannot be read, or the weights are not those that it describes.
    """
    folder = MINICLIPS[tag]
    root, place = folder.parents[1], "/".join(folder.parts[-2:])
    remedy = f"restore it with `git checkout -- {place}` in {root}"
    path, card = folder / "MiniCLIP.safetensors", folder / "card.json"
    for needed in (path, card):
        if not needed.exists():
            raise FileNotFoundError(f"{needed} is missing: {remedy}")
    with reading(card, remedy):
        shown = json.loads(card.read_bytes())
        expected, words = shown["sha256"], frozenset(shown["vocabulary"])
    with reading(path, remedy):
        found = sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(f"it is not the file that ships, but one with sha256 {found[:12]}...")
    return path, words


def _other(name: str) -> str | None:
    """Return the model of open_clip that differs only in its activation; None if there is none."""
    wanted = open_clip.get_model_config(name)
    wanted["quick_gelu"] = not wanted.get("quick_gelu", False)
    for other in open_clip.list_models():
        if {"quick_gelu": False, **open_clip.get_model_config(other)} == wanted:
            return other
    return None


def _check_activation(name: str, source: str, *, quick: bool) -> None:
    """Refuse weights of the other activation: their shapes fit, but every result is wrong."""
    if open_clip.get_model_config(name).get("quick_gelu", False) != quick:
        kinds = ("GELU", "QuickGELU")
        raise ValueError(
            f"{source} was trained with {kinds[quick]}, {name} has {kinds[not quick]}: "
            f"choose {_other(name) or 'the model that it was made for'}"
        )


def _from_file(name: str, path: Path) -> nn.Module:
    """Return a model with the weights of a file, in the model's precision."""
    clip, state = untrained(name), read_tensors(path)
    given = {number: state.pop(number) for number in OPENAI_NUMBERS if number in state}
    here = (clip.visual.image_size[0], clip.context_length, clip.vocab_size)
    for number, own in zip(OPENAI_NUMBERS, here, strict=True):
        if number in given and given[number].tolist() != own:
            raise ValueError(
                f"{path} has {number} {given[number].tolist()}, {name} has {own}: "
                "choose the model that it was made for"
            )
    load_weights(clip, state, str(path))
    if len(given) == len(OPENAI_NUMBERS):
        _check_activation(name, str(path), quick=True)
    return clip


def _from_folder(name: str, folder: Path) -> tuple[nn.Module, Statistics | None]:
    """Return a model with the weights of a checkpoint folder, and the statistics of its config."""
    files = [folder / name for name in IN_FOLDER if (folder / name).exists()]
    if not files:
        raise FileNotFoundError(f"{folder} has none of {', '.join(IN_FOLDER)}")
    config, statistics = folder / "open_clip_config.json", None
    if config.exists():
        with reading(config, "get it anew, or remove it to use the statistics of the model"):
            shown = json.loads(config.read_bytes())
            prepared, model = shown.get("preprocess_cfg", {}), shown.get("model_cfg")
            if "mean" in prepared or "std" in prepared:
                statistics = _statistics(prepared.get("mean"), prepared.get("std"))
            quick = None if model is None else bool(model.get("quick_gelu", False))
        if quick is not None:
            _check_activation(name, str(folder), quick=quick)
    return _from_file(name, files[0]), statistics


def _statistics(mean: object, std: object) -> Statistics:
    for values in (mean, std):
        numbers = isinstance(values, list) and all(type(v) in (int, float) for v in values)
        if not numbers or len(values) != 3 or not all(map(math.isfinite, values)):
            raise ValueError(f"mean {mean}, std {std}: each must be three numbers")
    if min(std) <= 0:
        raise ValueError(f"std {std}: each must be more than 0")
    if max(std) > 1 or min(mean) < 0 or max(mean) > 1:
        raise ValueError(f"mean {mean}, std {std}: pixels go from 0 to 1, and so must these")
    return tuple(map(float, mean)), tuple(map(float, std))


def _by_tag(name: str, tag: str) -> nn.Module:
    """Return a model with weights that open_clip fetches, or has fetched before."""
    tags, other = open_clip.list_pretrained_tags_by_model(name), _other(name)
    if tag not in tags and other and tag in open_clip.list_pretrained_tags_by_model(other):
        _check_activation(name, f"weights {tag!r}", quick=_quick(other, tag))
    if tag not in tags:
        raise ValueError(
            f"weights {tag!r} are neither a file nor a tag of {name}: "
            f"give a path, or one of {', '.join(tags or MINICLIPS)}"
        )
    _check_activation(name, f"weights {tag!r}", quick=_quick(name, tag))
    try:
        return open_clip.create_model(name, pretrained=tag, require_pretrained=True)
    except Exception as error:  # hubs' libraries raise their own errors
        about = open_clip.get_pretrained_cfg(name, tag)
        hub = f"{IN_FOLDER[0]} of https://huggingface.co/{about.get('hf_hub', '').rstrip('/')}"
        where = " or ".join(
            place for place in (about.get("url"), about.get("hf_hub") and hub) if place
        )
        raise FileNotFoundError(
            f"the weights {tag!r} of {name} are not here and cannot be fetched "
            f"({in_a_line(error)}): get {where} with another machine, "
            "and give its path as `weights`"
        ) from error


def _quick(name: str, tag: str) -> bool:
    return open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)


def load_pretrained(name: str, weights: str | Path) -> tuple[nn.Module, Statistics]:
    """Return an open_clip model with its weights, and the image statistics of its training.

    Args:
        weights: A tag of open_clip, a file, or a checkpoint folder of open_clip.

    Raises:
        ValueError: If the tag is unknown, or a file is not what it should be.
        FileNotFoundError: If a file is missing or cannot be fetched; the message says where it is.
    """
    path, stated = Path(weights), None
    if path.is_dir():
        clip, stated = _from_folder(name, path)
    elif path.exists():
        clip = _from_file(name, path)
    else:
        clip = _by_tag(name, str(weights))
    trained_with = (clip.visual.image_mean, clip.visual.image_std)
    return clip, stated or (MINICLIP_STATISTICS if name == "MiniCLIP" else trained_with)
