"""Frozen CLIP: images to patch tokens and attention per block, prompts to text embeddings.

Every open_clip vision transformer with a class token works. Blocks count from 0. The last block
runs only in `cam.py`. The official code also runs it only inside Grad-CAM (REFERENCE 1).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from weclip_lib.config import one_of
from weclip_lib.storage.weights import MINICLIPS, load_pretrained, miniclip_weights, refusal

BREAKS = str.maketrans(".,;:!?", "      ")  # between the words of a prompt
# Differs: CLIP was trained with its own statistics, but the official WeCLIP uses these
# (datasets/transforms.py; REFERENCE 9).
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Heads = Float[Tensor, "batch head token channel"]


@dataclass(frozen=True)
class ImageFeatures:
    """The outputs of the frozen blocks 0 to L-2 for a batch of images."""

    embedded: Float[Tensor, "batch token width"]  # the input of block 0
    tokens: Float[Tensor, "block batch token width"]  # class token first, then patches row-major
    attention: Float[Tensor, "layer batch token token"]  # mean over heads; rows are queries
    grid: tuple[int, int]  # patches: (grid_h, grid_w), token = 1 + grid_h * grid_w


def embed(
    visual: VisionTransformer, images: Float[Tensor, "batch 3 height width"]
) -> tuple[Tensor, tuple[int, int]]:
    """Embed patches and positions, up to the first block; gradients flow.

    The patch positions are resized bilinearly without antialiasing. The class token's position
    is kept (official clip/model.py; REFERENCE 3). Pixels after the last whole patch are dropped.

    Returns:
        Tokens (batch, 1 + grid_h * grid_w, width) and the grid (grid_h, grid_w).
    """
    patches = visual.conv1(images)
    grid = (patches.shape[-2], patches.shape[-1])
    position = visual.positional_embedding
    side = visual.grid_size
    if grid != side:
        plane = rearrange(position[1:], "(h w) c -> 1 c h w", h=side[0])
        plane = F.interpolate(plane, size=grid, mode="bilinear", align_corners=False)
        position = torch.cat([position[:1], rearrange(plane, "1 c h w -> (h w) c")])
    patches = rearrange(patches, "b c h w -> b (h w) c")
    class_token = visual.class_embedding.to(patches).expand(len(patches), 1, -1)
    return visual.ln_pre(torch.cat([class_token, patches], dim=1) + position), grid


def project(
    attention: nn.MultiheadAttention, inputs: Float[Tensor, "batch token width"]
) -> Float[Tensor, "three batch head token channel"]:
    """Return the queries, keys and values of every head; gradients flow."""
    mixed = F.linear(inputs, attention.in_proj_weight, attention.in_proj_bias)
    return rearrange(mixed, "b n (three h d) -> three b h n d", three=3, h=attention.num_heads)


def attention_heads(query: Heads, key: Heads) -> Float[Tensor, "batch head token token"]:
    """Return the attention of every head; rows are queries."""
    return ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).softmax(dim=-1)


def run_block(
    block: ResidualAttentionBlock,
    tokens: Float[Tensor, "batch token width"],
    projected: Float[Tensor, "three batch head token channel"] | None = None,
) -> tuple[Float[Tensor, "batch token width"], Float[Tensor, "batch token token"]]:
    """Run one pre-norm transformer block; return its output and its head-averaged attention.

    Args:
        projected: Queries, keys and values of the normed tokens, if they are computed already.
    """
    if projected is None:
        projected = project(block.attn, block.ln_1(tokens))
    query, key, value = projected
    weights = attention_heads(query, key)
    attended, weights = weights @ value, weights.mean(dim=1)
    tokens = tokens + block.ls_1(block.attn.out_proj(rearrange(attended, "b h n d -> b n (h d)")))
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens))), weights


def run_fused(
    block: ResidualAttentionBlock, tokens: Float[Tensor, "batch token width"]
) -> Float[Tensor, "batch token width"]:
    """Run a block without storing its attention, in training and in evaluation.

    In evaluation the block's own code stores it. This takes up to twice as long with heads as
    narrow as the decoder's.
    """
    attended = F.scaled_dot_product_attention(*project(block.attn, block.ln_1(tokens)))
    tokens = tokens + block.ls_1(block.attn.out_proj(rearrange(attended, "b h n d -> b n (h d)")))
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))


class Backbone(nn.Module):
    """A frozen open_clip model: no parameter requires a gradient, and eval mode never ends.

    Attributes:
        statistics: Per-channel (mean, std) for images in [0, 1].
        vocabulary: Words of the training captions, or None if they are not known.
    """

    def __init__(
        self,
        clip: open_clip.CLIP | open_clip.CustomTextCLIP,
        tokenizer: Callable[[list[str]], Tensor],
        statistics: tuple[tuple[float, ...], tuple[float, ...]],
        vocabulary: frozenset[str] | None = None,
    ) -> None:
        super().__init__()
        visual = clip.visual
        if not hasattr(visual, "class_embedding") or visual.attn_pool is not None:
            raise ValueError(
                f"{type(visual).__name__} has no plain class token: "
                "choose an open_clip ViT such as ViT-B-16-quickgelu"
            )
        self.clip = clip.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.statistics = statistics
        self.vocabulary = vocabulary

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode, whatever `mode` is."""
        return super().train(False)

    @property
    def visual(self) -> VisionTransformer:
        return self.clip.visual

    @property
    def blocks(self) -> list[ResidualAttentionBlock]:
        return list(self.visual.transformer.resblocks)

    @property
    def patch_size(self) -> int:
        """Return the side of a patch in pixels."""
        return self.visual.patch_size[0]

    @property
    def width(self) -> int:
        return self.visual.class_embedding.shape[0]

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        return self.clip.logit_scale.exp()

    @torch.no_grad()
    def encode_image(
        self, images: Float[Tensor, "batch 3 height width"], *, maps: int | None = None
    ) -> ImageFeatures:
        """Run blocks 0 to L-2 on normalised images of any size from one patch up.

        Args:
            maps: Number of last blocks (of these) whose attention is kept; None: all.
                The other blocks do not store their attention, so they are cheaper.

        Raises:
            ValueError: If a side is smaller than a patch.
        """
        if min(images.shape[-2:]) < self.patch_size:
            raise ValueError(
                f"images of {images.shape[-2]}x{images.shape[-1]} pixels are smaller than "
                f"one patch of {self.patch_size}: enlarge them"
            )
        embedded, grid = embed(self.visual, images)
        tokens, blocks, outputs = embedded, self.blocks[:-1], []
        maps = len(blocks) if maps is None else min(maps, len(blocks))
        kept = tokens.new_empty(maps, len(tokens), *[tokens.shape[1]] * 2, dtype=torch.float32)
        for number, block in enumerate(blocks, start=maps - len(blocks)):
            if number < 0:
                tokens = run_fused(block, tokens)
            else:
                tokens, kept[number] = run_block(block, tokens)
            outputs.append(tokens)
        return ImageFeatures(embedded, torch.stack(outputs), kept, grid)

    def entering(self, features: ImageFeatures, block: int) -> Float[Tensor, "batch token width"]:
        """Return the tokens that enter a block; blocks count from 0.

        Raises:
            ValueError: If there is no such block.
        """
        if not 0 <= block < len(self.blocks):
            raise ValueError(f"there is no block {block}: choose 0 to {len(self.blocks) - 1}")
        return features.tokens[block - 1] if block else features.embedded

    def pool(self, tokens: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch embedding"]:
        """Embed images by the mean over their patches after the last block; the length is 1.

        Differs: CLIP itself takes the class token. Source: official clip/model.py; REFERENCE 10.
        """
        patches = self.visual.ln_post(tokens[:, 1:])
        return F.normalize(patches.mean(dim=1) @ self.visual.proj, dim=-1)

    def unknown_words(self, names: Sequence[str]) -> list[str]:
        """Return the prompt words that the training captions lack; none if those are unknown."""
        if self.vocabulary is None:
            return []
        words = {word for name in names for word in name.lower().translate(BREAKS).split()}
        return sorted(words - self.vocabulary)

    @torch.no_grad()
    def encode_text(
        self, names: Sequence[str], template: str = "{}"
    ) -> Float[Tensor, "name embedding"]:
        """Embed `template.format(name)` for every name; the length is 1.

        The method warns if a name has a word that the training captions lack.

        Raises:
            ValueError: If a prompt is too long for the text encoder.
        """
        if self.vocabulary and (unknown := self.unknown_words(names)):
            warnings.warn(
                f"this backbone was never trained on {', '.join(map(repr, unknown))}: "
                f"scores for such prompts mean nothing; it knows {sorted(self.vocabulary)}",
                stacklevel=2,
            )
        prompts = [template.format(name) for name in names]
        for prompt in prompts:
            self._check_length(prompt)
        tokens = self.tokenizer(prompts)
        device = self.visual.class_embedding.device
        return F.normalize(self.clip.encode_text(tokens.to(device)), dim=-1)

    def _check_length(self, prompt: str) -> None:
        """Refuse a prompt that open_clip would cut silently (as official clip/clip.py does)."""
        if not isinstance(self.tokenizer, open_clip.SimpleTokenizer):
            return
        room = self.tokenizer.context_length - 2  # start and end of text
        needed = len(self.tokenizer.encode(prompt))
        if needed > room:
            raise ValueError(
                f"the prompt {prompt[:40]!r}... has {needed} tokens, this backbone reads {room}: "
                "shorten it"
            )


def load_backbone(name: str, weights: str | Path, statistics: str = "own") -> Backbone:
    """Build a frozen backbone from an open_clip model name and its weights.

    Args:
        name: An open_clip model configuration, such as `ViT-B-16-quickgelu` or `MiniCLIP`.
        weights: A tag of open_clip (`openai`), a local file, a checkpoint folder of open_clip, or
            a tag of the weights that come with this library (`storage.weights.MINICLIPS`).
        statistics: Pixels are normalised with these: `own` (from the training) or `imagenet`.

    Raises:
        ValueError: If a name or the tag is unknown, the model cannot be a backbone, its activation
            does not match the weights, or a file is wrong.
        FileNotFoundError: If a file is missing; the error says where to get it.
    """
    one_of("statistics", statistics, ("own", "imagenet"))
    if problem := refusal(name):
        raise ValueError(problem)
    vocabulary = None
    if weights == "miniclip":  # a name of before there were two
        raise ValueError(
            "weights are 'miniclip', which are two now: give miniclip-v1, if a decoder or run from "
            "before names them so, or miniclip-v2"
        )
    if weights in MINICLIPS:
        weights, vocabulary = miniclip_weights(weights)
    clip, own = load_pretrained(name, weights)
    if statistics == "imagenet":
        own = IMAGENET_STATISTICS
    return Backbone(clip, open_clip.get_tokenizer(name), own, vocabulary)


def find_device(name: str = "") -> torch.device:
    """Return a device by its name: cpu, cuda, cuda:1, mps; empty or `auto`: a GPU if there is one.

    Raises:
        ValueError: If this machine has no such device.
    """
    here = ["cpu"]
    if torch.cuda.is_available():
        here += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        here.append("mps")
    if name in ("", "auto"):
        return torch.device("cuda" if "cuda" in here else here[-1])
    if name not in here:
        raise ValueError(f"device is {name!r}: give auto, or what is here: {', '.join(here)}")
    return torch.device(name)
