"""Quantises a Linear's weight to int8: symmetric, with one scale per output channel.

    W'[:, j] = s[j] round(W[:, j] / s[j])          |round(...)| <= 127

Without clipping, s[j] is max |W[:, j]| / 127.  With clipping, a few smaller scales are tried, and
the one with the least output error sum_c v[c] (W' - W)[c, j] ** 2 is used, where v[c] is the
variance of input channel c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibration.distribution import LEVELS

__all__ = [
    "SMALLEST_SCALE",
    "float16_scale",
    "float16_step",
    "quantize_weight",
    "weight_error",
]

SMALLEST_SCALE = float(np.finfo(np.float16).tiny)
_CLIPS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)


def float16_scale(scale: NDArray[np.float64]) -> NDArray[np.float32]:
    """Round scales of any shape to float16 values, at least float16's smallest normal number.

    The INT8 graphs with an FP16 and an FP32 remainder then have equal integers and scales.
    """
    return np.maximum(scale, SMALLEST_SCALE).astype(np.float16).astype(np.float32)


def float16_step(limit: float) -> float:
    """The step limit / 127, rounded to a float16 value."""
    return float(float16_scale(np.asarray([limit / LEVELS]))[0])


def _rounded(weight: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    integers = weight / scale
    np.rint(integers, out=integers)
    np.clip(integers, -LEVELS, LEVELS, out=integers)
    return integers


def quantize_weight(
    weight: NDArray[np.float32], variance: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise a weight (Cin, Cout); return int8 of the same shape, and float16 scales (Cout,).

    ``variance`` (Cin,): of the inputs, enables clipping.
    """
    largest = np.abs(weight).max(axis=0).astype(np.float64)
    widest = float16_scale(largest / LEVELS)
    best, scale = _rounded(weight, widest), widest
    if variance is None:
        return best.astype(np.int8), scale
    root = np.sqrt(variance).astype(np.float32)[:, None]
    least = _cost(weight, best, scale, root)
    for clip in _CLIPS[1:]:
        tried_scale = float16_scale(largest * clip / LEVELS)
        tried = _rounded(weight, tried_scale)
        cost = _cost(weight, tried, tried_scale, root)
        better = cost < least
        best = np.where(better, tried, best)
        scale = np.where(better, tried_scale, scale)
        least = np.minimum(cost, least)
    return best.astype(np.int8), scale


def _cost(
    weight: NDArray[np.float32],
    integers: NDArray[np.float32],
    scale: NDArray[np.float32],
    root: NDArray[np.float32],
) -> NDArray[np.float32]:
    error = integers * scale
    error -= weight
    error *= root
    cost: NDArray[np.float32] = np.einsum("ij,ij->j", error, error)
    return cost


def weight_error(
    weight: NDArray[np.float32], integers: NDArray[np.int8], scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Quantised minus original weight, (Cin, Cout)."""
    return integers.astype(np.float32) * scale - weight
