"""Define the CLIP-pretrained ViT classifier in plain PyTorch, for export.

    x = pad(conv(image)) + pos          class token folded into pos[0]
    x = norm_pre(x)
    x = x + attn(norm1(x)); x = x + mlp(norm2(x))     for every block
    logits = head(norm(x[:, 0]))

Variants: without norm_pre; QuickGELU, x * sigmoid(1.702 x), instead of GELU; the mean of the patch
tokens instead of the class token, with a LayerNorm before (norm) or behind it (fc_norm), or none;
before the head of a zero-shot classifier, CLIP's projection and an L2 normalisation; CLIP's
embedding instead of logits, normalised or not, without a head.

Two rearrangements keep the exported graph lean without changing the function:

* The class token is not expanded to a symbolic batch size.  The patch tokens are padded with one
  zero token, and the class token is added with the position embedding: 0 + (cls + pos[0]) is
  bit-identical to concatenation.
* If the head reads only the class token, the last block computes only that token's query,
  projection and MLP; keys and values still use all tokens.

Layout and numerics: ``vision_transformer.py`` of timm 1.0 and of mmpretrain 1.2, which agree
exactly at equal LayerNorm epsilon and native position grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipdeploy.core.passport import Embedding

__all__ = ["Block", "BlockConfig", "ViTConfig", "VisionTransformer"]

# openai/CLIP model.py, QuickGELU.
_QUICK_SCALE = 1.702


@dataclass(frozen=True)
class BlockConfig:
    """Width, heads, width of the MLP, LayerNorm's epsilon and GELU of a transformer's blocks."""

    width: int
    heads: int
    hidden: int
    eps: float
    gelu: Literal["erf", "quick"]


@dataclass(frozen=True)
class ViTConfig:
    """Geometry and numerics of one classifier.

    ``tokens`` counts the class token: a 224 px image in 16 px patches has 14 * 14 + 1 = 197.
    ``hidden`` is the width of the MLP, 4 * width if None.  ``pooling`` is what the head reads: the
    class token, or the mean of the patch tokens.  ``final_norm`` normalises the tokens before the
    pooling, ``fc_norm`` its result.  ``embed`` is the width of CLIP's embedding, which the head
    then reads, normalised; None if the head reads the pooled features.  ``embedding`` makes the
    embedding the output, of length 1 or as it is, and ``classes`` its width; None if there is a
    head.
    """

    patch: int
    image_size: int
    classes: int = 1000
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int | None = None
    eps: float = 1e-5
    gelu: Literal["erf", "quick"] = "erf"
    pooling: Literal["token", "avg"] = "token"
    pre_norm: bool = True
    final_norm: bool = True
    fc_norm: bool = False
    embed: int | None = None
    embedding: Embedding | None = None

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch

    @property
    def tokens(self) -> int:
        """Sequence length, including the class token."""
        return self.grid**2 + 1

    @property
    def mlp_width(self) -> int:
        """The width of the MLP's hidden layer."""
        return 4 * self.width if self.hidden is None else self.hidden

    @property
    def block(self) -> BlockConfig:
        """The configuration of each block."""
        return BlockConfig(self.width, self.heads, self.mlp_width, self.eps, self.gelu)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(_QUICK_SCALE * x)


def _erf_gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def _norm(config: BlockConfig | ViTConfig, present: bool = True) -> nn.Module:
    return nn.LayerNorm(config.width, eps=config.eps) if present else nn.Identity()


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, C) -> (B, N, C), or (B, 1, C) for the class token only.

    ``mask`` (N, N) is added to the scores of each query (rows) and key.
    """

    def __init__(self, config: BlockConfig, *, class_token_only: bool = False) -> None:
        super().__init__()
        self.heads = config.heads
        self.head_width = config.width // config.heads
        self.class_token_only = class_token_only
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, N, C) -> (B, N, C), or (B, 1, C)."""
        # One reshape and one transpose for all 3 * heads: the fewest nodes.  The -1 keeps the batch
        # size out of the graph.
        heads = self.qkv(x).reshape(-1, x.shape[1], 3 * self.heads, self.head_width)
        q, k, v = heads.transpose(1, 2).chunk(3, dim=1)
        if self.class_token_only:
            q = q[:, :, :1]
        scores = (q * self.head_width**-0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2)
        return self.proj(mixed.reshape(-1, q.shape[2], self.heads * self.head_width))


class Mlp(nn.Module):
    """Linear, GELU (exact or QuickGELU), Linear: (B, N, C) -> (B, N, C)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)
        self.gelu: Callable[[Tensor], Tensor] = _quick_gelu if config.gelu == "quick" else _erf_gelu

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) -> (B, N, C)."""
        return self.fc2(self.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: (B, N, C) -> (B, N, C), or (B, 1, C) for the class token only.

    For ``mask`` see :class:`Attention`.
    """

    def __init__(self, config: BlockConfig, *, class_token_only: bool = False) -> None:
        super().__init__()
        self.class_token_only = class_token_only
        self.norm1 = _norm(config)
        self.attn = Attention(config, class_token_only=class_token_only)
        self.norm2 = _norm(config)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, N, C) -> (B, N, C), or (B, 1, C) for the class token only."""
        residual = x[:, :1] if self.class_token_only else x
        x = residual + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Images (B, 3, S, S) float32, normalised -> logits or embeddings (B, classes) float32.

    Parameter names follow timm (``blocks.7.mlp.fc2.weight``).  ``position`` has shape
    (1, tokens, width) and already holds the class token at index 0.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(3, config.width, config.patch, config.patch, bias=False)
        self.position = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.norm_pre = _norm(config, config.pre_norm)
        self.blocks = nn.ModuleList(
            Block(
                config.block,
                class_token_only=config.pooling == "token" and index == config.depth - 1,
            )
            for index in range(config.depth)
        )
        self.norm = _norm(config, config.final_norm)
        self.fc_norm = _norm(config, config.fc_norm)
        if config.embed is not None:
            self.embed = nn.Linear(config.width, config.embed, bias=False)
        self.head: nn.Module = nn.Identity()
        if config.embedding is None:
            self.head = nn.Linear(config.embed or config.width, config.classes)

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> logits or embeddings (B, classes)."""
        patches = self.patch_embed(image).flatten(2).transpose(1, 2)
        x = self.norm_pre(F.pad(patches, (0, 0, 1, 0)) + self.position)
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.head(self._embedded(self.fc_norm(self._pool(x))))
        return output

    def _embedded(self, features: Tensor) -> Tensor:
        """Features (B, C) -> CLIP's embedding (B, D), if there is one, of length 1 unless raw."""
        if self.config.embed is None:
            return features
        embedding: Tensor = self.embed(features)
        if self.config.embedding == "raw":
            return embedding
        return embedding / embedding.norm(dim=-1, keepdim=True)

    def _pool(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) -> features (B, C)."""
        if self.config.pooling == "token":
            return self.norm(x[:, 0])
        return self.norm(x[:, 1:]).mean(dim=1)
