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
The scales are given: one for each output channel, or one for all.
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


class Moments:
    """Mean and covariance of a Linear's input x with C channels, from sums over all tokens.

    The sums are float64.  Images must be added in a fixed order to give the same bits.
    """

    def __init__(self, channels: int) -> None:
        self.rows = 0
        self._sum = np.zeros(channels)
        self._products = np.zeros((channels, channels))

    def add(self, x: F32) -> None:
        """Add the tokens ``x`` (n, C)."""
        self.rows += len(x)
        self._sum += x.sum(axis=0, dtype=np.float64)
        self._products += x.T @ x

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
    """Round a weight (Cin, Cout) with scales (Cout,) to numbers of the format, (Cin, Cout).

    ``covariance`` (Cin, Cin): of the Linear's input.
    """
    order = np.argsort(-np.diag(covariance), kind="stable")
    factor = _inverse_factor(covariance[np.ix_(order, order)])
    rows = weight[order].astype(np.float32)
    numbers = np.empty_like(rows)
    for first in range(0, len(rows), _ROWS):
        last = min(first + _ROWS, len(rows))
        part = slice(first, last)
        inside = factor[part, part]
        errors = _round_rows(rows[part], numbers[part], inside, scale, number_format)
        rows[last:] -= factor[part, last:].T @ errors
    rounded = np.empty_like(numbers)
    rounded[order] = numbers
    return rounded.astype(number_format.dtype)


def _round_rows(
    rows: F32, numbers: F32, factor: F32, scale: F32, number_format: NumberFormat
) -> F32:
    """Round ``rows`` in place into ``numbers``; return the error of each, divided by U[i, i]."""
    errors = np.empty_like(rows)
    for i, row in enumerate(rows):
        numbers[i] = number_format.rounded(row / scale)
        errors[i] = (row - numbers[i] * scale) / factor[i, i]
        rows[i + 1 :] -= np.outer(factor[i, i + 1 :], errors[i])
    return errors


def _inverse_factor(covariance: F64) -> F32:
    """U with U^T U = H^-1 of the damped covariance H."""
    size = len(covariance)
    # A constant input has no covariance, and any rounding is as good as another.
    damping = max(_DAMPING * float(np.trace(covariance)) / size, float(np.finfo(np.float32).tiny))
    # The reversed lower factor of H is an upper factor: H = R R^T, and U = R^-1 is upper too.
    flipped = (covariance + damping * np.eye(size))[::-1, ::-1]
    root = np.linalg.cholesky(flipped)[::-1, ::-1]
    return np.linalg.inv(root).astype(np.float32)
