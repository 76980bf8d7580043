"""Costs of combinations from MACs."""

from __future__ import annotations

from clipdeploy.engines.gpus import find_gpu
from clipdeploy.engines.roofline import Geometry, block_linears
from clipdeploy.models import cards
from clipdeploy.tuning.cost import counted_costs
from clipdeploy.tuning.engine_costs import estimated_costs


def shapes_of(geometry: Geometry) -> dict[str, tuple[int, int, int]]:
    """Tokens, Cin and Cout of every Linear; the last block's, but for qkv, have one token."""
    width = geometry.width
    sizes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    return {
        name: (geometry.tokens if role == 0 or block < geometry.depth - 1 else 1, *sizes[role])
        for block in range(geometry.depth)
        for role, name in enumerate(block_linears(block))
    }


def test_macs_count_half_in_int8() -> None:
    geometry = Geometry.of_card(cards.find(cards.DEMO))
    costs = counted_costs(shapes_of(geometry), 8)
    every = frozenset(costs.order)
    assert costs.relative(every) == 0.5
    assert costs.quantised_macs(every) == 1
    first = costs.products["blocks.0.attn.qkv"]
    assert (first.macs, first.half, first.quantised) == (65 * 96 * 288, first.macs, first.macs / 2)
    assert costs.gains() == {name: each.macs / 2 for name, each in costs.products.items()}
    # A roofline counts the same MACs.
    estimated = estimated_costs(geometry, find_gpu("L4"), 8)
    assert {name: estimated.products[name].macs for name in costs.order} == {
        name: each.macs for name, each in costs.products.items()
    }
