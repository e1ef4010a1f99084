"""WeCLIP: weakly supervised segmentation with a frozen CLIP (Zhang et al., CVPR 2024).

The method stands here, in the order of the paper, and everything else in a sub-package. A name of
the method is imported when it is asked for, so that `import weclip_lib` itself takes no time.
"""

from importlib import import_module
from typing import Any

from weclip_lib.machine import tune
from weclip_lib.moved import keep_old_names

FACE = {
    "load_backbone": "backbone",
    "Backbone": "backbone",
    "ImageFeatures": "backbone",
    "grad_cam": "cam",
    "GradCAM": "cam",
    "pseudo_label": "cam",
    "Decoder": "decoder",
    "refine_attention": "rfm",
    "select_attention": "rfm",
    "static_attention": "rfm",
    "Features": "model",
    "WeCLIP": "model",
    "Method": "config",
    "DecoderShape": "config",
    "Budget": "config",
    "get_profile": "data.profiles",
    "LabelSet": "labels",
    "VOC": "labels",
    "COCO": "labels",
    "MINIVOC": "labels",
}
__all__ = list(FACE)
keep_old_names()
tune()


def __getattr__(name: str) -> Any:
    """A name of the method, from the module that defines it."""
    if name not in FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FACE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *FACE]
