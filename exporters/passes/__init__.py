"""Graph passes, one per file; ``LEAN`` lists those of every export, in order."""

from __future__ import annotations

import onnx_ir as ir

from exporters.passes.attention_scale import FoldAttentionScale
from exporters.passes.naming import NameByModule

__all__ = ["LEAN", "run_lean_passes"]

LEAN: tuple[type[ir.passes.InPlacePass], ...] = (NameByModule, FoldAttentionScale)


def run_lean_passes(model: ir.Model) -> None:
    """Run :data:`LEAN` over ``model``, in place."""
    for kind in LEAN:
        kind()(model)
