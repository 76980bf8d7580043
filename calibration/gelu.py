"""Whether GELU's output gets a shift and a scale for each channel, or one shift for all of them.

Either makes use of all levels.  By the statistics, the one with the smaller expected squared error
of fc2's output is better: that of the rounded input, and that of the weight, which is smaller if it
is rounded on data (:mod:`calibration.rounding`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibration.distribution import Distribution
from calibration.formats import INT8
from calibration.observers import ChannelStatistics
from calibration.ranges import choose_range, search_levels
from calibration.smoothing import Folding, search_folding
from calibration.weights import ROUNDED_SHARE

__all__ = ["gelu_folding", "squared_rows"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def gelu_folding(
    statistics: ChannelStatistics, weight: F32, strength: float | None = None
) -> tuple[Folding, bool]:
    """The shift and scale of each channel, and whether they are expected to be better than a shift.

    ``statistics`` are of GELU's output, ``weight`` (Cin, Cout) is fc2's.  ``strength``: see
    :func:`calibration.smoothing.search_folding`.
    """
    values = Distribution.of(statistics)
    folding = search_folding(values, weight, strength)
    scaled = Distribution.of(statistics, folding.shift, folding.scale)
    inside = folding.scale[:, None].astype(np.float32) * weight
    return folding, _symmetric_error(scaled, inside) < _shifted_error(values, weight)


def _symmetric_error(values: Distribution, weight: F32) -> float:
    """Expected squared error of a Linear's output with the same levels on both sides of zero."""
    squares = squared_rows(weight)
    limit = np.asarray([choose_range(values, "auto", squares)])
    return float(values.density(squares).error(limit)[0]) + _weight_error(values, weight)


def _shifted_error(values: Distribution, weight: F32) -> float:
    """Expected squared error of a Linear's output with one shift for all channels."""
    squares = squared_rows(weight)
    step, zero = search_levels(values, squares)
    from_input = values.density(squares).shifted_error(step * zero, step)
    return from_input + _weight_error(values, weight)


def squared_rows(weight: F32) -> F64:
    """|W[c, :]| ** 2 of each input channel of a weight (Cin, Cout), (Cin,)."""
    return np.asarray(np.einsum("ij,ij->i", weight, weight), np.float64)


def _weight_error(values: Distribution, weight: F32) -> float:
    steps = np.abs(weight).max(axis=0).astype(np.float64) / INT8.largest
    return ROUNDED_SHARE * float((steps**2).sum() / 12 * values.variance().sum())
