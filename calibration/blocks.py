"""Finds the blocks of the network and runs the images through one block after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.policy import LinearSite, find_linears
from clipdeploy.core.errors import GraphError
from exporters.parts import run_part

__all__ = ["Block", "ends_of", "find_blocks"]


@dataclass(frozen=True)
class Block:
    """One block of the network: its input ``start``, its output ``end``, names of its Linears."""

    start: ir.Value
    end: ir.Value
    linears: tuple[str, ...]


def find_blocks(model: ir.Model) -> list[Block]:
    """The blocks in order; the last one ends with the logits.

    Raises:
        GraphError: a block does not begin with a LayerNormalization before attn.qkv.
    """
    sites = find_linears(model)
    numbers = sorted({site.block for site in sites})
    starts = [_start(sites, number) for number in numbers]
    return [
        Block(start, end, tuple(site.name for site in sites if site.block == number))
        for number, start, end in zip(
            numbers, starts, [*starts[1:], model.graph.outputs[0]], strict=True
        )
    ]


def _start(sites: Sequence[LinearSite], number: int) -> ir.Value:
    """The residual stream before a block: what the LayerNorm of its qkv reads."""
    for site in sites:
        norm = site.activation.producer()
        if site.block == number and site.role == "attn.qkv" and norm is not None:
            value = norm.inputs[0]
            if norm.op_type == "LayerNormalization" and value is not None:
                return value
    raise GraphError(
        f"blocks.{number} has no attn.qkv behind a LayerNormalization",
        hint="use an FP32 graph that `clipdeploy export` wrote, or --effort fast",
    )


def ends_of(part: ir.Model, inputs: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
    """The output (B, T, C) of ``part``, or its logits (B, K), for each of ``inputs`` (B, ...)."""
    return [end for (end,) in run_part(part, list(part.graph.outputs), inputs)]
