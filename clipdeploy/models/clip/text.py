"""CLIP's text tower in plain PyTorch, and the layouts of its tensors.

    x = token_embed[ids] + position           ids (B, T), at most 77 tokens
    x = x + attn(norm1(x), mask); x = x + mlp(norm2(x))      for every block
    embedding = proj(norm(x[end]))            end is the first token with the highest id

The mask is causal: tokens do not see those behind them, so ids may be cut behind the longest text's
end.  Layout and numerics: openai/CLIP ``model.py``, open_clip ``transformer.py``, transformers
``modeling_clip.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipdeploy.core.errors import CheckpointError
from clipdeploy.core.passport import Embedding
from clipdeploy.models.checkpoints.canonical import canonical
from clipdeploy.models.checkpoints.foreign import listed
from clipdeploy.models.checkpoints.layouts.hf_clip import encoder_layers
from clipdeploy.models.checkpoints.layouts.layout import Gelu, Layout, rules
from clipdeploy.models.checkpoints.layouts.openai import RESBLOCKS
from clipdeploy.models.clip.tokenizer import CONTEXT, VOCABULARY
from clipdeploy.models.vit import Block, BlockConfig

__all__ = ["TextGeometry", "TextTower", "causal_mask", "text_tower"]

# As in all of CLIP's and open_clip's text towers of this kind.
_HEAD_WIDTH = 64
# exp(-10,000) is 0 in float32 and float16.  CLIP's own -inf is not finite in float16, and its
# largest number would be, but its sum with a score would not.
_HIDDEN = -1e4
_ENDS = r"(weight|bias)"
_EMBEDDINGS = r"text_model\.embeddings\."

_LAYOUTS = (
    Layout(
        name="open_clip",
        anchor="token_embedding.weight",
        also=("positional_embedding", "ln_final.weight"),
        rules=rules(
            (r"token_embedding\.weight", "token_embed"),
            (r"positional_embedding", "pos_embed"),
            (r"ln_final\." + _ENDS, r"norm.\1"),
            (r"text_projection", "columns"),
            (r"text_projection\.weight", "proj.weight"),
            (r"attn_mask", ""),
            *RESBLOCKS,
        ),
    ),
    Layout(
        name="transformers CLIP",
        anchor="text_model.embeddings.token_embedding.weight",
        also=("text_projection.weight",),
        rules=rules(
            (_EMBEDDINGS + r"token_embedding\.weight", "token_embed"),
            (_EMBEDDINGS + r"position_embedding\.weight", "pos_embed"),
            (r"text_model\.final_layer_norm\." + _ENDS, r"norm.\1"),
            (r"text_projection\.weight", "proj.weight"),
            *encoder_layers("text_model"),
        ),
    ),
)


@dataclass(frozen=True)
class TextGeometry:
    """The blocks of a text tower, their number, and the width of CLIP's embedding."""

    block: BlockConfig
    depth: int
    embed: int


def causal_mask() -> Tensor:
    """What is added to the scores (77, 77) float32 of queries and keys: keys behind are hidden."""
    return torch.full((CONTEXT, CONTEXT), _HIDDEN).triu(1)


class TextTower(nn.Module):
    """Ids (B, T) int32 or int64 -> embeddings (B, D) float32, of length 1 or ``raw``."""

    mask: Tensor

    def __init__(self, geometry: TextGeometry, embedding: Embedding = "raw") -> None:
        super().__init__()
        self.geometry = geometry
        self.embedding = embedding
        width = geometry.block.width
        self.token_embed = nn.Parameter(torch.zeros(VOCABULARY, width))
        self.position = nn.Parameter(torch.zeros(CONTEXT, width))
        self.blocks = nn.ModuleList(Block(geometry.block) for _ in range(geometry.depth))
        self.norm = nn.LayerNorm(width, eps=geometry.block.eps)
        self.proj = nn.Linear(width, geometry.embed, bias=False)
        self.register_buffer("mask", causal_mask())

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, T) -> embeddings (B, D)."""
        length = ids.shape[1]
        # A slice of all would be another constant in a graph.
        whole = length == CONTEXT
        mask = self.mask if whole else self.mask[:length, :length]
        x = F.embedding(ids, self.token_embed)
        x = x + (self.position if whole else self.position[:length])
        for block in self.blocks:
            x = block(x, mask)
        # The end's id is the highest of all.
        end = ids.argmax(dim=1, keepdim=True)
        embeddings: Tensor = self.proj(self.norm(_tokens_at(x, end)))
        if self.embedding == "raw":
            return embeddings
        normalised: Tensor = embeddings / embeddings.norm(dim=-1, keepdim=True)
        return normalised


def _tokens_at(x: Tensor, indices: Tensor) -> Tensor:
    """Tokens (B, N, C) and an index of each row (B, 1) -> those tokens (B, C)."""
    return x.gather(1, indices[:, :, None].expand(-1, -1, x.shape[2]))[:, 0]


def text_tower(
    tensors: Mapping[str, Tensor], path: Path, gelu: Gelu, eps: float, heads: int | None
) -> tuple[TextTower, tuple[str, ...]]:
    """The text tower among the tensors beside an image tower, in evaluation mode.

    ``tensors`` are float32, of any shape, under the names of their file.  Also returns the names of
    those that do not belong to it.  ``heads`` None is one for 64 channels.

    Raises:
        CheckpointError: there is no text tower, more than one, or one that is not CLIP's.
    """
    layout, prefix = _found(tensors, path)
    inside = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    named, unknown = layout.renamed(inside)
    if "columns" in named:
        named["proj.weight"] = named.pop("columns").T
    state = canonical(named)
    geometry = _geometry(state, path, gelu, eps, heads)
    with torch.device("meta"):
        module = TextTower(geometry)
    state |= {"position": state.pop("pos_embed")[0], "mask": causal_mask()}
    _check(state, module, path)
    module.load_state_dict(state, assign=True)
    others = [n for n in tensors if not n.startswith(prefix)] + [prefix + n for n in unknown]
    return module.eval().requires_grad_(False), tuple(others)


def _found(tensors: Mapping[str, Tensor], path: Path) -> tuple[Layout, str]:
    found = [(layout, prefix) for layout in _LAYOUTS for prefix in layout.prefixes(tensors)]
    if len(found) != 1:
        what = "more than one text tower" if found else "no text tower of CLIP's architecture"
        raise CheckpointError(
            f"{path} has {what} beside its image tower: {listed(tensors) or 'nothing'}",
            hint="pass a whole CLIP: OpenAI's archive, open_clip's or transformers' CLIPModel",
        )
    return found[0]


def _geometry(
    state: Mapping[str, Tensor], path: Path, gelu: Gelu, eps: float, heads: int | None
) -> TextGeometry:
    wanted = {"token_embed": 2, "pos_embed": 3, "proj.weight": 2, "blocks.0.mlp.fc1.weight": 2}
    missing = [
        name for name, axes in wanted.items() if name not in state or state[name].ndim != axes
    ]
    if missing:
        raise CheckpointError(
            f"the text tower of {path} lacks tensors, or they have other shapes: {listed(missing)}",
            hint="save the whole model's state dict",
        )
    tokens, width = state["token_embed"].shape
    context = state["pos_embed"].shape[1]
    if (tokens, context) != (VOCABULARY, CONTEXT):
        raise CheckpointError(
            f"the text tower of {path} has {tokens} tokens and texts of {context}: it is made for "
            f"another tokenizer than CLIP's, with {VOCABULARY} and {CONTEXT}",
            hint="pass a CLIP that uses OpenAI's tokenizer",
        )
    heads = heads or max(width // _HEAD_WIDTH, 1)
    if width % heads:
        raise CheckpointError(
            f"the text tower of {path} has width {width}, which is not made of {heads} heads",
            hint="correct text_config in config.json",
        )
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    config = BlockConfig(width, heads, hidden, eps, gelu)
    return TextGeometry(config, max(blocks) + 1, state["proj.weight"].shape[0])


def _check(state: Mapping[str, Tensor], module: TextTower, path: Path) -> None:
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    wrong = sorted(name for name, _ in expected.items() ^ found.items())
    if wrong:
        raise CheckpointError(
            f"the text tower of {path} has tensors that are missing, unexpected or of another "
            f"shape: {listed(dict.fromkeys(wrong))}",
            hint="save the whole model's state dict",
        )
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{path} contains NaN or infinite values in {listed(broken)}",
            hint="the training diverged or the file is damaged: use another checkpoint",
        )
