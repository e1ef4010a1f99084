"""Where a backbone's weights come from: a tag of open_clip, a file, a folder, or MiniCLIP.

Nothing falls back in silence: without its weights there is no backbone.
"""

import json
import logging
from hashlib import sha256
from pathlib import Path

import open_clip
from torch import nn

from weclip_lib.checkpoint import load_clip

MINICLIP_FOLDER = Path(__file__).resolve().parents[1] / "data" / "miniclip"
IN_FOLDER = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # names of open_clip
open_clip.add_model_config(MINICLIP_FOLDER / "MiniCLIP.json")

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # (mean, std) by channel


def refusal(name: str) -> str | None:
    """Why a model of open_clip cannot be a backbone here; None if it can.

    CAMs need a vision transformer with a class token whose last norm comes before pooling, in
    open_clip's own implementation, since attention is read within its blocks.
    """
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
    """An open_clip model to load weights into, and not the warning that it has none."""
    logging.disable(logging.WARNING)
    try:
        return open_clip.create_model(name, load_weights=False)
    finally:
        logging.disable(logging.NOTSET)


def miniclip_weights() -> tuple[Path, frozenset[str]]:
    """The weights that ship, checked, and the words of their training captions.

    Raises:
        FileNotFoundError: If they are not there.
        ValueError: If they are not the file that ships.
    """
    card = json.loads((MINICLIP_FOLDER / "card.json").read_text())
    path = MINICLIP_FOLDER / "MiniCLIP.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: restore it with `git checkout -- {path.name}`")
    found = sha256(path.read_bytes()).hexdigest()
    if found != card["sha256"]:
        raise ValueError(
            f"{path} is not the file that ships (sha256 {found[:12]}..., "
            f"expected {card['sha256'][:12]}...): restore it from git or run `make pretrain`"
        )
    return path, frozenset(card["vocabulary"])


def _in_folder(folder: Path) -> tuple[Path, Statistics | None]:
    """Weights of a checkpoint folder of open_clip, and the statistics that its config names."""
    files = [folder / name for name in IN_FOLDER if (folder / name).exists()]
    if not files:
        raise FileNotFoundError(f"{folder} has none of {', '.join(IN_FOLDER)}")
    config = folder / "open_clip_config.json"
    if not config.exists():
        return files[0], None
    shown = json.loads(config.read_text()).get("preprocess_cfg", {})
    given = "mean" in shown and "std" in shown
    return files[0], (tuple(shown["mean"]), tuple(shown["std"])) if given else None


def _by_tag(name: str, tag: str) -> nn.Module:
    """Weights that open_clip fetches, or has fetched before."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise ValueError(
            f"weights {tag!r} are neither a file nor a tag of {name}: "
            f"give a path, or one of {', '.join(tags) or 'no tags'}"
        )
    try:
        return open_clip.create_model(name, pretrained=tag, require_pretrained=True)
    except Exception as error:  # libraries of hubs raise their own, and wrap network errors
        about = open_clip.get_pretrained_cfg(name, tag)
        hub = f"{IN_FOLDER[0]} of https://huggingface.co/{about.get('hf_hub', '').rstrip('/')}"
        where = " or ".join(
            place for place in (about.get("url"), about.get("hf_hub") and hub) if place
        )
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise FileNotFoundError(
            f"the weights {tag!r} of {name} are not here and cannot be fetched ({reason}): get "
            f"{where} with another machine, and give its path as `weights`"
        ) from error


def load_pretrained(name: str, weights: str | Path) -> tuple[nn.Module, Statistics]:
    """An open_clip model with its weights, and the image statistics that it was trained with.

    Args:
        weights: A tag of open_clip, a file, or a checkpoint folder of open_clip.

    Raises:
        ValueError: If the tag is unknown, or a file is not what it should be.
        FileNotFoundError: If a file is not there, or cannot be fetched; the error says where from.
    """
    path, stated = Path(weights), None
    if path.is_dir():
        path, stated = _in_folder(path)
    if path.is_file():
        clip = untrained(name)
        load_clip(clip, path)
    else:
        clip = _by_tag(name, str(weights))
    return clip, stated or (clip.visual.image_mean, clip.visual.image_std)
