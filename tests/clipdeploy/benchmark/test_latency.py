from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from clipdeploy.benchmark.latency import (
    Estimate,
    _student_quantile,
    mean,
    per_second,
    percentile,
    ratio,
    summarise,
)

# Runs of the coverage simulations: three standard deviations of a 95 % share are 1.5 %.
TRIALS = 2000
NOISE = 3 * np.sqrt(0.95 * 0.05 / TRIALS)


def latencies(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float64]:
    """Samples skewed like latencies: a minimum of 10 and a gamma tail of mean 4."""
    return 10 + np.random.default_rng(seed).gamma(4.0, 1.0, shape)


def true_percentile(percent: float) -> float:
    return 10 + float(stats.gamma(4.0).ppf(percent / 100))


def coverage(intervals: list[Estimate], truth: float) -> float:
    hits = [e.low <= truth <= e.high for e in intervals if e.low is not None and e.high is not None]
    assert len(hits) == len(intervals)
    return float(np.mean(hits))


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 30, 35, 36, 100, 367, 368, 1000])
@pytest.mark.parametrize("percent", [50, 90, 99])
def test_percentiles_equal_those_of_scipy(count: int, percent: int) -> None:
    samples = latencies((count,), seed=count)
    got = percentile(samples.tolist(), percent)
    assert got.value == pytest.approx(np.percentile(samples, percent))
    expected = stats.quantile_test(samples, p=percent / 100).confidence_interval(0.95)
    if np.isnan([expected.low, expected.high]).any():
        assert (got.low, got.high) == (None, None)
    else:
        # Order statistics are samples, so they are exactly equal.
        assert (got.low, got.high) == (expected.low, expected.high)


@pytest.mark.parametrize(("percent", "fewest"), [(50, 6), (90, 36), (99, 368)])
def test_an_interval_needs_enough_rounds(percent: int, fewest: int) -> None:
    samples = latencies((fewest,)).tolist()
    assert percentile(samples, percent).high is not None
    assert percentile(samples[:-1], percent) == Estimate(np.percentile(samples[:-1], percent))


@pytest.mark.parametrize(("percent", "count"), [(50, 6), (50, 41), (90, 50), (99, 400)])
def test_percentile_intervals_cover(percent: int, count: int) -> None:
    runs = latencies((TRIALS, count), seed=1).tolist()
    intervals = [percentile(run, percent) for run in runs]
    assert coverage(intervals, true_percentile(percent)) >= 0.95 - NOISE
    # The interval of another percentile must not cover it: the simulation can fail.
    wrong = percent - 10 if percent > 50 else 90
    assert coverage(intervals, true_percentile(wrong)) < 0.9


@pytest.mark.parametrize("degrees", [5, 6, 10, 30, 1000])
def test_student_quantile_equals_that_of_scipy(degrees: int) -> None:
    # The largest error of the expansion is 1.1e-4 of the value, at 5 degrees.
    assert _student_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-4)
    assert _student_quantile(degrees) != pytest.approx(stats.norm.ppf(0.975), rel=2e-4)


@pytest.mark.parametrize("count", [6, 20, 500])
def test_means_equal_those_of_scipy(count: int) -> None:
    samples = latencies((count,))
    got = mean(samples.tolist())
    expected = stats.ttest_1samp(samples, 0).confidence_interval(0.95)
    assert got.value == pytest.approx(samples.mean())
    assert got.low is not None
    assert got.high is not None
    # The half width, to the accuracy of Student's quantile.
    half = (expected.high - expected.low) / 2
    assert (got.high - got.low) / 2 == pytest.approx(half, rel=2e-4)


def test_mean_intervals_cover() -> None:
    intervals = [mean(run) for run in latencies((TRIALS, 30), seed=2).tolist()]
    # With 30 samples the gamma tail reduces the coverage by about one point.
    assert 0.935 - NOISE <= coverage(intervals, 14.0) <= 0.95 + NOISE
    halved = [Estimate(e.value, (e.value + e.low) / 2, e.high) for e in intervals if e.low]
    assert coverage(halved, 14.0) < 0.9


def test_a_mean_of_five_rounds_has_no_interval() -> None:
    assert mean([1.0, 2.0, 3.0, 4.0, 5.0]) == Estimate(3.0)
    assert mean([1.0, 2.0, 3.0, 4.0, 5.0]).margin is None
    assert mean([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).margin is not None


def test_throughput_inverts_the_interval() -> None:
    assert per_second(8, Estimate(4.0, 2.0, 8.0)) == Estimate(2000.0, 1000.0, 4000.0)
    assert per_second(8, Estimate(4.0)) == Estimate(2000.0)
    # There is no throughput interval if the mean's interval reaches below zero.
    assert per_second(8, Estimate(4.0, -1.0, 9.0)) == Estimate(2000.0)


def test_paired_rounds_cancel_a_drift() -> None:
    generator = np.random.default_rng(3)
    machine = np.exp(np.cumsum(generator.normal(0, 0.1, 200)))
    slow = 2.0 * machine * generator.normal(1, 0.01, 200)
    fast = 1.0 * machine * generator.normal(1, 0.01, 200)
    paired = ratio(slow.tolist(), fast.tolist())
    assert paired.low is not None
    assert paired.high is not None
    assert paired.low <= 2 <= paired.high
    assert paired.margin is not None
    # 1.25 sqrt(2) 1 % / sqrt(200), twice: 0.25 %.
    assert paired.margin < 0.005
    torn = ratio(slow.tolist(), generator.permutation(fast).tolist())
    assert torn.margin is not None
    assert torn.margin > 10 * paired.margin


def test_ratio_shows_which_is_faster() -> None:
    assert ratio([4.0, 8.0, 2.0], [2.0, 4.0, 1.0]).value == 2
    assert ratio([2.0, 4.0, 1.0], [4.0, 8.0, 2.0]).value == 0.5
    with pytest.raises(ValueError, match="broadcast"):
        ratio([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("count", "p90", "p99"), [(9, False, False), (10, True, False), (99, True, False)]
)
def test_a_tail_that_no_round_reached_is_none(count: int, p90: bool, p99: bool) -> None:
    latency = summarise(latencies((count,)).tolist())
    assert (latency.p90 is not None, latency.p99 is not None) == (p90, p99)
    assert summarise(latencies((100,)).tolist()).p99 is not None


def test_a_latency_is_in_milliseconds() -> None:
    latency = summarise([0.001, 0.002, 0.006])
    assert latency.mean.value == pytest.approx(3)
    assert latency.p50.value == pytest.approx(2)
