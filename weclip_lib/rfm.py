"""RFM: the decoder's affinity selects and reweights CLIP's attention maps.

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
    """Sum the differences of each layer's attention from the affinity, over all pairs of patches.

    Args:
        rule: `absolute` sums |affinity - attention|, as the paper means it. `signed` sums
            affinity - attention, as the official code does. With `signed`, the affinity cancels
            in the selection, so only the attention decides it (REFERENCE 23).

    Raises:
        ValueError: If the rule is neither of these.
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
    """Select the layers whose distance from the affinity (`distances`) is at most the mean."""
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
    """Return the mean of the selected attention maps times the affinity, and the selection.

    Args:
        attentions: Maps of the last blocks, between patches, mean over heads.
        decoder_affinity: In [0, 1].
        select: If True, select maps; if False, average all of them.
        multiply: If True, multiply the mean by the affinity.
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
    """Average the last attention maps, for use before the RFM starts; published: 8 maps."""
    return attentions[-last:].mean(dim=0)
