"""Costs of combinations: from a roofline, exactly; from MACs."""

from __future__ import annotations

import numpy as np
import pytest

from clipdeploy.engines.gpus import Format, find_gpu
from clipdeploy.engines.roofline import Geometry, block_linears, engine_seconds, kernels
from clipdeploy.models import cards
from clipdeploy.tuning.cost import CostModel, counted_costs, estimated_costs


def shapes_of(geometry: Geometry) -> dict[str, tuple[int, int, int]]:
    """Tokens, Cin and Cout of every Linear; the last block's, but for qkv, have one token."""
    width = geometry.width
    sizes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    return {
        name: (geometry.tokens if role == 0 or block < geometry.depth - 1 else 1, *sizes[role])
        for block in range(geometry.depth)
        for role, name in enumerate(block_linears(block))
    }


def costs_of(model: str, gpu: str, batch: int) -> tuple[Geometry, CostModel]:
    geometry = Geometry.of_card(cards.find(model))
    return geometry, estimated_costs(shapes_of(geometry), geometry, find_gpu(gpu), batch)


@pytest.mark.parametrize("gpu", ["L4", "H100-SXM", "B300"])
@pytest.mark.parametrize("batch", [1, 32])
def test_the_total_of_any_combination_is_the_time_of_its_engine(gpu: str, batch: int) -> None:
    geometry, costs = costs_of("clip-vit-base-p32", gpu, batch)
    generator = np.random.default_rng(0)
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        int8 = frozenset(name for name in costs.order if generator.random() < share)
        formats: dict[str, Format] = dict.fromkeys(int8, "int8")
        direct = 1e6 * engine_seconds(kernels(geometry, formats, batch), find_gpu(gpu))
        assert costs.total(int8) == pytest.approx(direct, rel=1e-9)
        without = sum(c.quantised if n in int8 else c.half for n, c in costs.linears.items())
        if share > 0.2:
            # The shared kernels matter: without them the sum is wrong.
            assert costs.rest + without != pytest.approx(direct, rel=1e-3)


def test_only_fc1_and_fc2_share_a_kernel() -> None:
    _, costs = costs_of("clip-vit-base-p16", "H100-SXM", 32)
    assert [each.linears for each in costs.shared] == [
        (f"blocks.{n}.mlp.fc1", f"blocks.{n}.mlp.fc2") for n in range(12)
    ]
    assert all(each.cost < 0 for each in costs.shared)
    # Either alone is slower in INT8, both together are faster.
    none, pair = frozenset[str](), frozenset(costs.shared[0].linears)
    assert all(costs.total(frozenset((name,))) > costs.total(none) for name in pair)
    assert costs.total(pair) < costs.total(none)
    gains = costs.gains()
    assert all(gains[name] > 0 for name in pair)
    assert sum(gains.values()) == pytest.approx(costs.total(none) - costs.total(frozenset(gains)))


def test_int8_costs_four_fifths_on_an_h100_and_more_than_fp16_on_a_b300() -> None:
    _, costs = costs_of("clip-vit-base-p16", "H100-SXM", 32)
    assert costs.relative(frozenset()) == 1
    assert costs.relative(frozenset(costs.order)) == pytest.approx(1 / 1.25, rel=0.03)
    # proj moves more bytes than it saves operations.
    assert costs.gains()["blocks.3.attn.proj"] < 0 < costs.gains()["blocks.3.mlp.fc2"]
    _, without = costs_of("clip-vit-base-p16", "B300", 32)
    assert max(without.gains().values()) < 0


def test_macs_count_half_in_int8() -> None:
    geometry = Geometry.of_card(cards.find(cards.DEMO))
    costs = counted_costs(shapes_of(geometry), 8)
    every = frozenset(costs.order)
    assert costs.relative(every) == 0.5
    assert costs.quantised_macs(every) == 1
    first = costs.linears["blocks.0.attn.qkv"]
    assert (first.macs, first.half, first.quantised) == (65 * 96 * 288, first.macs, first.macs / 2)
    assert costs.gains() == {name: each.macs / 2 for name, each in costs.linears.items()}
