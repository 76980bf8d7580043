"""Chooses the range of a tensor: the |x| that the largest number of the format represents.

All methods use the same collected statistics:

    minmax      the largest value observed
    percentile  the 99.99th percentile of |x|
    mse         least squared error of the tensor
    entropy     least Kullback-Leibler divergence from the tensor's histogram (NVIDIA, "8-bit
                inference with TensorRT", GTC 2017)
    auto        least squared error of the Linear's output: the weight of channel c is
                |W[c, :]| ** 2, by which the Linear multiplies its squared error
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from calibration.distribution import Density, Distribution
from calibration.formats import INT8, NumberFormat
from clipdeploy.core.errors import UsageError

__all__ = ["RANGE_METHODS", "RangeMethod", "choose_range", "search_levels"]

RangeMethod = Literal["auto", "minmax", "percentile", "mse", "entropy"]
RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)

_PERCENTILE = 99.99
# Candidate ranges: from the largest value down to a hundredth of it, then 1 % apart near the best.
_COARSE = 0.9 ** np.arange(44)
_FINE = 1.0 + np.arange(-9, 10) / 100
_ENTROPY_BINS = 2048
_ENTROPY_STRIDE = 16
# A bin for each number >= 0 of INT8.
_ENTROPY_LEAST = 128


def _percentile(density: Density, number_format: NumberFormat) -> float:
    cumulative = np.cumsum(density.folded)
    index = int(np.searchsorted(cumulative, cumulative[-1] * _PERCENTILE / 100))
    return density.largest * min(index + 1, len(cumulative)) / len(cumulative)


def _least_error(density: Density, number_format: NumberFormat) -> float:
    limits = density.largest * _COARSE
    best = float(limits[np.argmin(density.error(limits, number_format))])
    limits = np.minimum(best * _FINE, density.largest)
    return float(limits[np.argmin(density.error(limits, number_format))])


def _divergence(reference: NDArray[np.float64], kept: int, number_format: NumberFormat) -> float:
    """KL divergence of the first ``kept`` bins, clipped, from their copy in the format."""
    p = reference[:kept].copy()
    p[-1] += reference[kept:].sum()
    number = number_format.cells(kept)
    occupied = reference[:kept] > 0
    sums = np.bincount(number, reference[:kept])
    cells = np.bincount(number, occupied)
    q = np.where(occupied, sums[number] / np.maximum(cells[number], 1), 0.0)
    seen = (p > 0) & (q > 0)
    # Mass in bins where the copy is empty counts as if the copy had a trace of mass there.
    lost = p[(p > 0) & (q <= 0)].sum() / p.sum()
    p, q = p[seen] / p.sum(), q[seen] / q.sum()
    return float((p * np.log(p / q)).sum() + lost * np.log(1e9))


def _entropy(density: Density, number_format: NumberFormat) -> float:
    histogram = density.folded.reshape(_ENTROPY_BINS, -1).sum(axis=1)
    kept = np.arange(_ENTROPY_LEAST, _ENTROPY_BINS + 1, _ENTROPY_STRIDE)
    best = min(kept, key=lambda count: _divergence(histogram, int(count), number_format))
    return density.largest * float(best) / _ENTROPY_BINS


_TENSOR_METHODS: dict[str, Callable[[Density, NumberFormat], float]] = {
    "percentile": _percentile,
    "mse": _least_error,
    "entropy": _entropy,
}


def search_levels(values: Distribution, channel_weight: NDArray[np.float64]) -> tuple[float, int]:
    """Step and zero level of a one-sided tensor in INT8, with the least error of the output.

    GELU's output is in [-0.17, M]: symmetric levels would leave nearly half of them unused.  x is
    quantised as step * (q + zero), q from -127 to 127.  ``zero`` is an integer, so that subtracting
    step * zero first gives the same grid as a zero point of -zero.  ``channel_weight`` (C,): see
    :func:`choose_range`.
    """
    density = values.density(channel_weight)
    low, high = float(values.smallest.min()), float(values.largest.max())
    best, least = (density.largest / INT8.largest, 0), np.inf
    for part in (*(0.95 ** np.arange(40)), 0.0):
        # Zero is always a level, so that the zero point fits uint8.
        bottom, top = min(low, 0.0), max(high * part, -low, 1e-12)
        step = INT8.step((top - bottom) / 2)
        zero = round((top + bottom) / 2 / step)
        if (error := density.shifted_error(zero * step, step)) < least:
            best, least = (step, zero), error
    return best


def choose_range(
    values: Distribution,
    method: RangeMethod,
    channel_weight: NDArray[np.float64] | float = 1.0,
    number_format: NumberFormat = INT8,
) -> float:
    """The |x| that the largest number of the format represents.

    ``channel_weight`` (C,): |W[c, :]| ** 2 of the Linear that reads the tensor; used by ``auto``.

    Raises:
        UsageError: unknown method.
    """
    if method == "minmax":
        return values.amax
    if method == "auto":
        return min(_least_error(values.density(channel_weight), number_format), values.amax)
    if method not in _TENSOR_METHODS:
        raise UsageError(
            f"unknown range method {method!r}", hint=f"choose one of {', '.join(RANGE_METHODS)}"
        )
    return min(_TENSOR_METHODS[method](values.density(), number_format), values.amax)
