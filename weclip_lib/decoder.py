"""The trained part of WeCLIP: it fuses the frozen blocks' tokens and gives logits and affinity.

Source: official WeCLIP_model/segformer_head.py, Decoder/TransformerDecoder.py; REFERENCE 26, 33.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from weclip_lib.backbone import run_fused


class Decoder(nn.Module):
    """Linear-ReLU-Linear per block, 1x1 convolution, pre-norm transformer, 1x1 convolution.

    Args:
        width: Width of the backbone's tokens.
        class_count: Number of classes with background.
        block_count: Number of last backbone blocks whose tokens are fused.
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

    def fused(
        self, tokens: Float[Tensor, "block batch patch width"]
    ) -> Float[Tensor, "batch patch dim"]:
        """Apply each level's linear layers, then the 1x1 convolution of all levels.

        The convolution follows each level's second linear layer directly. So their weights are
        multiplied first, and every patch needs one product instead of two.
        """
        linears = [part for part in self.projections.modules() if isinstance(part, nn.Linear)]
        firsts, seconds = linears[::2], linears[1::2]
        hidden = [F.relu(first(level)) for first, level in zip(firsts, tokens, strict=True)]
        second = torch.stack([linear.weight for linear in seconds])
        fuse = self.fuse.weight.flatten(1)
        by_level = rearrange(fuse, "out (level c) -> out level c", level=len(second))
        weight = einsum(by_level, second, "out level mid, level mid c -> out level c")
        bias = F.linear(torch.cat([linear.bias for linear in seconds]), fuse, self.fuse.bias)
        return F.linear(torch.cat(hidden, dim=-1), weight.flatten(1), bias)

    def forward(
        self, tokens: Float[Tensor, "block batch patch width"], grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "batch cls grid_h grid_w"], Float[Tensor, "batch patch patch"]]:
        """Return logits on the patch grid, and the affinity in (0, 1) between fused patches.

        Both have single precision, also under autocast: the losses take logarithms and sums.

        Args:
            tokens: Patch tokens without class token, in block order; the last `block_count` count.
            grid: (grid_h, grid_w).

        Raises:
            ValueError: If `tokens` holds fewer blocks than the decoder fuses.
        """
        count = len(self.projections)
        if len(tokens) < count:
            raise ValueError(
                f"this decoder fuses {count} blocks but got {len(tokens)}: "
                "pass the tokens of the blocks it was built for"
            )
        planes = rearrange(self.fused(tokens[-count:]), "b (h w) c -> b c h w", h=grid[0])
        flat = self.dropout(planes).flatten(2)
        affinity = torch.sigmoid((flat.transpose(1, 2) @ flat).float())
        sequence = flat.transpose(1, 2)
        for block in self.blocks:
            sequence = run_fused(block, sequence)
        logits = self.classify(rearrange(sequence, "b (h w) c -> b c h w", h=grid[0]))
        return logits.float(), affinity
