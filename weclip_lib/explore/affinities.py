"""Show how patches are related by attention, by a decoder, and by the RFM."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from weclip_lib import rfm
from weclip_lib.backbone import Backbone, ImageFeatures, attention_heads, project
from weclip_lib.config import Method
from weclip_lib.decoder import Decoder
from weclip_lib.explore.stages import Keeper, Picture, Pipeline
from weclip_lib.ops.affinity import transition_matrix


@dataclass(frozen=True)
class Rows:
    """How one patch relates to all patches of the picture, by different matrices."""

    head: Float[Tensor, "grid_h grid_w"]  # attention of the chosen block and head
    mean: Float[Tensor, "grid_h grid_w"]  # of the last blocks, all heads
    affinity: Float[Tensor, "grid_h grid_w"]  # of the decoder, in (0, 1)
    product: Float[Tensor, "grid_h grid_w"]  # of the RFM, from both
    transition: Float[Tensor, "grid_h grid_w"]  # of that product


@dataclass(frozen=True)
class Choice:
    """Which blocks the RFM selects for a picture, and by what margin."""

    blocks: list[int]  # candidates
    difference: list[float]  # of each block's attention to the affinity: mean over pairs
    limit: float  # mean difference; blocks up to it are selected
    selected: list[bool]


@torch.no_grad()
def head_attention(
    backbone: Backbone, features: ImageFeatures, block: int
) -> Float[Tensor, "batch head token token"]:
    """Return attention of every head; rows are queries and sum to 1, class token first.

    Raises:
        ValueError: If there is no such block.
    """
    tokens = backbone.entering(features, block)
    chosen = backbone.blocks[block]
    query, key, _ = project(chosen.attn, chosen.ln_1(tokens))
    return attention_heads(query, key)


class Affinities(Keeper):
    """Relations of patches by attention, decoder and RFM; results are kept.

    Args:
        pipeline: Gives features and attention.
        method: RFM rule and number of blocks.
        decoders: By name, such as the training step.
    """

    def __init__(self, pipeline: Pipeline, method: Method, decoders: dict[str, Decoder]) -> None:
        super().__init__()
        self.pipeline, self.method, self.decoders = pipeline, method, decoders

    def heads(self, shown: Picture, block: int) -> Float[Tensor, "head patch patch"]:
        """Return attention between patches for every head."""
        way = self.pipeline
        return self._once(
            "heads",
            (shown, block),
            lambda: head_attention(way.backbone, way.features(shown), block)[0, :, 1:, 1:],
            4,
        )

    def affinity(self, shown: Picture, decoder: str) -> Float[Tensor, "1 patch patch"]:
        """Return it for one decoder."""

        def make() -> Tensor:
            features = self.pipeline.features(shown)
            with torch.no_grad():
                return self.decoders[decoder](features.tokens[:, :, 1:], features.grid)[1]

        return self._once("affinity", (shown, decoder), make)

    def _refined(self, shown: Picture, decoder: str) -> tuple[Tensor, Tensor]:
        def make() -> tuple[Tensor, Tensor]:
            product, _ = rfm.refine_attention(
                self.pipeline.attention(shown)[-self.method.rfm_layers :],
                self.affinity(shown, decoder),
                rule=self.method.rfm_rule,
            )
            return product, transition_matrix(product, rounds=self.method.sinkhorn_rounds)

        return self._once("refined", (shown, decoder), make)

    def rows(
        self, shown: Picture, patch: int, *, block: int, head: int | None, decoder: str
    ) -> Rows:
        """Return the rows of a patch.

        Args:
            patch: Row-major over the grid.
            block: Of the backbone, from 0.
            head: From 0; None: the mean of all heads.
            decoder: Its name.
        """
        heads = self.heads(shown, block)
        product, transition = self._refined(shown, decoder)
        mean = rfm.static_attention(self.pipeline.attention(shown), last=self.method.static_layers)
        height = self.pipeline.features(shown).grid[0]
        found = (
            heads[:, patch].mean(dim=0) if head is None else heads[head, patch],
            mean[0, patch],
            self.affinity(shown, decoder)[0, patch],
            product[0, patch],
            transition[0, patch],
        )
        return Rows(*(rearrange(row, "(h w) -> h w", h=height) for row in found))

    def choice(self, shown: Picture, decoder: str) -> Choice:
        """Return the RFM's choice of blocks, with the margins."""
        count = self.method.rfm_layers
        attention = self.pipeline.attention(shown)[-count:]
        affinity = self.affinity(shown, decoder)
        rule = self.method.rfm_rule
        means = rfm.distances(attention, affinity, rule=rule)[:, 0] / affinity[0].numel()
        selected = rfm.select_attention(attention, affinity, rule=rule)[:, 0]
        last = len(self.pipeline.backbone.blocks)
        return Choice(
            list(range(last - count, last)),
            means.tolist(),
            float(means.mean()),
            selected.tolist(),
        )
