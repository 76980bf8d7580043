"""Counts the matrix products of a network by block and precision.

:mod:`exporters.products` finds them in an ONNX graph, :mod:`clipdeploy.engines.inspector` in an
engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["UNKNOWN", "BlockPrecision", "Product", "block_of", "by_block"]

UNKNOWN = "unknown"

_BLOCK = re.compile(r"^blocks[._](\d+)(?=[._/]|$)")


@dataclass(frozen=True)
class BlockPrecision:
    """Number of matrix products of one block in each precision.

    ``gemms`` counts products with a weight, including convolutions, ``attention`` products of two
    activations: ``BlockPrecision("blocks.3", {"int8": 4}, {"fp16": 2})``.  Precisions are int8,
    fp16, fp32, other ONNX types in lower case (bf16, fp8), or ``unknown``.
    """

    block: str
    gemms: dict[str, int] = field(default_factory=dict)
    attention: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Product:
    """A matrix product; ``attention`` is True if both operands are activations."""

    name: str
    block: str
    attention: bool
    precision: str


def block_of(name: str) -> str:
    """Return the block that a node belongs to, from the node's name.

    ``blocks.3.mlp.fc1/MatMul`` -> ``blocks.3`` (also from ``blocks_3``, TensorRT 10's spelling),
    ``head/Gemm`` -> ``head``, ``/encoder/q/MatMul`` -> ``encoder``; ``graph`` for a name without a
    path.
    """
    if match := _BLOCK.match(name):
        return f"blocks.{match[1]}"
    prefix, slash, _ = name.lstrip("/").partition("/")
    return prefix if slash and prefix else "graph"


def by_block(products: Iterable[Product]) -> tuple[BlockPrecision, ...]:
    """Count ``products`` by block, in the order of each block's first product."""
    blocks: dict[str, BlockPrecision] = {}
    for product in products:
        block = blocks.setdefault(product.block, BlockPrecision(product.block))
        counts = block.attention if product.attention else block.gemms
        counts[product.precision] = counts.get(product.precision, 0) + 1
    return tuple(blocks.values())
