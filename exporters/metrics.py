"""Signal-to-noise ratios in dB, the measure of every quantisation error in clipdeploy.

SQNR = 10 log10(sum reference^2 / sum (found - reference)^2)  dB
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["BROKEN_DB", "ratio_db", "sqnr_db"]

# Noise without signal, or noise that is infinite or NaN.  Finite, because JSON has no infinity.
BROKEN_DB = -999.0


def ratio_db(signal: float, noise: float) -> float | None:
    """Return 10 log10(signal / noise) in dB for two sums of squares.

    Returns None if there is no noise, whatever the signal: the compared values are equal.  Returns
    ``BROKEN_DB`` if there is noise but no signal, or if one of the two is infinite or NaN.
    """
    if noise == 0 and math.isfinite(signal):
        return None
    if not (math.isfinite(noise) and math.isfinite(signal) and signal > 0):
        return BROKEN_DB
    # Not of the quotient, which overflows for a subnormal noise.
    return 10 * (math.log10(signal) - math.log10(noise))


def sqnr_db(reference: NDArray[np.floating], found: NDArray[np.floating]) -> float | None:
    """Return the SQNR in dB of ``found`` against ``reference``, of the same shape.

    See :func:`ratio_db` for equal arrays, a zero reference and values that are not finite.
    """
    noise = float(np.square((found - reference).astype(np.float64)).sum())
    signal = float(np.square(reference.astype(np.float64)).sum())
    return ratio_db(signal, noise)
