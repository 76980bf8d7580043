"""Costs of combinations from the times of whole engines: exactly those of a roofline."""

from __future__ import annotations

import numpy as np
import pytest

from clipdeploy.engines.gpus import Format, find_gpu
from clipdeploy.engines.roofline import (
    Geometry,
    block_products,
    engine_seconds,
    kernels,
    linear_outputs,
)
from clipdeploy.models import cards
from clipdeploy.tuning.cost import CostModel
from clipdeploy.tuning.engine_costs import estimated_costs


def costs_of(model: str, gpu: str, batch: int, form: Format = "int8") -> tuple[Geometry, CostModel]:
    geometry = Geometry.of_card(cards.find(model))
    return geometry, estimated_costs(geometry, find_gpu(gpu), batch, form)


@pytest.mark.parametrize("gpu", ["L4", "H100-SXM", "B300"])
@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("model", ["clip-vit-base-p32", "clip-vit-base-p16-384px"])
@pytest.mark.parametrize("batch", [1, 32])
def test_the_total_of_any_combination_is_the_time_of_its_engine(
    gpu: str, form: Format, model: str, batch: int
) -> None:
    geometry, costs = costs_of(model, gpu, batch, form)
    generator = np.random.default_rng(0)
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        chosen = frozenset(name for name in costs.order if generator.random() < share)
        formats: dict[str, Format] = dict.fromkeys(chosen, form)
        direct = 1e6 * engine_seconds(kernels(geometry, formats, batch), find_gpu(gpu))
        assert costs.total(chosen) == pytest.approx(direct, rel=1e-9)
        formats |= dict.fromkeys(linear_outputs(chosen), form)
        rounded = 1e6 * engine_seconds(kernels(geometry, formats, batch), find_gpu(gpu))
        assert costs.total(chosen, outputs=True) == pytest.approx(rounded, rel=1e-9)
        without = sum(c.quantised if n in chosen else c.half for n, c in costs.products.items())
        if share > 0.2:
            # The shared kernels matter: without them the sum is wrong.
            assert costs.rest + without != pytest.approx(direct, rel=1e-3)
    # 8-bit sums save bytes of each Linear that may have them, and of no other.
    assert set(costs.outputs) == {
        name.removesuffix(".output") for name in linear_outputs(costs.order)
    }
    assert all(cost < 0 for cost in costs.outputs.values())
    # What costs.gains says of products outside the fastest set rests on this.
    assert all(each.cost < 0 for each in costs.shared)


def test_products_that_share_a_kernel() -> None:
    _, costs = costs_of("clip-vit-base-p16", "H100-SXM", 32)
    inner = {each.products: each.cost for each in costs.shared if "blocks.3." in each.products[0]}
    mlp = ("blocks.3.mlp.fc1", "blocks.3.mlp.fc2")
    attention = ("blocks.3.attn", "blocks.3.attn.proj")
    assert set(inner) == {mlp, attention}
    assert all(cost < 0 for cost in inner.values())
    # Any of them alone is slower in INT8, each pair together is faster.
    none = frozenset[str]()
    for pair in (mlp, attention):
        assert all(costs.total(frozenset((name,))) > costs.total(none) for name in pair)
        assert costs.total(frozenset(pair)) < costs.total(none)
        assert all(costs.gains()[name] > 0 for name in pair)


def test_the_fastest_combination_is_the_fastest_of_a_block() -> None:
    geometry = Geometry.of_card(cards.find(cards.DEMO))
    for gpu, form, batch in (("H100-SXM", "int8", 8), ("L4", "fp8", 128), ("B300", "int8", 32)):
        _, costs = costs_of(cards.DEMO, gpu, batch, form)  # type: ignore[arg-type]
        fastest = costs.fastest()
        names = block_products(geometry, 3)
        others = fastest - set(names)
        for bits in range(2 ** len(names)):
            chosen = frozenset(name for at, name in enumerate(names) if bits >> at & 1)
            assert costs.total(fastest) <= costs.total(others | chosen)
        gains = costs.gains()
        assert {name for name, saved in gains.items() if saved > 0} == fastest
        assert all(gains[name] == 0 for name in set(costs.order) - fastest)


def test_int8_costs_four_fifths_on_an_h100_and_more_than_fp16_on_a_b300() -> None:
    _, costs = costs_of("clip-vit-base-p16", "H100-SXM", 32)
    assert costs.relative(frozenset()) == 1
    linears = frozenset(name for name in costs.order if not name.endswith(".attn"))
    assert costs.relative(linears) == pytest.approx(1 / 1.25, rel=0.03)
    assert costs.relative(frozenset(costs.order)) == pytest.approx(1 / 1.36, rel=0.03)
    # Without attention in INT8, proj moves more bytes than it saves operations.
    assert costs.total(linears) > costs.total(linears - {"blocks.3.attn.proj"})
    _, without = costs_of("clip-vit-base-p16", "B300", 32)
    assert without.fastest() == frozenset()
    # 577 tokens of INT8 attention are not fused.
    _, long = costs_of("clip-vit-base-p16-384px", "L4", 32)
    assert not any(name.endswith(".attn") for name in long.fastest())
