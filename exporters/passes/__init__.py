"""Graph passes, one per file; ``LEAN`` lists those of every export, in order."""

from __future__ import annotations

import onnx_ir as ir

from exporters.passes.attention_scale import FoldAttentionScale
from exporters.passes.naming import NameByModule
from exporters.passes.token_selection import SelectTokens

__all__ = ["LEAN", "run_lean_passes"]

LEAN: tuple[type[ir.passes.InPlacePass], ...] = (SelectTokens, NameByModule, FoldAttentionScale)


def run_lean_passes(model: ir.Model) -> None:
    """Run :data:`LEAN` over ``model``, in place."""
    for kind in LEAN:
        kind()(model)
