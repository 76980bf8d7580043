"""What a layout is: the names that one library gives to a ViT classifier's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

__all__ = ["Gelu", "Layout", "Pooling", "Rules", "rules"]

V = TypeVar("V")

Gelu = Literal["erf", "quick"]
Pooling = Literal["token", "avg"]
Rules = tuple[tuple[re.Pattern[str], str], ...]


def rules(*pairs: tuple[str, str]) -> Rules:
    """Compile pairs of a pattern for a whole name and the canonical name that replaces it."""
    return tuple((re.compile(pattern), name) for pattern, name in pairs)


@dataclass(frozen=True)
class Layout:
    """The names of one library.

    Args:
        name: of the library, for messages.
        anchor: the name of the patch convolution's weight; what precedes it in a file is a prefix.
        also: further names that every such model has.
        rules: names of this layout -> canonical names, which are timm's; separate ``attn.q``,
            ``attn.k`` and ``attn.v`` are joined later.  An empty name drops the tensor.
        outside: names beside the model, such as a text tower, that do not change its logits.
        gelu: the GELU of all models in this layout; None if the tensors do not tell.
        pooling: what the head reads if the tensors do not tell.
        eps: LayerNorm's epsilon with and without a LayerNorm before the blocks.
        final_norm: whether average pooling reads normalised tokens.
        resampling: how the library resamples a position grid.
    """

    name: str
    anchor: str
    rules: Rules
    also: tuple[str, ...] = ()
    outside: re.Pattern[str] = re.compile(r"(?!)")
    gelu: Gelu | None = "erf"
    pooling: Pooling = "token"
    eps: tuple[float, float] = (1e-5, 1e-6)
    final_norm: bool = True
    resampling: Literal["timm", "mmpretrain"] = "mmpretrain"

    def prefixes(self, names: Iterable[str]) -> list[str]:
        """What precedes a model of this layout in a file's names: ``""``, ``"module."`` ..."""
        known = set(names)
        found = (
            name.removesuffix(self.anchor)
            for name in known
            if name == self.anchor or name.endswith(f".{self.anchor}")
        )
        return sorted(each for each in found if all(each + name in known for name in self.also))

    def rename(self, name: str) -> str | None:
        """The canonical name, empty if the tensor is not used; None if the layout has no such."""
        for pattern, replacement in self.rules:
            if found := pattern.fullmatch(name):
                return found.expand(replacement)
        return None

    def renamed(self, tensors: Mapping[str, V]) -> tuple[dict[str, V], list[str]]:
        """Tensors under their canonical names, and the names that the layout does not have."""
        found: dict[str, V] = {}
        unknown = []
        for name, value in tensors.items():
            if (new := self.rename(name)) is None:
                unknown.append(name)
            elif new:
                found[new] = value
        return found, unknown
