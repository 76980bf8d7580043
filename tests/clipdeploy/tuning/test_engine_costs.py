"""Costs of combinations from the times of whole engines, estimated and measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from clipdeploy.core.errors import EngineError
from clipdeploy.engines.gpus import Format, find_gpu
from clipdeploy.engines.roofline import (
    Formats,
    Geometry,
    block_products,
    engine_seconds,
    kernels,
    linear_outputs,
)
from clipdeploy.models import cards
from clipdeploy.tuning.cost import CostModel
from clipdeploy.tuning.engine_costs import (
    TimedCosts,
    Timer,
    estimated_costs,
    timed_costs,
    timed_variants,
)


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
        # The shared kernels matter: without them the sum is wrong.  An FP16 fc1 that is limited by
        # its bytes saves as many by writing FP8 as GELU does, so nothing is shared.
        if share > 0.2 and (form == "int8" or batch > 1):
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


def best_of_each_block(
    geometry: Geometry, costs: CostModel, *, outputs: bool, among: frozenset[str] | None = None
) -> frozenset[str]:
    """The cheapest products in 8 bits; only products of one block share a cost."""
    best = frozenset[str]()
    for number in range(geometry.depth):
        names = [n for n in block_products(geometry, number) if among is None or n in among]
        sets = (
            frozenset(name for at, name in enumerate(names) if bits >> at & 1)
            for bits in range(2 ** len(names))
        )
        best |= min(sets, key=lambda chosen: costs.total(chosen, outputs=outputs))
    return best


@pytest.mark.parametrize("model", ["clip-vit-base-p32", "clip-vit-base-p16-384px"])
@pytest.mark.parametrize("gpu", ["L4", "H100-SXM", "B200"])
@pytest.mark.parametrize("batch", [1, 32])
def test_products_are_chosen_with_regard_to_8_bit_sums(model: str, gpu: str, batch: int) -> None:
    for form in ("int8", "fp8"):
        geometry, costs = costs_of(model, gpu, batch, form)  # type: ignore[arg-type]
        for outputs in (False, True):
            best = best_of_each_block(geometry, costs, outputs=outputs)
            fastest = costs.fastest(outputs=outputs)
            # Sums of the same numbers in another order.
            least = costs.relative(best, outputs=outputs)
            assert costs.relative(fastest, outputs=outputs) == pytest.approx(least, abs=1e-12)
            assert costs.least(outputs=outputs) == pytest.approx(least, abs=1e-12)
            gains = costs.gains(outputs=outputs)
            assert {name for name, saved in gains.items() if saved > 0} == fastest
        # What pays off without 8-bit sums also does with them, which make it cheaper.
        assert costs.fastest() <= costs.fastest(outputs=True)
        assert costs.rounds_outputs
        # If the sums stay in FP16, fewer of the chosen products pay off.
        some = frozenset(sorted(costs.order)[::2])
        best = best_of_each_block(geometry, costs, outputs=False, among=some)
        assert costs.fastest(some) <= some
        assert costs.total(costs.fastest(some)) == pytest.approx(costs.total(best), rel=1e-12)


def test_fp8_of_fc1_pays_off_with_8_bit_sums_only() -> None:
    for gpu, loss in (("L4", 0.038), ("L40S", 0.035), ("H100-SXM", 0.0)):
        _, costs = costs_of("clip-vit-base-p16", gpu, 32, "fp8")
        without, rounded = costs.fastest(), costs.fastest(outputs=True)
        # The last block has one row an image.
        inner = frozenset(name for name in costs.order if not name.startswith("blocks.11."))
        assert inner <= rounded
        fc1 = {f"blocks.{n}.mlp.fc1" for n in range(11)}
        assert inner - without == (fc1 if loss else set())
        # A choice without regard to the sums would miss this much, relative to FP16.
        missed = costs.relative(without, outputs=True) - costs.relative(rounded, outputs=True)
        assert missed == pytest.approx(loss, abs=0.001)
    # GELU rounds to INT8 in a kernel of its own, so INT8 in both is the best without them too.
    _, costs = costs_of("clip-vit-base-p16", "L4", 32)
    assert costs.fastest() == costs.fastest(outputs=True)


def test_sums_that_cost_time_are_not_counted() -> None:
    _, costs = costs_of("clip-vit-base-p16", "H100-SXM", 32)
    slow = replace(costs, outputs=dict.fromkeys(costs.outputs, 5.0))
    assert not slow.rounds_outputs
    assert slow.least(outputs=True) == slow.least() == costs.least()
    unknown = replace(costs, outputs={})
    assert not unknown.rounds_outputs
    assert unknown.gains(outputs=True) == unknown.gains()


def roofline_timer(geometry: Geometry, gpu: str, batch: int) -> Timer:
    """The time of an engine by the roofline, as if it had been measured."""
    return lambda formats: 1e6 * engine_seconds(kernels(geometry, formats, batch), find_gpu(gpu))


@pytest.mark.parametrize("gpu", ["L4", "H100-SXM", "B300"])
@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("model", ["clip-vit-base-p32", "clip-vit-base-p16-384px"])
def test_the_times_of_a_roofline_give_its_costs(gpu: str, form: Format, model: str) -> None:
    geometry, estimated = costs_of(model, gpu, 32, form)
    found = timed_costs(geometry, roofline_timer(geometry, gpu, 32), 32, form, gpu)
    found.check()
    assert found.doubt == ""
    timed = found.costs
    assert (timed.kind, timed.gpu, timed.order) == ("gpu", gpu, estimated.order)
    assert timed.fastest() == estimated.fastest()
    none = estimated.total(frozenset())
    for name, each in estimated.products.items():
        own = timed.products[name]
        assert own.macs == each.macs
        # Differences of times around ``none``, which have 16 digits.
        assert own.quantised - own.half == pytest.approx(
            each.quantised - each.half, abs=1e-9 * none
        )
    generator = np.random.default_rng(0)
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        chosen = frozenset(name for name in timed.order if generator.random() < share)
        for outputs in (False, True):
            direct = estimated.total(chosen, outputs=outputs)
            assert timed.total(chosen, outputs=outputs) == pytest.approx(direct, rel=1e-9)


def test_whole_groups_are_timed() -> None:
    geometry = Geometry.of_card(cards.find("clip-vit-base-p16"))
    variants = timed_variants(geometry, "int8")
    assert len(variants) == 16
    assert variants[0] == {}
    kinds = [tuple(sorted({name.split(".", 2)[2] for name in each})) for each in variants]
    assert kinds[1:6] == [("attn.qkv",), ("attn",), ("attn.proj",), ("mlp.fc1",), ("mlp.fc2",)]
    assert [len(each) for each in variants[1:6]] == [12, 11, 11, 11, 11]
    # Those of the last block have one row an image.
    assert [tuple(each) for each in variants[6:9]] == [
        ("blocks.11.attn.proj",),
        ("blocks.11.mlp.fc1",),
        ("blocks.11.mlp.fc2",),
    ]
    every = geometry.depth * 4 + geometry.depth - 1
    assert len(variants[-1]) == every + 2 * geometry.depth
    assert len(set(map(frozenset, variants))) == 16


def disturbed(factor: float) -> TimedCosts:
    """Measurements in which the engine with everything in 8 bits takes ``factor`` times as long."""
    geometry = Geometry.of_card(cards.find("clip-vit-base-p16"))
    real = roofline_timer(geometry, "H100-SXM", 32)
    every = len(timed_variants(geometry, "int8")[-1])

    def timer(formats: Formats) -> float:
        return real(formats) * (factor if len(formats) == every else 1)

    return timed_costs(geometry, timer, 32, "int8", "H100-SXM")


def test_parts_that_do_not_add_up_to_the_whole_are_doubtful() -> None:
    for factor in (0.97, 1.0, 1.03):
        assert disturbed(factor).doubt == ""
    for factor in (0.9, 1.1):
        found = disturbed(factor)
        found.check()
        assert "the engine with everything in 8 bits takes" in found.doubt
        assert f"its parts add up to {found.parts:.0f} µs" in found.doubt
    for factor in (0.5, 1.5):
        with pytest.raises(EngineError, match="contradict each other"):
            disturbed(factor).check()


@pytest.mark.parametrize("time", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_no_engine_has_is_refused(time: float) -> None:
    geometry = Geometry.of_card(cards.find(cards.DEMO))
    with pytest.raises(EngineError, match="cannot be right"):
        timed_costs(geometry, lambda formats: time, 8, "int8", "L4").check()
    # One such time among others is enough.
    *_, last = timed_variants(geometry, "int8")
    with pytest.raises(EngineError, match="cannot be right"):
        timed_costs(
            geometry, lambda formats: time if formats == last else 100.0, 8, "int8", "L4"
        ).check()


def test_a_negative_cost_is_refused() -> None:
    geometry = Geometry.of_card(cards.find(cards.DEMO))
    every = len(timed_variants(geometry, "int8")[-1])

    def timer(formats: Formats) -> float:
        # Each group saves two thirds of the engine, so two of them leave less than nothing.
        return 100.0 if not formats or len(formats) == every else 33.0

    with pytest.raises(EngineError, match=r"cannot be right: 100 µs in FP16, .* -\d+ µs for the"):
        timed_costs(geometry, timer, 8, "int8", "L4").check()
