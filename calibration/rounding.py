"""Rounds a Linear's weight by the error of its output on data instead of each weight by itself.

With the quantised input x (n tokens) of a Linear, its mean m and its damped covariance

    H = (x - m)^T (x - m) / n + 0.01 mean(diag) I

an error E of the weight (Cin, Cout) has the squared error tr(E^T H E) in the output; the bias
corrects the error m E of the mean.  The rows of W are rounded one after another, and the error of
row i is passed on to the rows k after it, so that this error is least:

    U^T U = H^-1,  U upper triangular
    e = (W[i, :] - W'[i, :]) / U[i, i],    W[k, :] -= U[i, k] e

(Frantar et al. 2022, "GPTQ", arXiv:2210.17323, after "Optimal Brain Compression",
arXiv:2208.11580).  Channels of large variance come first, because the most channels are left to
correct their errors.

Rounding in one pass cannot take back an early row.  Afterwards each row is therefore rounded again
a few times with all others fixed, to the number with the least error:

    W'[i, :] = round(W'[i, :] - (H E)[i, :] / H[i, i]),    E = W' - W

The scales are given: one for each output channel, one for all, or one for each weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.formats import INT8, NumberFormat

__all__ = ["Moments", "output_error", "round_weight"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

# Share of the mean variance that is added to each channel's, as in GPTQ.
_DAMPING = 0.01
# Rows whose errors are passed on together to all rows after them.
_ROWS = 128
# How often each row is rounded again.
_SWEEPS = 4


class Moments:
    """Mean and covariance of a Linear's input x with C channels, from sums over all tokens.

    The sums are float64.  Images must be added in a fixed order to give the same bits.
    """

    def __init__(self, channels: int) -> None:
        self.rows = 0
        self._sum = np.zeros(channels)
        self._products = np.zeros((channels, channels))

    def add(self, x: F32, first: int = 1) -> None:
        """Add the tokens ``x`` (n, C); the first of them counts ``first`` times."""
        for rows, count in ((x, 1), (x[:1], first - 1)):
            self.rows += count * len(rows)
            self._sum += count * rows.sum(axis=0, dtype=np.float64)
            self._products += np.float32(count) * (rows.T @ rows)

    @property
    def mean(self) -> F64:
        """E[x], (C,)."""
        return self._sum / max(self.rows, 1)

    @property
    def covariance(self) -> F64:
        """E[(x - mean)^T (x - mean)], (C, C)."""
        return self._products / max(self.rows, 1) - np.outer(self.mean, self.mean)


def output_error(error: F32, covariance: F64) -> float:
    """tr(E^T H E): the squared error of the output that an ``error`` (Cin, Cout) of W causes."""
    return float(np.einsum("ij,ij->", error, covariance.astype(np.float32) @ error))


def round_weight(
    weight: F32, scale: F32, covariance: F64, number_format: NumberFormat = INT8
) -> NDArray[Any]:
    """Round a weight (Cin, Cout) to numbers of the format, (Cin, Cout).

    ``scale``: (Cout,), or (Cin, Cout) where channels have scales of their own.

    ``covariance`` (Cin, Cin): of the Linear's input.
    """
    order = np.argsort(-np.diag(covariance), kind="stable")
    damped = _damped(covariance[np.ix_(order, order)])
    scales = np.broadcast_to(scale, weight.shape)[order]
    numbers = _round_once(weight[order], _inverse_factor(damped), scales, number_format)
    single = damped.astype(np.float32)
    for _ in range(_SWEEPS):
        _round_again(numbers, weight[order], single, scales, number_format)
    rounded = np.empty_like(numbers)
    rounded[order] = numbers
    return rounded.astype(number_format.dtype)


def _round_once(weight: F32, factor: F32, scale: F32, number_format: NumberFormat) -> F32:
    """Round a weight whose rows are in the order of ``factor``, one row after another."""
    rows = weight.astype(np.float32)
    numbers = np.empty_like(rows)
    for first in range(0, len(rows), _ROWS):
        last = min(first + _ROWS, len(rows))
        part = slice(first, last)
        inside = factor[part, part]
        errors = _round_rows(rows[part], numbers[part], inside, scale[part], number_format)
        rows[last:] -= factor[part, last:].T @ errors
    return numbers


def _round_rows(
    rows: F32, numbers: F32, factor: F32, scale: F32, number_format: NumberFormat
) -> F32:
    """Round ``rows`` in place into ``numbers``; return the error of each, divided by U[i, i]."""
    errors = np.empty_like(rows)
    for i, row in enumerate(rows):
        numbers[i] = number_format.rounded(row / scale[i])
        errors[i] = (row - numbers[i] * scale[i]) / factor[i, i]
        rows[i + 1 :] -= np.outer(factor[i, i + 1 :], errors[i])
    return errors


def _round_again(
    numbers: F32, weight: F32, damped: F32, scale: F32, number_format: NumberFormat
) -> None:
    """Round each row of ``numbers`` again in place, to the least error with all others fixed."""
    error = numbers * scale - weight
    for first in range(0, len(numbers), _ROWS):
        part = slice(first, first + _ROWS)
        inside = damped[part, part]
        slope = damped[part] @ error
        for i, row in enumerate(numbers[part]):
            step = scale[first + i]
            better = number_format.rounded(row - slope[i] / inside[i, i] / step)
            change = (better - row) * step
            row[:] = better
            error[first + i] += change
            slope += np.outer(inside[:, i], change)


def _damped(covariance: F64) -> F64:
    """The covariance with a mean variance of 1, damped.

    A constant input has no covariance, and any rounding is as good as another.
    """
    size = len(covariance)
    mean = max(float(np.trace(covariance)) / size, float(np.finfo(np.float32).tiny))
    return np.asarray(covariance / mean + _DAMPING * np.eye(size))


def _inverse_factor(damped: F64) -> F32:
    """U with U^T U = H^-1 of the damped covariance H."""
    # The reversed lower factor of H is an upper factor: H = R R^T, and U = R^-1 is upper too.
    root = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return np.linalg.inv(root).astype(np.float32)
