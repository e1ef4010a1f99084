"""The trained part of WeCLIP: fuse the tokens of the frozen blocks, decode, and give affinity.

Source: official WeCLIP_model/segformer_head.py, Decoder/TransformerDecoder.py; REFERENCE 26, 33.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn


class Decoder(nn.Module):
    """Linear-ReLU-Linear per block, 1x1 convolution, pre-norm transformer, 1x1 convolution.

    Args:
        width: Of the backbone's tokens.
        class_count: Background included.
        block_count: Number of backbone blocks whose tokens are fused.
        dim: Width of the decoder.
        layers: Transformer blocks; published: 3.
        heads: Attention heads.
        dropout: Share of fused channels dropped in training; published: 0.1.
    """

    def __init__(
        self,
        *,
        width: int,
        class_count: int,
        block_count: int,
        dim: int = 256,
        layers: int = 3,
        heads: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, dim))
            for _ in range(block_count)
        )
        self.fuse = nn.Conv2d(dim * block_count, dim, kernel_size=1)
        self.dropout = nn.Dropout2d(dropout)
        self.blocks = nn.ModuleList(
            ResidualAttentionBlock(dim, heads, act_layer=QuickGELU) for _ in range(layers)
        )
        self.classify = nn.Conv2d(dim, class_count, kernel_size=1)

    def forward(
        self, tokens: Float[Tensor, "block batch patch width"], grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "batch cls grid_h grid_w"], Float[Tensor, "batch patch patch"]]:
        """Logits on the patch grid, and the affinity in (0, 1) between fused patches.

        Args:
            tokens: Patch tokens, class token removed, of the fused blocks in order.
            grid: (grid_h, grid_w).

        Raises:
            ValueError: If `tokens` holds another number of blocks than the decoder fuses.
        """
        if len(tokens) != len(self.projections):
            raise ValueError(
                f"this decoder fuses {len(self.projections)} blocks but got {len(tokens)}: "
                "pass the tokens of the blocks it was built for"
            )
        levels = [project(level) for project, level in zip(self.projections, tokens, strict=True)]
        planes = rearrange(torch.cat(levels, dim=-1), "b (h w) c -> b c h w", h=grid[0])
        fused = self.dropout(self.fuse(planes))
        flat = fused.flatten(2)
        affinity = torch.sigmoid(flat.transpose(1, 2) @ flat)
        sequence = flat.transpose(1, 2)
        for block in self.blocks:
            sequence = block(sequence)
        return self.classify(rearrange(sequence, "b (h w) c -> b c h w", h=grid[0])), affinity
