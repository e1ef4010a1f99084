"""Settings: frozen dataclasses, one field a line with value, unit and source.

`official` marks the values of the published run (REFERENCE: official configs and code at commit
0f47db4). `data.profiles` joins them with a data set, a backbone and a budget.
"""

from dataclasses import dataclass
from typing import Literal

RFM_RULES = ("absolute", "signed")
STATISTICS = ("imagenet", "own")


def in_range(name: str, value: object, low: float, high: float | None = None) -> None:
    """Refuse a number outside a range; both ends belong to the range.

    Raises:
        ValueError: If it is outside; the error gives the name and the range.
    """
    whole, top = isinstance(low, int), float("inf") if high is None else high
    inside = isinstance(value, int | float) and low <= value <= top
    if not inside or isinstance(value, bool) or (whole and isinstance(value, float)):
        kind = "a whole number" if whole else "a number"
        span = f"of {low} or more" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} is {value!r}: give {kind} {span}")


def one_of(name: str, value: object, choices: tuple) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        ValueError: If it is none of them; the error gives the name and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(map(str, choices))}")


@dataclass(frozen=True)
class Method:
    """Settings from CAMs to pseudo labels. The defaults are VOC's; `OFFICIAL` is as published."""

    template: str = "a clean origami {}."  # official clip/clip_text.py
    box_threshold: float = 0.4  # of a CAM; official: VOC 0.4, COCO 0.7; below 0: the whole picture
    keep_box_ends: bool = True  # official: False; boxes at the edge lose their last column or row
    sinkhorn_rounds: int = 3  # official clip_tool.py compute_trans_mat
    static_layers: int = 8  # last attention maps averaged before the RFM starts; official
    rfm_layers: int = 6  # last attention maps that the RFM selects from; official: VOC 6, COCO 10
    rfm_rule: Literal["absolute", "signed"] = "absolute"  # official: signed (REFERENCE 23)
    rfm_select: bool = True  # False: all of rfm_layers are averaged; for ablation
    rfm_multiply: bool = True  # False: not multiplied by the decoder's affinity; for ablation
    rfm_start: float = 0.5  # part of training; official: 0.305 on VOC by a miscount; 1: never
    par_iterations: int = 20  # official
    ignore_padding: bool = True  # official: False, padding is labelled and trained on
    affinity_radius: int = 8  # patches; official
    affinity_weight: float = 0.1  # of the affinity loss; official

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise ValueError(f"template is {self.template!r}: write {{}} once, for the class")
        one_of("rfm_rule", self.rfm_rule, RFM_RULES)
        in_range("box_threshold", self.box_threshold, -1.0, 1.0)
        in_range("rfm_start", self.rfm_start, 0.0, 1.0)
        for name in ("static_layers", "rfm_layers", "affinity_radius"):
            in_range(name, getattr(self, name), 1)
        for name in ("sinkhorn_rounds", "par_iterations"):
            in_range(name, getattr(self, name), 0)
        in_range("affinity_weight", self.affinity_weight, 0.0)

    @property
    def attention_layers(self) -> int:
        """Return the number of last attention maps that the method needs."""
        return max(self.static_layers, self.rfm_layers)


OFFICIAL = Method(keep_box_ends=False, rfm_rule="signed", rfm_start=0.305, ignore_padding=False)
OFFICIAL_SWITCHES = {
    name: value for name, value in vars(OFFICIAL).items() if value != getattr(Method(), name)
}


@dataclass(frozen=True)
class CRF:
    """Settings of the dense CRF, which sharpens probabilities; defaults are the published ones."""

    iterations: int = 10  # official
    gaussian_xy: float = 3.0  # standard deviation of nearness, in pixels; official
    gaussian_weight: float = 3.0  # official
    bilateral_xy: float = 64.0  # of nearness and likeness together, in pixels; official
    bilateral_rgb: float = 5.0  # in steps of 0 to 255; official
    bilateral_weight: float = 4.0  # official

    def __post_init__(self) -> None:
        in_range("iterations", self.iterations, 0, 10_000)
        for name in ("gaussian_weight", "bilateral_weight"):
            in_range(name, getattr(self, name), 0.0, 10_000.0)
        for name in ("gaussian_xy", "bilateral_xy", "bilateral_rgb"):
            in_range(name, getattr(self, name), 0.1, 10_000.0)


@dataclass(frozen=True)
class DecoderShape:
    """Size of the trained part; defaults are the published ones (5,985,045 parameters on VOC)."""

    dim: int = 256  # channels; official
    layers: int = 3  # transformer blocks; official
    heads: int = 8  # official
    blocks: int = 0  # last backbone blocks that are fused; 0: all with tokens; official
    dropout: float = 0.1  # of fused channels; official

    def __post_init__(self) -> None:
        in_range("heads", self.heads, 1, 1024)
        in_range("dim", self.dim, 1, 16_384)
        if self.dim % self.heads:
            raise ValueError(f"dim is {self.dim}: give a multiple of the {self.heads} heads")
        for name in ("layers", "blocks"):
            in_range(name, getattr(self, name), 0, 1024)
        in_range("dropout", self.dropout, 0.0, 1.0)


@dataclass(frozen=True)
class Budget:
    """Settings of the decoder's training; defaults are those of the published VOC run."""

    steps: int = 30_000  # official VOC; COCO 80,000
    batch: int = 4  # images; official
    learning_rate: float = 2e-3  # official: 10 x 2e-4, all in one group (REFERENCE 37)
    weight_decay: float = 0.01  # official
    warmup: int = 50  # steps; official
    crop: int = 320  # pixels a side; official
    bf16: bool = False  # autocast in training; official: half precision

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "crop"):
            in_range(name, getattr(self, name), 1, 1_000_000_000)
        in_range("warmup", self.warmup, 0)
        for name in ("learning_rate", "weight_decay"):
            in_range(name, getattr(self, name), 0.0)
