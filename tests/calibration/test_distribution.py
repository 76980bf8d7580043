from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.distribution import Distribution, mean_error, squared_error
from calibration.formats import INT8
from calibration.observers import ChannelObserver, ChannelStatistics, bin_edges

F64 = NDArray[np.float64]
SAMPLES = 100_000

# Intervals [low, high] and steps: narrower and wider than the interval, on either side of zero and
# across it, and beyond the clip at 127 steps, partly and wholly.
CASES = [
    (-1.0, 1.0, 0.01),
    (-1.0, 1.0, 0.3),
    (0.0, 1.0, 0.0101),
    (0.2, 0.9, 5.0),
    (0.503, 0.504, 0.01),
    (-0.504, -0.503, 0.01),
    (0.1, 0.7, 1.0),
    (-0.9, 0.4, 1.0),
    (-2.0, 5.0, 0.02),
    (-5.0, 2.0, 0.02),
    (3.0, 9.0, 0.02),
    (-9.0, -3.0, 0.02),
    (2.53, 2.56, 0.02),
    (-300.0, 100.0, 0.7),
]


def _middles(low: float, high: float) -> F64:
    """Evenly spaced values of [low, high]: a uniform sample without random noise."""
    return low + (high - low) * (np.arange(SAMPLES) + 0.5) / SAMPLES


def _quantised(x: F64, step: float) -> F64:
    return step * np.clip(np.rint(x / step), -INT8.largest, INT8.largest)


def _observe(values: NDArray[np.float32], images: int = 8) -> ChannelStatistics:
    observer = ChannelObserver("x", values.shape[1])
    for rows in np.array_split(values, images):
        observer.collect(rows.min(axis=0), rows.max(axis=0), rows)
    return observer.compute()


def _known(seed: int = 0, rows: int = 4000) -> NDArray[np.float32]:
    """Channels of several shapes: normal, one-sided, shifted, uniform, narrow, heavy-tailed."""
    rng = np.random.default_rng(seed)
    columns = [
        rng.standard_normal(rows),
        np.abs(rng.standard_normal(rows)) * 3,
        rng.standard_normal(rows) + 7,
        rng.uniform(-2, 5, rows),
        rng.standard_normal(rows) * 0.01 - 0.5,
        rng.laplace(size=rows) * 2,
    ]
    return np.stack(columns, axis=1).astype(np.float32)


@pytest.mark.parametrize(("low", "high", "step"), CASES)
def test_squared_error_is_brute_forces(low: float, high: float, step: float) -> None:
    x = _middles(low, high)
    expected = float(((_quantised(x, step) - x) ** 2).mean())
    found = float(squared_error(np.asarray([low, high]), step)[0])
    # 1e5 midpoints locate each of a few hundred jumps of size step to 1e-5 of the interval.
    assert found == pytest.approx(expected, rel=2e-4)
    # A step wrong by a tenth gives another error, unless all values round to zero with both.
    other = float(squared_error(np.asarray([low, high]), step * 1.1)[0])
    assert other != pytest.approx(expected, rel=2e-3) or max(-low, high) < step / 2


@pytest.mark.parametrize(("low", "high", "step"), CASES)
def test_mean_error_is_brute_forces(low: float, high: float, step: float) -> None:
    x = _middles(low, high)
    expected = float((_quantised(x, step) - x).mean())
    found = float(mean_error(np.asarray(low), np.asarray(high), step))
    # At most one midpoint in 1e5 for each jump is on the wrong side of it, by up to one step.
    tolerance = 1e-5 * step * max(1.0, (high - low) / step)
    assert found == pytest.approx(expected, abs=tolerance)
    # The mean of -x is the negative.
    mirrored = float(mean_error(np.asarray(-high), np.asarray(-low), step))
    assert mirrored == pytest.approx(-expected, abs=tolerance)


def test_random_intervals_agree_with_brute_force() -> None:
    rng = np.random.default_rng(5)
    for _ in range(40):
        low, width = rng.uniform(-4, 4), 10 ** rng.uniform(-3, 1)
        step = 10 ** rng.uniform(-2.5, 0.5)
        x = _middles(low, low + width)
        error = _quantised(x, step) - x
        ends = np.asarray(low), np.asarray(low + width)
        # As above; the absolute part is for an interval inside which the error vanishes.
        assert float(squared_error(np.asarray(ends), step)[0]) == pytest.approx(
            float((error**2).mean()), rel=2e-3, abs=1e-8
        )
        assert float(mean_error(*ends, step)) == pytest.approx(
            float(error.mean()), abs=2e-5 * max(step, width)
        )


def test_errors_broadcast_over_intervals_and_steps() -> None:
    edges = np.asarray([-1.0, -0.5, 1.0, 9.0])
    steps = np.asarray([0.01, 0.1])
    found = squared_error(edges, steps[:, None])
    assert found.shape == (2, 3)
    for i, step in enumerate(steps):
        assert np.array_equal(found[i], squared_error(edges, float(step)))


def test_fine_steps_give_the_textbook_twelfth() -> None:
    found = float(squared_error(np.asarray([-1.27, 1.27]), 0.01)[0])
    # A whole number of levels: exact but for float64 rounding.
    assert found == pytest.approx(0.01**2 / 12, rel=1e-9)


def test_mass_is_the_number_of_values_per_row() -> None:
    values = _known()
    distribution = Distribution.of(_observe(values))
    # The ramps telescope: the only error is that of float64 sums of some thousand terms.
    assert distribution.density().mass.sum() == pytest.approx(values.shape[1], rel=1e-6)
    weight = np.asarray([0.0, 1.0, 2.0, 0.5, 0.0, 3.0])
    assert distribution.density(weight).mass.sum() == pytest.approx(weight.sum(), rel=1e-6)
    assert distribution.density(weight).folded.sum() == pytest.approx(weight.sum(), rel=1e-6)


def test_mass_of_one_channel_is_one_wherever_it_lies() -> None:
    values = _known()
    for channel in range(values.shape[1]):
        density = Distribution.of(_observe(values[:, channel : channel + 1])).density()
        assert density.mass.sum() == pytest.approx(1, rel=1e-6)


def _coarse(mass: F64, groups: int) -> F64:
    return np.cumsum(mass.reshape(groups, -1).sum(axis=1))


@pytest.mark.parametrize("channel", range(6))
def test_density_is_exact_at_the_edges_of_the_histogram(channel: int) -> None:
    column = _known(rows=40_000)[:, channel : channel + 1]
    density = Distribution.of(_observe(column)).density()
    grid = np.linspace(-density.largest, density.largest, len(density.mass) + 1)
    cumulative = np.concatenate([[0], np.cumsum(density.mass)])
    edges = np.concatenate([-bin_edges()[::-1], bin_edges()])
    edges = edges[np.abs(edges) < density.largest]
    expected = (column < edges).mean(axis=0)
    # Between two points of the grid the mass is interpolated; a grid cell holds no more than this.
    slack = 2 * density.mass.max()
    assert slack < 0.02
    found = np.interp(edges, grid, cumulative)
    assert np.abs(found - expected).max() < slack
    # A shift by one bin is detected.
    assert np.abs(found[1:] - expected[:-1]).max() > slack


@pytest.mark.parametrize("channel", [0, 1, 2, 3, 5])
def test_density_is_a_fine_numpy_histogram(channel: int) -> None:
    column = _known(rows=40_000)[:, channel : channel + 1]
    density = Distribution.of(_observe(column)).density()
    assert density.largest == pytest.approx(float(np.abs(column).max()), rel=2e-6)
    edges = np.linspace(-density.largest, density.largest, 257)
    expected = np.cumsum(np.histogram(column, edges)[0]) / len(column)
    found = _coarse(density.mass, 256)
    # Inside an eighth of an octave values are taken as uniform; the widest bins here hold a quarter
    # of a channel's mass and bend its cumulative by a tenth of that.
    assert np.abs(found - expected).max() < 0.03
    # The mirrored density differs.
    assert channel in (0, 5) or np.abs(_coarse(density.mass[::-1], 256) - expected).max() > 0.1


def test_folded_is_the_density_of_sizes() -> None:
    values = _known(rows=40_000)
    density = Distribution.of(_observe(values)).density()
    edges = np.linspace(0, density.largest, 129)
    expected = np.cumsum(np.histogram(np.abs(values), edges)[0]) / len(values)
    # As above, over six channels.
    assert np.abs(_coarse(density.folded, 128) - expected).max() < 0.05


def test_density_error_is_the_true_error() -> None:
    values = _known(rows=40_000)
    density = Distribution.of(_observe(values)).density()
    limits = density.largest * np.asarray([1.0, 0.7, 0.4, 0.1])
    x = values.astype(np.float64)
    for found, limit in zip(density.error(limits), limits, strict=True):
        step = limit / INT8.largest
        expected = ((_quantised(x, step) - x) ** 2).sum(axis=1).mean()
        # Values are not uniform inside a bin: a few percent if the tail is clipped.
        assert found == pytest.approx(expected, rel=0.05)
        assert density.shifted_error(0.0, step) == pytest.approx(found, rel=1e-6)
    shift, step = 3.0, 0.08
    expected = ((_quantised(x - shift, step) - (x - shift)) ** 2).sum(axis=1).mean()
    assert density.shifted_error(shift, step) == pytest.approx(expected, rel=0.05)
    assert density.shifted_error(0.0, step) != pytest.approx(expected, rel=0.05)


def test_second_moment_is_the_datas() -> None:
    values = _known(rows=40_000)
    expected = (values.astype(np.float64) ** 2).mean(axis=0)
    found = Distribution.of(_observe(values)).second_moment()
    # A bin is an eighth wide: the square of its middle is off by at most 2 * 1/16 at its ends, by
    # a percent on average over a bin, and by more for the channel that occupies two bins.
    np.testing.assert_allclose(found, expected, rtol=0.02)
    variance = found - Distribution.of(_observe(values)).mean ** 2
    # The mean is exact, so narrow channels have the moment's percent, of a square of 50 sigma.
    np.testing.assert_allclose(variance[[0, 1, 3, 5]], values.var(axis=0)[[0, 1, 3, 5]], rtol=0.02)


def test_mean_error_of_channels_is_the_true_one() -> None:
    values = _known(rows=40_000)
    x = values.astype(np.float64)
    distribution = Distribution.of(_observe(values))
    for step in (0.005, 0.02, 0.11, 0.6):
        expected = (_quantised(x, step) - x).mean(axis=0)
        found = distribution.mean_error(step)
        # Over many rounding cells errors average out; beyond the clip the error is as large as
        # the values, which are accurate to half a percent.
        wide = [0, 1, 2, 3, 5]
        np.testing.assert_allclose(found[wide], expected[wide], rtol=5e-3, atol=0.02 * step + 2e-3)
        # The narrow channel occupies one or two cells and histogram bins: its shape inside them
        # is unknown, and it is off by up to half a step.
        assert abs(found[4] - expected[4]) <= step / 2
    # The finest step clips the shifted channel: its error is not a rounding error.
    assert abs(float(distribution.mean_error(0.02)[2])) > 1


def test_shift_and_scale_are_those_of_the_data() -> None:
    values = _known(rows=40_000)
    rng = np.random.default_rng(1)
    shift, scale = rng.uniform(-3, 3, 6), 2.0 ** rng.uniform(-4, 4, 6)
    moved = ((values - shift) / scale).astype(np.float32)
    found = Distribution.of(_observe(values), shift, scale)
    direct = Distribution.of(_observe(moved))
    # float32 rounding of the moved values.
    for one, other in ((found.smallest, direct.smallest), (found.largest, direct.largest)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.mean, direct.mean, rtol=1e-5, atol=1e-5)
    assert found.amax == pytest.approx(direct.amax, rel=1e-5)
    expected = (moved.astype(np.float64) ** 2).mean(axis=0)
    # The bins differ: as for the second moment, in units of the wider interval.
    spread = (np.abs(shift / scale) + np.sqrt(expected)) ** 2
    assert (np.abs(found.second_moment() - expected) < 0.01 * spread).all()
    assert (np.abs(Distribution.of(_observe(values)).second_moment() - expected) > 0.02).any()


def test_scalar_shift_and_scale_are_those_of_every_channel() -> None:
    statistics = _observe(_known())
    one = Distribution.of(statistics, 0.5, 2.0)
    other = Distribution.of(statistics, np.full(6, 0.5), np.full(6, 2.0))
    for field in ("low", "high", "count", "mean", "smallest", "largest"):
        assert np.array_equal(getattr(one, field), getattr(other, field))


def test_no_interval_leaves_the_extremes() -> None:
    values = _known()
    values[:, 3] *= 3000  # Beyond the last bin's lower edge.
    distribution = Distribution.of(_observe(values))
    slack = 1e-8 * (1 + np.abs(distribution.low))
    assert (distribution.low >= distribution.smallest[distribution.channel]).all()
    assert (distribution.high <= distribution.largest[distribution.channel] + slack).all()
    assert (distribution.high > distribution.low).all()
    assert np.array_equal(distribution.smallest, values.min(axis=0).astype(np.float64))
    assert np.array_equal(distribution.largest, values.max(axis=0).astype(np.float64))
    assert distribution.amax == float(np.abs(values).max())


@pytest.mark.parametrize("value", [0.0, 1.5, -3.25, 1000.0])
def test_channel_that_never_moves_has_finite_errors(value: float) -> None:
    values = np.full((64, 2), value, np.float32)
    distribution = Distribution.of(_observe(values))
    # A point is an interval of width 1e-9.
    np.testing.assert_allclose(distribution.second_moment(), value**2, rtol=1e-6, atol=1e-12)
    for step in (0.01, 1.0, 10.0):
        error = float(_quantised(np.asarray([value]), step)[0] - value)
        # As above, and float64 cancellation in an interval of 1e-9.
        np.testing.assert_allclose(distribution.mean_error(step), error, atol=1e-4 * step + 1e-5)


@pytest.mark.parametrize("value", [-3.25, -1000.0, 1.5, 1000.0])
def test_mass_at_the_very_end_of_the_range_is_kept(value: float) -> None:
    values = np.full((64, 2), 0.25, np.float32)
    values[:, 1] = value
    density = Distribution.of(_observe(values)).density()
    # Two channels, a value each; sums of a few thousand float64 terms.
    assert density.mass.sum() == pytest.approx(2, rel=1e-3)


def test_no_rows_are_no_division() -> None:
    statistics = _observe(_known())
    empty = replace(
        statistics,
        counts=np.zeros_like(statistics.counts),
        total=np.zeros_like(statistics.total),
        rows=0,
    )
    distribution = Distribution.of(empty)
    assert distribution.second_moment().tolist() == [0.0] * 6
    assert distribution.density().mass.sum() == 0.0
