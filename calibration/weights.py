"""Quantises a Linear's weight: symmetric, with one scale per output channel or one for all.

    W'[:, j] = s[j] q(W[:, j] / s[j])          q: the nearest number of the format

Without clipping, s[j] is max |W[:, j]| divided by the format's largest number.  With clipping, a
few smaller scales are tried, and the one with the least output error
sum_c v[c] (W' - W)[c, j] ** 2 is used, where v[c] is the variance of input channel c.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.formats import INT8, NumberFormat, float16_scale

__all__ = ["ROUNDED_SHARE", "quantize_weight", "weight_error"]

# Assumed noise of a weight that is rounded on data, relative to that of the nearest numbers.
ROUNDED_SHARE = 0.2
_CLIPS = (0.96, 0.92, 0.88, 0.84, 0.8)


def quantize_weight(
    weight: NDArray[np.float32],
    variance: NDArray[np.float64] | None = None,
    number_format: NumberFormat = INT8,
    *,
    one_scale: bool = False,
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Quantise a weight (Cin, Cout); return its numbers of the same shape, and scales (Cout,).

    The numbers have the format's dtype; the scales are float16 values, all equal with
    ``one_scale``.  ``variance`` (Cin,): of the inputs, enables clipping.
    """
    largest = np.abs(weight).max(axis=None if one_scale else 0, keepdims=one_scale)
    widest = largest.reshape(-1).astype(np.float64) / number_format.largest
    scale = float16_scale(widest)
    best = number_format.rounded(weight / scale)
    if variance is not None:
        root = np.sqrt(variance).astype(np.float32)[:, None]
        least = _cost(weight, best, scale, root)
        for clip in _CLIPS:
            tried_scale = float16_scale(widest * clip)
            tried = number_format.rounded(weight / tried_scale)
            cost = _cost(weight, tried, tried_scale, root)
            better = cost < least
            best = np.where(better, tried, best)
            scale = np.where(better, tried_scale, scale)
            least = np.minimum(cost, least)
    columns = np.broadcast_to(scale, weight.shape[1:]).copy()
    return best.astype(number_format.dtype), columns


def _cost(
    weight: NDArray[np.float32],
    numbers: NDArray[np.float32],
    scale: NDArray[np.float32],
    root: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The output error for each scale, one or (Cout,)."""
    error = numbers * scale
    error -= weight
    error *= root
    cost: NDArray[np.float32] = np.einsum("ij,ij->j", error, error)
    return cost if len(scale) > 1 else cost.sum(keepdims=True)


def weight_error(
    weight: NDArray[np.float32], numbers: NDArray[Any], scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Quantised minus original weight, (Cin, Cout)."""
    return numbers.astype(np.float32) * scale - weight
