from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from calibration.config import QuantizeConfig
from calibration.distribution import Distribution
from calibration.formats import INT8
from calibration.policy import LinearSite, find_linears, qkv_output
from calibration.ranges import RangeMethod, choose_range
from calibration.scheme import (
    SchemeConfig,
    add_to_bias,
    fold_all,
    linear_scheme,
    product_steps,
)
from calibration.smoothing import Folding
from calibration.table import CalibrationTable
from clipdeploy.core.errors import UsageError
from exporters.graphs import load_graph
from exporters.session import OnnxSession

PLAIN = SchemeConfig("minmax", False, False, False, False)
NAMES = [f"blocks.2.{role}" for role in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.fixture
def sites(source: Path) -> dict[str, LinearSite]:
    """Fresh for each test: folding writes biases."""
    return {site.name: site for site in find_linears(load_graph(source))}


def _array(value: ir.Value | None) -> NDArray[np.float64]:
    assert value is not None
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float64)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_a_named_range_method_is_used_for_every_linear(
    method: RangeMethod, sites: dict[str, LinearSite], demo_table: CalibrationTable
) -> None:
    name = "blocks.2.mlp.fc2"
    config = SchemeConfig(method)
    scheme = linear_scheme(sites[name], demo_table.of(name), None, config)
    limit = choose_range(Distribution.of(demo_table.of(name)), method)
    # float16 keeps eleven bits.
    assert scheme.step == pytest.approx(limit / INT8.largest, rel=2**-11)
    assert scheme.zero == 0
    # The default searches fc2's levels on both sides of zero instead.
    assert linear_scheme(sites[name], demo_table.of(name), None, SchemeConfig()).zero > 0


@pytest.mark.parametrize("name", NAMES)
def test_plain_scheme_is_the_calibrated_range(
    name: str, sites: dict[str, LinearSite], demo_table: CalibrationTable
) -> None:
    before = _array(sites[name].bias)
    scheme = linear_scheme(sites[name], demo_table.of(name), None, PLAIN)
    # float16 keeps eleven bits.
    assert scheme.step == pytest.approx(
        float(demo_table.of(name).amax.max()) / INT8.largest, rel=2**-11
    )
    assert scheme.step == float(np.float16(scheme.step))
    assert (scheme.zero, scheme.strength) == (0, None)
    assert not scheme.shift_output.any()
    assert np.array_equal(_array(sites[name].bias), before)
    error = scheme.numbers * scheme.weight_scale - _array(sites[name].weight)
    # Round to nearest; the largest may be off by 0.06 more, if float16 rounds the scale down.
    assert (np.abs(error) <= 0.57 * scheme.weight_scale).all()


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_shifted_behind_gelu_only(
    name: str, sites: dict[str, LinearSite], demo_table: CalibrationTable
) -> None:
    scheme = linear_scheme(sites[name], demo_table.of(name), None, SchemeConfig(smooth=False))
    assert (scheme.zero > 0) == name.endswith("fc2")
    column = scheme.numbers.astype(np.float64).sum(axis=0) * scheme.weight_scale
    # Only float64 rounding.
    np.testing.assert_allclose(scheme.shift_output, scheme.step * scheme.zero * column, rtol=1e-12)


def _rows(table: CalibrationTable, name: str, count: int = 4_000) -> NDArray[np.float64]:
    """Independent channels drawn from the collected histograms, (count, C)."""
    rng = np.random.default_rng(0)
    distribution = Distribution.of(table.of(name))
    columns = []
    for channel in range(len(distribution.mean)):
        at = np.flatnonzero(distribution.channel == channel)
        chance = distribution.count[at] / distribution.count[at].sum()
        picked = rng.choice(at, size=count, p=chance)
        columns.append(rng.uniform(distribution.low[picked], distribution.high[picked]))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["auto", "minmax"])
def test_bias_correction_removes_the_mean_error_of_a_linear(
    method: Any, name: str, sites: dict[str, LinearSite], demo_table: CalibrationTable
) -> None:
    site = sites[name]
    weight = _array(site.weight)
    scheme = linear_scheme(site, demo_table.of(name), None, SchemeConfig(method, smooth=False))
    x = _rows(demo_table, name)
    x += demo_table.of(name).mean - x.mean(axis=0)
    q = np.clip(np.rint(x / scheme.step - scheme.zero), -INT8.largest, INT8.largest)
    found = (scheme.step * (q + scheme.zero)) @ (
        scheme.numbers * scheme.weight_scale.astype(np.float64)
    )
    error = (found - x @ weight).mean(axis=0)
    corrected = error + scheme.correction
    # The remainder is the noise of 4,000 samples and of bins: a small part of the error.
    assert np.abs(corrected).mean() < 0.5 * np.abs(error).mean()
    # Correcting in the wrong direction doubles it.
    assert np.abs(error - scheme.correction).mean() > 1.5 * np.abs(error).mean()


def test_bias_correction_lowers_the_mean_error_of_the_logits(
    make_int8: Callable[[QuantizeConfig], Path],
    held_out: tuple[NDArray[np.float32], NDArray[np.int64]],
    reference: NDArray[np.float32],
) -> None:
    errors = []
    for correct in (True, False):
        scheme = SchemeConfig(correct_bias=correct)
        # As float16 with Q/DQ: int8 kernels saturate on processors without VNNI.
        path = make_int8(QuantizeConfig(remainder="fp16", scheme=scheme))
        (logits,) = OnnxSession(path).run(held_out[0])
        errors.append(float(np.abs((logits - reference).mean(axis=0)).mean()))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("settings", [{"strength": 1.5}, {"strength": 0.5, "smooth": False}])
def test_a_strength_that_means_nothing_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="strength"):
        SchemeConfig(**settings)
    assert SchemeConfig(strength=0.5).label == "auto, strength 0.5"


@pytest.mark.parametrize("method", ["max", "", "MINMAX"])
def test_unknown_range_method_is_refused(method: Any) -> None:
    with pytest.raises(UsageError, match="unknown range method") as found:
        SchemeConfig(range_method=method)
    assert "auto" in found.value.hint


def test_folding_moves_the_linears_that_can_be(
    sites: dict[str, LinearSite], demo_table: CalibrationTable
) -> None:
    statistics = {name: demo_table.of(name) for name in sites}
    foldings = fold_all(list(sites.values()), statistics)
    assert set(foldings) == {name for name in sites if not name.endswith("fc2")}
    # proj's folding changes the columns of V in qkv, so it comes first.
    assert [name.endswith("proj") for name in foldings] == [True] * 6 + [False] * 12
    for name, folding in foldings.items():
        assert (folding.scale > 0).all()
        middle = (statistics[name].minimum.astype(float) + statistics[name].maximum) / 2
        assert np.array_equal(folding.shift, middle)


def test_folded_linear_is_quantised_for_what_it_will_see(
    sites: dict[str, LinearSite], demo_table: CalibrationTable
) -> None:
    name = "blocks.2.mlp.fc1"
    statistics = demo_table.of(name)
    folding = Folding(np.zeros(96), np.full(96, 4.0), 0.5)
    one = linear_scheme(sites[name], statistics, None, PLAIN)
    other = linear_scheme(sites[name], statistics, folding, PLAIN)
    # A power of two does not change the mantissa of a float16.
    assert other.step == one.step / 4
    assert other.strength == 0.5


def test_products_have_a_step_for_each_operand(demo_table: CalibrationTable) -> None:
    statistics = demo_table.of(qkv_output("blocks.2.attn.qkv"))
    parts = [float(statistics.amax[at * 96 : (at + 1) * 96].max()) for at in range(3)]
    q, k = product_steps("attn.scores", statistics, None)
    soft, v = product_steps("attn.mix", statistics, None)
    # Softmax reaches one: 1 / 127 in float16.
    assert soft == float(np.float16(1 / INT8.largest))
    for step, largest in zip((q, k, v), parts, strict=True):
        # Least error clips part of a tensor with tails, but not most of it; float16 may round up.
        assert 0.2 * largest <= step * INT8.largest <= largest * (1 + 2**-10)
    folding = Folding(np.zeros(96), np.full(96, 2.0))
    assert product_steps("attn.mix", statistics, folding)[1] == pytest.approx(v / 2, rel=0.02)
    assert product_steps("attn.scores", statistics, folding) == (q, k)


def test_add_to_bias_adds(sites: dict[str, LinearSite]) -> None:
    site = sites["blocks.0.mlp.fc2"]
    bias = site.bias
    assert bias is not None
    before, name = _array(bias), bias.name
    add_to_bias(site, np.arange(96) / 8)
    # float32 rounding of the sum.
    np.testing.assert_allclose(_array(bias), before + np.arange(96) / 8, rtol=1e-6, atol=1e-6)
    assert (bias.name, bias.const_value.dtype) == (name, ir.DataType.FLOAT)
