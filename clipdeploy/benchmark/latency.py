"""Computes percentiles, means and ratios of timed rounds, each with a confidence interval.

Every interval is two-sided at 95 % and assumes that rounds are independent samples.  Correlated
rounds, such as under a drifting clock, make the interval of a latency too narrow; the ratio of two
latencies of one round is affected less, because both drift.  An interval is None if there are too
few rounds for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "Latency", "mean", "per_second", "percentile", "ratio", "summarise"]

# The share outside the 95 % interval at either end.
_TAIL = 0.025
# With fewer samples the expansion of Student's quantile is off by more than one part in a thousand,
# and a median has no interval.
_FEWEST = 6


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95 % interval, None if there are too few samples."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def margin(self) -> float | None:
        """The distance of the farther end, relative to the value."""
        if self.low is None or self.high is None:
            return None
        return max(self.high - self.value, self.value - self.low) / self.value


@dataclass(frozen=True)
class Latency:
    """The latency of one batch in milliseconds.

    ``p90`` and ``p99`` are None below 10 and 100 rounds, where they would equal the slowest round.
    Their intervals need 36 and 368 rounds, those of the median and the mean 6.
    """

    mean: Estimate
    p50: Estimate
    p90: Estimate | None
    p99: Estimate | None


def _binomial_cdf(n: int, p: float) -> NDArray[np.float64]:
    """P(B <= k) for k = 0 to n and binomial B, float64 (n + 1,)."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    ways = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
    cdf: NDArray[np.float64] = np.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p)).cumsum()
    return cdf


def percentile(samples: Sequence[float], percent: float) -> Estimate:
    """Estimate a percentile, 0 < ``percent`` < 100, without assuming a distribution.

    The value is interpolated linearly between the two nearest order statistics (Hyndman & Fan 1996,
    The American Statistician 50, type 7).  The number B of n samples below the true percentile is
    Binomial(n, percent / 100) for any distribution, so the order statistics

        X(l) with P(B < l) <= 2.5 %   and   X(u) with P(B >= u) <= 2.5 %

    enclose it (Hahn & Meeker 1991, "Statistical Intervals", 5.2).  There is no interval if l or u
    would be outside 1 to n.
    """
    ordered = np.sort(np.asarray(samples, np.float64))
    value = float(np.percentile(ordered, percent))
    cdf = _binomial_cdf(len(ordered), percent / 100)
    low = int(np.searchsorted(cdf, _TAIL, side="right")) - 1
    high = int(np.searchsorted(cdf, 1 - _TAIL, side="left"))
    if low < 0 or high >= len(ordered):
        return Estimate(value)
    return Estimate(value, float(ordered[low]), float(ordered[high]))


def _student_quantile(degrees: int) -> float:
    """t with P(T <= t) = 97.5 %, for 5 or more degrees of freedom, to 3 parts in 10,000.

    Source: Abramowitz & Stegun 1964, "Handbook of Mathematical Functions", 26.7.5.
    """
    z = NormalDist().inv_cdf(1 - _TAIL)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / degrees**power for power, term in enumerate(terms))


def mean(samples: Sequence[float]) -> Estimate:
    """Estimate the mean; m -+ t s / sqrt(n), t Student's with n - 1 degrees of freedom.

    For few and heavily skewed samples the coverage is slightly below 95 %.
    """
    values = np.asarray(samples, np.float64)
    value = float(values.mean())
    if len(values) < _FEWEST:
        return Estimate(value)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = _student_quantile(len(values) - 1) * error
    return Estimate(value, value - half, value + half)


def per_second(images: int, milliseconds: Estimate) -> Estimate:
    """Throughput in images per second from the milliseconds for ``images``."""
    rate = 1e3 * images
    low, high = milliseconds.low, milliseconds.high
    if low is None or high is None or low <= 0:
        return Estimate(rate / milliseconds.value)
    return Estimate(rate / milliseconds.value, rate / high, rate / low)


def ratio(reference: Sequence[float], samples: Sequence[float]) -> Estimate:
    """Speedup over ``reference``: the median of reference / sample over the rounds.

    Both list the same rounds in the same order, so that load which slows a round down cancels.
    """
    quotients = np.asarray(reference, np.float64) / np.asarray(samples, np.float64)
    return percentile(quotients.tolist(), 50)


def summarise(seconds: Sequence[float]) -> Latency:
    """Summarise the seconds of one or more rounds as a latency in milliseconds."""
    milliseconds = [1e3 * second for second in seconds]
    count = len(milliseconds)
    return Latency(
        mean=mean(milliseconds),
        p50=percentile(milliseconds, 50),
        p90=percentile(milliseconds, 90) if count >= 10 else None,
        p99=percentile(milliseconds, 99) if count >= 100 else None,
    )
