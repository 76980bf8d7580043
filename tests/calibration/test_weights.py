from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.formats import float16_scale
from calibration.weights import quantize_weight, weight_error

TINY = float(np.finfo(np.float16).tiny)


def _grid(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int8], NDArray[np.float32]]:
    """Weights that are float16 scales times integers up to 127 in every column."""
    rng = np.random.default_rng(seed)
    integers = rng.integers(-127, 128, (64, 16)).astype(np.int8)
    integers[rng.integers(0, 64, 16), np.arange(16)] = np.where(np.arange(16) % 2, 127, -127)
    scale = float16_scale(rng.uniform(1e-3, 1e-1, 16))
    return integers.astype(np.float32) * scale, integers, scale


@pytest.mark.parametrize("variance", [None, np.ones(64), np.linspace(0, 5, 64)])
def test_grid_weights_are_exact(variance: NDArray[np.float64] | None) -> None:
    weight, integers, scale = _grid()
    found, found_scale = quantize_weight(weight, variance)
    assert np.array_equal(found, integers)
    assert np.array_equal(found_scale, scale)
    assert not weight_error(weight, found, found_scale).any()
    # A weight off the grid has an error.
    assert weight_error(weight + np.float32(1e-4), found, found_scale).all()


@pytest.mark.parametrize(
    ("column", "integers"),
    [
        ([1.0, -1.0, 0.5], [127, -127, 64]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
        # The scale is not below float16's smallest normal number, so integers get coarse.
        ([1e-3, -1e-3, 0.0], [16, -16, 0]),
    ],
)
def test_columns_have_their_own_scale(column: list[float], integers: list[int]) -> None:
    weight = np.float32([column, [100.0, -50.0, 25.0]]).T
    found, scale = quantize_weight(weight)
    assert found.dtype == np.int8
    assert found[:, 0].tolist() == integers
    assert found[:, 1].tolist() == [127, -63, 32]
    assert scale.dtype == np.float32
    assert (scale == scale.astype(np.float16)).all()
    assert (scale >= TINY).all()


@pytest.mark.parametrize("seed", range(4))
def test_without_variance_weights_round_to_nearest_and_the_largest_is_127(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Columns over six decades, within what a float16 scale can hold.
    weight = rng.standard_normal((64, 48)) * 10.0 ** rng.uniform(-2, 4, 48)
    weight = weight.astype(np.float32)
    integers, scale = quantize_weight(weight)
    error = np.abs(weight_error(weight, integers, scale))
    # Round to nearest; float16 may round the scale down by 2 ** -11, so 127 may be off by 0.06.
    assert (error <= 0.57 * scale).all()
    assert (np.abs(integers.astype(int)).max(axis=0) == 127).all()


def _weighted_error(
    weight: NDArray[np.float32],
    variance: NDArray[np.float64],
    quantized: tuple[NDArray[np.int8], NDArray[np.float32]],
) -> NDArray[np.float64]:
    """sum_c v[c] error[c, j] ** 2 of each column, in float64."""
    integers, scale = quantized
    error = integers.astype(np.float64) * scale - weight
    return np.asarray((variance[:, None] * error**2).sum(axis=0))


@pytest.mark.parametrize("seed", range(4))
def test_clipping_helps_weights_with_outliers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-1, 1, (512, 24)).astype(np.float32)
    # One outlier in each column, on an input with little variance.
    weight[0] = 1.3
    variance = rng.uniform(0.5, 2, 512)
    variance[0] = 1e-3
    plain = _weighted_error(weight, variance, quantize_weight(weight))
    clipped = _weighted_error(weight, variance, quantize_weight(weight, variance))
    assert (clipped < 0.8 * plain).all()
    # Clipping an outlier on an input with variance would add error: it is not done.
    variance[0] = 1e6
    kept = quantize_weight(weight, variance)
    assert (np.abs(kept[0][0].astype(int)) == 127).all()
    assert (
        _weighted_error(weight, variance, kept)
        <= 1.001 * _weighted_error(weight, variance, quantize_weight(weight))
    ).all()


@pytest.mark.parametrize("seed", range(4))
def test_clipping_never_costs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_t(3, (96, 48)) * 0.05).astype(np.float32)
    variance = rng.uniform(0, 3, 96) ** 2
    plain = _weighted_error(weight, variance, quantize_weight(weight))
    found = quantize_weight(weight, variance)
    # The costs are compared in float32.
    assert (_weighted_error(weight, variance, found) <= plain * (1 + 1e-4)).all()
    assert found[0].dtype == np.int8
    assert (np.abs(found[0].astype(int)) <= 127).all()
    assert (found[1] == found[1].astype(np.float16)).all()


def test_columns_are_clipped_one_by_one() -> None:
    rng = np.random.default_rng(9)
    weight = (rng.standard_t(3, (96, 48)) * 0.05).astype(np.float32)
    variance = rng.uniform(0, 3, 96)
    integers, scale = quantize_weight(weight, variance)
    for column in (0, 7, 47):
        alone = quantize_weight(weight[:, column : column + 1].copy(), variance)
        assert np.array_equal(alone[0][:, 0], integers[:, column])
        assert alone[1][0] == scale[column]


def test_scales_are_float16_and_never_subnormal() -> None:
    found = float16_scale(np.asarray([0.0, 1e-9, TINY, 0.1, 1.0]))
    assert found.dtype == np.float32
    assert found.tolist() == [TINY, TINY, TINY, float(np.float16(0.1)), 1.0]
