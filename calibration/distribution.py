"""Models a tensor's values as piecewise uniform densities, and computes their rounding error.

Each occupied histogram bin of a channel becomes an interval [low, high] with a count.  Values are
assumed to be uniform inside it, and intervals end at the channel's exact extremes.  Under

    x' = (x - shift) / scale           per channel

an interval remains an interval, so that shifting and smoothing do not read the images again.

Quantising x with step d has, in units u = x / d, the squared error (q(u) - u) ** 2, where q(u) is
the nearest number of the format.  :mod:`calibration.formats` integrates it in closed form, so the
mean error over an interval is exact for any step and any width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.formats import INT8, NumberFormat
from calibration.observers import BINS, ChannelStatistics, bin_edges

__all__ = ["Density", "Distribution", "mean_error", "squared_error"]

F64 = NDArray[np.float64]

# Even one step of the widest useful range spans a dozen of these bins.
_DENSITY_BINS = 4096


def squared_error(edges: F64, step: float | F64, number_format: NumberFormat = INT8) -> F64:
    """Mean squared error of values uniform in each bin, quantised to ``step``: (..., K).

    ``edges`` (K + 1,) separate K adjacent bins; ``step`` is a number or (..., 1).
    """
    ends = edges / step
    whole = np.diff(number_format.squared_integral(ends))
    return np.asarray(step * step * whole / np.diff(ends))


def mean_error(low: F64, high: F64, step: float, number_format: NumberFormat = INT8) -> F64:
    """Mean of quantised - x over values uniform in [low, high] (any shape)."""
    a, b = low / step, high / step
    integral = number_format.error_integral
    return np.asarray(step * (integral(b) - integral(a)) / (b - a))


@dataclass(frozen=True)
class Density:
    """Weighted mass of x' over all channels, in equal bins over [-largest, largest]."""

    mass: F64
    largest: float

    @property
    def folded(self) -> F64:
        """Mass of |x'| in equal bins over [0, largest]."""
        half = len(self.mass) // 2
        return self.mass[half:] + self.mass[:half][::-1]

    def error(self, limit: NDArray[np.floating[Any]], number_format: NumberFormat = INT8) -> F64:
        """Weighted squared error if the largest number represents ``limit``, for each of (K,)."""
        mass = self.folded
        edges = np.linspace(0, self.largest, len(mass) + 1)
        steps = limit.astype(np.float64)[:, None] / number_format.largest
        return np.asarray(squared_error(edges, steps, number_format) @ mass)

    def shifted_error(self, shift: float, step: float) -> float:
        """Weighted squared error of x' - shift, quantised to INT8 with ``step``."""
        edges = np.linspace(-self.largest, self.largest, len(self.mass) + 1) - shift
        return float(squared_error(edges, step) @ self.mass)


@dataclass(frozen=True)
class Distribution:
    """The values of a tensor with C channels as K intervals.

    ``low``, ``high``, ``count`` and ``channel`` are (K,).  ``smallest``, ``largest`` and ``mean``
    (C,) are each channel's exact extremes and mean; ``rows`` is the number of counted tokens.
    """

    low: F64
    high: F64
    count: F64
    channel: NDArray[np.int64]
    smallest: F64
    largest: F64
    mean: F64
    rows: int

    @classmethod
    def of(
        cls, statistics: ChannelStatistics, shift: F64 | float = 0.0, scale: F64 | float = 1.0
    ) -> Distribution:
        """The distribution of (x - shift) / scale; both are (C,) or scalars."""
        edges = bin_edges()
        channel, sign, cell = np.nonzero(statistics.counts)
        near, far = edges[cell], edges[cell + 1]
        smallest = statistics.minimum.astype(np.float64)
        largest = statistics.maximum.astype(np.float64)
        # The last bin also holds larger values, up to the channel's extreme.
        far = np.where(cell == BINS - 1, np.inf, far)
        low = np.where(sign == 0, near, -far)
        high = np.where(sign == 0, far, -near)
        low = np.clip(low, smallest[channel], largest[channel])
        high = np.clip(high, smallest[channel], largest[channel])
        ones = np.ones(statistics.channels)
        shifts, scales = shift * ones, scale * ones
        low = (low - shifts[channel]) / scales[channel]
        high = (high - shifts[channel]) / scales[channel]
        # A constant channel needs an interval of nonzero width as well.
        high = np.maximum(high, low + 1e-9 * (1 + np.abs(low)))
        return cls(
            low,
            high,
            statistics.counts[channel, sign, cell].astype(np.float64),
            channel,
            (smallest - shifts) / scales,
            (largest - shifts) / scales,
            (statistics.mean - shifts) / scales,
            statistics.rows,
        )

    @property
    def amax(self) -> float:
        """The largest |x'| over all channels."""
        return float(max(np.abs(self.smallest).max(), np.abs(self.largest).max()))

    def _per_channel(self, values: F64) -> F64:
        totals = np.bincount(self.channel, self.count * values, minlength=len(self.mean))
        return np.asarray(totals / max(self.rows, 1))

    def second_moment(self) -> F64:
        """E[x' ** 2] of each channel, (C,)."""
        return self._per_channel((self.low**2 + self.low * self.high + self.high**2) / 3)

    def variance(self) -> F64:
        """The variance of x' in each channel, (C,)."""
        return np.maximum(self.second_moment() - self.mean**2, 0.0)

    def mean_error(self, step: float, number_format: NumberFormat = INT8) -> F64:
        """E[quantised - x'] of each channel at ``step``, (C,)."""
        return self._per_channel(mean_error(self.low, self.high, step, number_format))

    def density(self, weight: F64 | float = 1.0) -> Density:
        """The density over all channels, weighted by ``weight``, a scalar or (C,)."""
        size = 2 * _DENSITY_BINS
        weights = weight * np.ones(len(self.mean))
        ends = np.maximum(np.abs(self.smallest), np.abs(self.largest))
        # Slightly above the largest weighted value, so that no value falls on the last edge.
        largest = max(float(np.where(weights > 0, ends, 0.0).max()), 1e-12) * (1 + 1e-6)
        height = self.count * weights[self.channel] / (self.high - self.low)
        bins_per_unit = _DENSITY_BINS / largest
        mass = np.zeros(size + 3)
        for edge, sign in ((self.low, 1.0), (self.high, -1.0)):
            # The cumulative mass is a sum of ramps (t - edge)+; sampled at whole numbers a ramp
            # has second differences 1 - f and f just after its edge.
            position = np.clip((edge + largest) * bins_per_unit, 0, size)
            whole = position.astype(np.int64)
            fraction = position - whole
            slope = sign * height / bins_per_unit
            mass += np.bincount(whole + 1, slope * (1 - fraction), minlength=size + 3)
            mass += np.bincount(whole + 2, slope * fraction, minlength=size + 3)
        cumulative = np.cumsum(np.cumsum(mass))[: size + 1]
        signed = np.maximum(np.diff(cumulative), 0.0) / max(self.rows, 1)
        return Density(signed, largest)
