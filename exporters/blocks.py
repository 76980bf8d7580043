"""In which precision the matrix products of a network run, a block at a time.

:mod:`exporters.products` tells it of an ONNX graph, :mod:`clipdeploy.engines.inspector` of an
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
    """How many matrix products of one block run in which precision.

    ``gemms`` counts products with a weight, convolutions among them, ``attention`` products of two
    activations: ``BlockPrecision("blocks.3", {"int8": 4}, {"fp16": 2})``.  Precisions are int8,
    fp16, fp32, else ONNX's name in small letters (bf16, fp8), or ``unknown``.
    """

    block: str
    gemms: dict[str, int] = field(default_factory=dict)
    attention: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Product:
    """One matrix product; ``attention`` if both of its operands are activations."""

    name: str
    block: str
    attention: bool
    precision: str


def block_of(name: str) -> str:
    """The block that a node belongs to, by its name.

    ``blocks.3.mlp.fc1/MatMul`` -> ``blocks.3`` (also from ``blocks_3``, as TensorRT 10 spells
    layers), ``head/Gemm`` -> ``head``, ``/encoder/q/MatMul`` -> ``encoder``; ``graph`` for a name
    without a path.
    """
    if match := _BLOCK.match(name):
        return f"blocks.{match[1]}"
    prefix, slash, _ = name.lstrip("/").partition("/")
    return prefix if slash and prefix else "graph"


def by_block(products: Iterable[Product]) -> tuple[BlockPrecision, ...]:
    """Count ``products``; the blocks come in the order of their first product."""
    blocks: dict[str, BlockPrecision] = {}
    for product in products:
        block = blocks.setdefault(product.block, BlockPrecision(product.block))
        counts = block.attention if product.attention else block.gemms
        counts[product.precision] = counts.get(product.precision, 0) + 1
    return tuple(blocks.values())
