from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import erf

from calibration.distribution import Distribution
from calibration.formats import INT8
from calibration.observers import ChannelObserver
from calibration.ranges import RANGE_METHODS, choose_range, search_levels
from clipdeploy.core.errors import ClipdeployError, UsageError

F64 = NDArray[np.float64]


def _distribution(values: NDArray[np.floating[Any]]) -> Distribution:
    rows = values.astype(np.float32)
    observer = ChannelObserver("x", rows.shape[1])
    for part in np.array_split(rows, 5):
        observer.collect(part.min(axis=0), part.max(axis=0), part)
    return Distribution.of(observer.compute())


def _normal(rng: np.random.Generator) -> F64:
    return rng.standard_normal((20_000, 4))


def _laplace(rng: np.random.Generator) -> F64:
    return rng.laplace(size=(20_000, 4))


def _student(rng: np.random.Generator) -> F64:
    return rng.standard_t(3, (20_000, 4))


def _outliers(rng: np.random.Generator) -> F64:
    values = rng.standard_normal((20_000, 4))
    values[:4, 2] = (900.0, -700.0, 500.0, 800.0)
    return values


def _mixed(rng: np.random.Generator) -> F64:
    return rng.standard_normal((20_000, 4)) * (0.01, 0.3, 2.0, 9.0)


SHAPES = [_normal, _laplace, _student, _outliers, _mixed]
SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__[1:])


def _true_error(values: F64, limit: float, weight: F64 | float = 1.0) -> float:
    """Mean weighted squared error of the values themselves, quantised to limit / 127."""
    step = limit / INT8.largest
    error = step * np.clip(np.rint(values / step), -INT8.largest, INT8.largest) - values
    return float((error**2 * weight).sum(axis=1).mean())


def _best_error(values: F64, weight: F64 | float = 1.0) -> float:
    """The least error of 200 limits by brute force."""
    largest = float(np.abs(values).max())
    return min(_true_error(values, largest * 0.975**i, weight) for i in range(200))


@SHAPED
def test_minmax_is_exact(shape: Callable[[np.random.Generator], F64]) -> None:
    values = shape(np.random.default_rng(0)).astype(np.float32)
    assert choose_range(_distribution(values), "minmax") == float(np.abs(values).max())


@SHAPED
def test_percentile_leaves_a_ten_thousandth(shape: Callable[[np.random.Generator], F64]) -> None:
    values = shape(np.random.default_rng(1)).astype(np.float32)
    found = choose_range(_distribution(values), "percentile")
    # Eight of 80,000 values are beyond; densities resolve an eighth octave, plus one bin of the
    # grid.
    low, high = np.percentile(np.abs(values), (99.97, 99.995))
    grid = float(np.abs(values).max()) / 4096
    assert low * 0.99 <= found <= high * 1.07 + 2 * grid
    assert found < np.abs(values).max()


@SHAPED
def test_mse_is_no_worse_than_brute_force(shape: Callable[[np.random.Generator], F64]) -> None:
    values = shape(np.random.default_rng(2))
    found = _true_error(values, choose_range(_distribution(values), "mse"))
    best = _best_error(values)
    # The error is flat near its minimum; limits 1 % apart and bins of an eighth octave cost 2 %.
    assert found <= 1.02 * best
    # Half the range and four times the range would not pass.
    limit = choose_range(_distribution(values), "mse")
    assert _true_error(values, limit / 2) > 1.02 * best
    # (Four huge values in 20,000 rows leave a flat error: there the range is the largest anyway.)
    assert _true_error(values, limit * 4) > 1.002 * best


@SHAPED
def test_auto_without_weights_is_mse(shape: Callable[[np.random.Generator], F64]) -> None:
    distribution = _distribution(shape(np.random.default_rng(3)))
    assert choose_range(distribution, "auto") == choose_range(distribution, "mse")
    assert choose_range(distribution, "auto", np.full(4, 7.0)) == pytest.approx(
        # A common factor changes only the last bits of float64.
        choose_range(distribution, "mse"),
        rel=1e-9,
    )


@pytest.mark.parametrize("seed", range(3))
def test_auto_has_the_least_weighted_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = _mixed(rng)
    weight = np.asarray([5.0, 1.0, 0.1, 1e-3])
    limit = choose_range(_distribution(values), "auto", weight)
    # As for mse.
    assert _true_error(values, limit, weight) <= 1.02 * _best_error(values, weight)
    plain = choose_range(_distribution(values), "mse", weight)
    assert _true_error(values, plain, weight) > 1.02 * _best_error(values, weight)


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_auto_ignores_a_huge_channel_without_weight(size: float) -> None:
    values = _normal(np.random.default_rng(4))
    values[:, 1] *= size
    weight = np.asarray([1.0, 0.0, 1.0, 1.0])
    alone = choose_range(_distribution(np.delete(values, 1, axis=1)), "mse")
    auto = choose_range(_distribution(values), "auto", weight)
    # A channel with weight zero does not affect the grid; the candidates are 1 % apart.
    assert auto == pytest.approx(alone, rel=0.03)
    assert choose_range(_distribution(values), "mse", weight) > 0.5 * size * alone
    # With a positive weight the channel is not clipped.
    assert choose_range(_distribution(values), "auto", np.ones(4)) > 0.5 * size * alone


@pytest.mark.parametrize("shape", [_student, _outliers], ids=["student", "outliers"])
def test_entropy_clips_heavy_tails(shape: Callable[[np.random.Generator], F64]) -> None:
    distribution = _distribution(shape(np.random.default_rng(6)))
    found = choose_range(distribution, "entropy")
    assert 0 < found < 0.7 * distribution.amax


def test_entropy_keeps_what_has_no_tail() -> None:
    distribution = _distribution(np.random.default_rng(6).uniform(-1, 1, (20_000, 4)))
    # Clipping a flat density only adds error.
    assert choose_range(distribution, "entropy") > 0.9 * distribution.amax


@pytest.mark.parametrize("method", RANGE_METHODS)
@SHAPED
def test_every_method_scales_with_the_data(
    method: Any, shape: Callable[[np.random.Generator], F64]
) -> None:
    values = shape(np.random.default_rng(7))
    one = choose_range(_distribution(values), method)
    other = choose_range(_distribution(values / 4), method)
    # Powers of two shift bins by whole octaves; values leaving the first bin are below 2 ** -13.
    assert other == pytest.approx(one / 4, rel=0.02)
    assert 0 < one <= _distribution(values).amax


@pytest.mark.parametrize("method", ["mse", "auto"])
@pytest.mark.parametrize("huge", [-1000.0, 1000.0])
def test_constant_channel_that_is_the_largest_is_kept(method: Any, huge: float) -> None:
    values = _normal(np.random.default_rng(8))
    values[:, 0] = huge
    assert choose_range(_distribution(values), method) > 900


@pytest.mark.parametrize("method", ["max", "MSE", "", "kl"])
def test_unknown_method_is_refused(method: Any) -> None:
    with pytest.raises(UsageError, match="unknown range method") as found:
        choose_range(_distribution(_normal(np.random.default_rng(0))), method)
    assert isinstance(found.value, ClipdeployError)
    assert "auto, minmax, percentile, mse, entropy" in found.value.hint


def _gelu(rng: np.random.Generator) -> F64:
    x = rng.standard_normal((20_000, 4)) * (1.0, 2.0, 0.7, 1.5) - 0.3
    return np.asarray(x * 0.5 * (1 + erf(x / np.sqrt(2.0))))


def _level_error(values: F64, step: float, zero: int, weight: F64 | float = 1.0) -> float:
    """The true error of step * (q + zero), q from -127 to 127."""
    q = np.clip(np.rint(values / step - zero), -INT8.largest, INT8.largest)
    return float(((step * (q + zero) - values) ** 2 * weight).sum(axis=1).mean())


@pytest.mark.parametrize("seed", range(3))
def test_gelu_gets_its_levels_to_one_side(seed: int) -> None:
    values = _gelu(np.random.default_rng(seed))
    step, zero = search_levels(_distribution(values), np.ones(4))
    assert 100 <= zero <= INT8.largest
    assert step == float(np.float16(step))
    # The lowest value, -0.17, is within the levels.
    assert step * (zero - INT8.largest) <= values.min() + step
    symmetric = min(
        _level_error(values, np.abs(values).max() * 0.975**i / INT8.largest, 0) for i in range(200)
    )
    # Nearly twice as many levels in use would be a quarter of the error; zero at its best is a
    # whole number and the range is one of 41.
    assert _level_error(values, step, zero) < 0.4 * symmetric
    # A shift in the wrong direction is far worse.
    assert _level_error(values, step, -zero) > symmetric


def test_levels_weigh_channels() -> None:
    values = _gelu(np.random.default_rng(3))
    values[:, 1] *= 50
    weight = np.asarray([1.0, 0.0, 1.0, 1.0])
    step, zero = search_levels(_distribution(values), weight)
    plain_step, plain_zero = search_levels(_distribution(values), np.ones(4))
    one = _level_error(values, step, zero, weight)
    assert one < 0.5 * _level_error(values, plain_step, plain_zero, weight)


def test_levels_of_a_one_sided_negative_tensor_are_no_worse_than_symmetric() -> None:
    values = -np.abs(_normal(np.random.default_rng(4)))
    step, zero = search_levels(_distribution(values), np.ones(4))
    symmetric = _true_error(values, float(np.abs(values).max()))
    # Not designed for such data, but it must not ruin it.
    assert _level_error(values, step, zero) <= 1.02 * symmetric
