"""RFM: let the decoder's affinity choose and reweight CLIP's attention maps.

Source: official clip/clip_tool.py perform_single_voc_cam; REFERENCE 22-24.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from weclip_lib.config import RFM_RULES, one_of

Rule = Literal["absolute", "signed"]


def distances(
    attentions: Float[Tensor, "layer batch patch patch"],
    decoder_affinity: Float[Tensor, "batch patch patch"],
    *,
    rule: Rule = "absolute",
) -> Float[Tensor, "layer batch"]:
    """How far the attention of every layer is from the affinity, summed over all pairs of patches.

    Args:
        rule: `absolute` sums |affinity - attention|, as the paper means it. `signed` sums
            affinity - attention, as the official code does. There the affinity cancels against
            the mean of the layers, so the choice depends on the attention alone (REFERENCE 23).

    Raises:
        ValueError: If the rule is neither.
    """
    one_of("rule", rule, RFM_RULES)
    difference = decoder_affinity - attentions
    if rule == "absolute":
        difference = difference.abs_()
    return difference.sum(dim=(-2, -1))


def select_attention(
    attentions: Float[Tensor, "layer batch patch patch"],
    decoder_affinity: Float[Tensor, "batch patch patch"],
    *,
    rule: Rule = "absolute",
) -> Bool[Tensor, "layer batch"]:
    """The layers that are at most as far from the affinity as the mean layer (`distances`)."""
    total = distances(attentions, decoder_affinity, rule=rule)
    return total <= total.mean(dim=0)


@torch.no_grad()
def refine_attention(
    attentions: Float[Tensor, "layer batch patch patch"],
    decoder_affinity: Float[Tensor, "batch patch patch"],
    *,
    rule: Rule = "absolute",
    select: bool = True,
    multiply: bool = True,
) -> tuple[Float[Tensor, "batch patch patch"], Bool[Tensor, "layer batch"]]:
    """Mean of the selected attention maps, times the decoder's affinity; and the selection.

    Args:
        attentions: Of the last blocks, between patches, mean over heads.
        decoder_affinity: In [0, 1].
        select: Whether maps are selected at all, or every one is averaged.
        multiply: Whether the mean is multiplied by the affinity.
    """
    selected = select_attention(attentions, decoder_affinity, rule=rule)
    if not select:
        selected = torch.ones_like(selected)
    weight = selected.to(attentions) / (selected.sum(dim=0) + 1e-5)
    mean = torch.einsum("lb,lbij->bij", weight, attentions)
    return mean * decoder_affinity if multiply else mean, selected


def static_attention(
    attentions: Float[Tensor, "layer batch patch patch"], *, last: int = 8
) -> Float[Tensor, "batch patch patch"]:
    """Mean of the last attention maps: what is used before the RFM starts; published: 8."""
    return attentions[-last:].mean(dim=0)
