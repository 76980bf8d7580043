from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.formats import FP8, INT8, NumberFormat
from calibration.rounding import Moments, output_error, round_weight
from calibration.weights import quantize_weight, weight_error

F32 = NDArray[np.float32]

CHANNELS, OUTPUTS, ROWS = 96, 40, 4000


def _inputs(seed: int) -> F32:
    """Tokens of correlated channels (ROWS, CHANNELS): 12 directions carry most of the variance."""
    mixing = np.random.default_rng(0).normal(size=(12, CHANNELS))
    rng = np.random.default_rng(seed)
    seen = rng.normal(size=(ROWS, 12)) @ mixing + 0.1 * rng.normal(size=(ROWS, CHANNELS)) + 3
    return seen.astype(np.float32)


def _moments(x: F32) -> Moments:
    moments = Moments(x.shape[1])
    for part in np.array_split(x, 7):
        moments.add(part)
    return moments


@pytest.fixture(scope="module")
def weight() -> F32:
    return np.random.default_rng(1).normal(size=(CHANNELS, OUTPUTS)).astype(np.float32)


def _gain(weight: F32, moments: Moments, number_format: NumberFormat, *, one_scale: bool) -> float:
    """By how many times the error on other tokens is less than that of the nearest numbers."""
    nearest, scale = quantize_weight(weight, None, number_format, one_scale=one_scale)
    ours = round_weight(weight, scale, moments.covariance, number_format)
    assert ours.dtype == number_format.dtype
    assert np.abs(ours.astype(np.float32)).max() <= number_format.largest
    checks = _moments(_inputs(seed=9)).covariance
    errors = [output_error(weight_error(weight, each, scale), checks) for each in (nearest, ours)]
    return errors[0] / errors[1]


def test_the_moments_are_the_mean_and_the_covariance() -> None:
    x = _inputs(seed=2)
    moments = _moments(x)
    assert moments.rows == ROWS
    assert np.allclose(moments.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-5)
    assert np.allclose(moments.covariance, np.cov(x.T, bias=True), atol=1e-3)


def test_the_first_token_counts_several_times() -> None:
    x = _inputs(seed=2)[:50]
    once, often = Moments(CHANNELS), Moments(CHANNELS)
    once.add(np.concatenate([np.repeat(x[:1], 3, axis=0), x]))
    often.add(x, first=4)
    assert often.rows == once.rows
    assert np.allclose(often.mean, once.mean, rtol=1e-5)
    assert np.allclose(often.covariance, once.covariance, atol=1e-3)


@pytest.mark.parametrize("number_format", [INT8, FP8], ids=lambda each: each.name)
def test_rounding_again_lowers_the_error(
    weight: F32, number_format: NumberFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments, other = _moments(_inputs(seed=2)), _moments(_inputs(seed=2)[:, ::-1])
    again = _gain(weight, moments, number_format, one_scale=False)
    monkeypatch.setattr("calibration.rounding._SWEEPS", 0)
    once = _gain(weight, moments, number_format, one_scale=False)
    assert again > 1.05 * once
    # Twin: moments with their channels in another order.
    assert _gain(weight, other, number_format, one_scale=False) < once


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("number_format", [INT8, FP8], ids=lambda each: each.name)
def test_the_error_on_other_tokens_falls(
    weight: F32, number_format: NumberFormat, one_scale: bool
) -> None:
    gain = _gain(weight, _moments(_inputs(seed=2)), number_format, one_scale=one_scale)
    assert gain > 3


def test_moments_with_their_channels_in_another_order_raise_the_error(weight: F32) -> None:
    moments = _moments(_inputs(seed=2)[:, ::-1])
    assert _gain(weight, moments, INT8, one_scale=False) < 1


def test_moments_of_other_inputs_raise_the_error(weight: F32) -> None:
    other = np.random.default_rng(3).normal(size=(12, CHANNELS))
    x = np.random.default_rng(4).normal(size=(ROWS, 12)) @ other
    assert _gain(weight, _moments(x.astype(np.float32)), INT8, one_scale=False) < 1


def test_independent_channels_are_rounded_to_the_nearest_numbers(weight: F32) -> None:
    nearest, scale = quantize_weight(weight)
    variances = np.random.default_rng(5).uniform(0.1, 9, CHANNELS)
    assert np.array_equal(round_weight(weight, scale, np.diag(variances)), nearest)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_few_or_constant_tokens_round_without_an_error(weight: F32, rows: int) -> None:
    moments = _moments(np.full((rows, CHANNELS), 3, np.float32))
    numbers, scale = quantize_weight(weight)
    found = round_weight(weight, scale, moments.covariance)
    assert np.abs(found.astype(int) - numbers).max() <= 1
