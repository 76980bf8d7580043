"""Accumulates statistics of a tensor: exact extremes, a fixed histogram and the sum per channel.

The bin of a value is given by its float32 bits: the sign, the exponent and the top three bits of
the mantissa.  There are eight bins per octave and 24 octaves from 2 ** -13 to 2 ** 11 per sign:

    bin(x) = clip((bits(|x|) >> 20) - FIRST, 0, BINS - 1)

The bins need no first pass to find a range, and memory does not grow with the number of images.
Only counts, integer sums, minima and maxima are stored, so merging is exact: any order and any
sharding of the images gives the same statistics, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.errors import CalibrationError

__all__ = ["BINS", "ChannelObserver", "ChannelStatistics", "bin_edges"]

BINS = 192
_MANTISSA_BITS = 3
_SHIFT = 23 - _MANTISSA_BITS
_LOWEST_EXPONENT = -13
_FIRST = (127 + _LOWEST_EXPONENT) << _MANTISSA_BITS
# Sums are integers in units of 2 ** -24, below half a float32 ulp of any value over 1.
_FIXED_POINT = float(1 << 24)
# Far beyond any activation; an int64 holds the sum of 2 ** 19 rows of such values.
_LARGEST = float(1 << 20)
_IMAGES_AT_ONCE = 32
_MOST_ROWS = np.iinfo(np.int32).max


def bin_edges() -> NDArray[np.float64]:
    """The (BINS + 1,) edges of the bins of |x|; the first is 0, the last bin is open-ended."""
    bits = (np.arange(BINS + 1, dtype=np.int64) + _FIRST) << _SHIFT
    edges = bits.astype(np.int32).view(np.float32).astype(np.float64)
    edges[0] = 0.0
    return edges


@dataclass(frozen=True)
class ChannelStatistics:
    """Statistics of a tensor with C channels.

    ``minimum`` and ``maximum`` (C,) float32 are over all sampled tokens.  ``counts`` (C, 2, BINS)
    int32, positive values first, and ``total`` (C,) int64, the sum in units of 2 ** -24, are over
    the ``rows`` counted tokens.
    """

    minimum: NDArray[np.float32]
    maximum: NDArray[np.float32]
    counts: NDArray[np.int32]
    total: NDArray[np.int64]
    rows: int

    @property
    def channels(self) -> int:
        """The number of channels C."""
        return int(self.minimum.shape[0])

    @property
    def amax(self) -> NDArray[np.float32]:
        """The largest |x| of each channel, (C,)."""
        return np.maximum(np.abs(self.minimum), np.abs(self.maximum))

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean of each channel over the counted tokens, (C,)."""
        return self.total / (_FIXED_POINT * max(self.rows, 1))

    def channel_slice(self, first: int, last: int) -> ChannelStatistics:
        """The statistics of channels ``first`` to ``last - 1``."""
        part = slice(first, last)
        return ChannelStatistics(
            self.minimum[part], self.maximum[part], self.counts[part], self.total[part], self.rows
        )

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """The statistics of both sets of images; exact, commutative and associative.

        Raises:
            CalibrationError: the numbers of channels differ, or there are more than 2 ** 31 rows.
        """
        if self.channels != other.channels:
            raise CalibrationError(
                f"cannot merge statistics of {self.channels} and {other.channels} channels"
            )
        if self.rows + other.rows > _MOST_ROWS:
            raise CalibrationError(f"more than {_MOST_ROWS} rows cannot be counted")
        return ChannelStatistics(
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
            self.counts + other.counts,
            self.total + other.total,
            self.rows + other.rows,
        )


class ChannelObserver:
    """Accumulates the statistics of one tensor: ``collect`` repeatedly, ``compute``, ``reset``."""

    def __init__(self, name: str, channels: int) -> None:
        self.name = name
        self.channels = channels
        self._offset = (np.arange(channels, dtype=np.int32) * (2 * BINS))[:, None]
        self.reset()

    def reset(self) -> None:
        """Discard everything collected."""
        self._minimum = np.full(self.channels, np.inf, np.float32)
        self._maximum = np.full(self.channels, -np.inf, np.float32)
        self._counts = np.zeros(self.channels * 2 * BINS, np.int32)
        self._total = np.zeros(self.channels, np.int64)
        self._rows = 0
        self._waiting: list[NDArray[np.float32]] = []

    def resume(self, earlier: ChannelStatistics) -> None:
        """Continue from earlier statistics.

        Raises:
            CalibrationError: the number of channels differs.
        """
        if earlier.channels != self.channels:
            raise CalibrationError(
                f"{self.name} has {self.channels} channels, the earlier run {earlier.channels}"
            )
        self._minimum, self._maximum = earlier.minimum.copy(), earlier.maximum.copy()
        self._counts = earlier.counts.reshape(-1).copy()
        self._total = earlier.total.copy()
        self._rows = earlier.rows
        self._waiting = []

    def collect(
        self,
        minimum: NDArray[np.float32],
        maximum: NDArray[np.float32],
        rows: NDArray[np.float32],
        image: str = "",
    ) -> None:
        """Add one image: its extremes per channel (C,), and the tokens to count (K, C) float32.

        Raises:
            CalibrationError: a value is NaN, infinite or above 2 ** 20, or the number of channels
                differs.
        """
        shapes = (minimum.shape, maximum.shape, rows.shape[1:])
        if any(shape != (self.channels,) for shape in shapes) or rows.ndim != 2:
            raise CalibrationError(
                f"{self.name} has {self.channels} channels, got {minimum.shape}, "
                f"{maximum.shape} and {rows.shape}"
            )
        largest = float(np.maximum(np.abs(minimum).max(), np.abs(maximum).max()))
        if not np.isfinite(largest) or not np.isfinite(rows).all():
            raise CalibrationError(
                f"{self.name} is NaN or infinite on {image or 'this image'}",
                hint="the model overflows: check the image and the checkpoint",
            )
        if self._rows + len(rows) > _MOST_ROWS:
            raise CalibrationError(f"{self.name}: more than {_MOST_ROWS} rows cannot be counted")
        if largest > _LARGEST:
            raise CalibrationError(
                f"{self.name} reaches {largest:.1e} on {image or 'this image'}",
                hint="no trained model has such values: check the checkpoint",
            )
        # Adding zero turns -0.0 into 0.0: numpy's minimum of the two depends on their order.
        self._minimum = np.minimum(self._minimum, minimum) + np.float32(0)
        self._maximum = np.maximum(self._maximum, maximum) + np.float32(0)
        self._waiting.append(rows.copy())
        self._rows += rows.shape[0]
        if len(self._waiting) == _IMAGES_AT_ONCE:
            self._count()

    def _count(self) -> None:
        """Add the waiting rows to the histogram.

        Many images at once, channel by channel: the counts of one image are scattered over the
        whole histogram, which does not fit a CPU cache.
        """
        if not self._waiting:
            return
        rows = np.ascontiguousarray(np.concatenate(self._waiting).T)
        self._waiting = []
        bits = rows.view(np.int32)
        bins = np.clip(((bits & 0x7FFFFFFF) >> _SHIFT) - _FIRST, 0, BINS - 1)
        bins += (bits < 0) * np.int32(BINS)
        bins += self._offset
        self._counts += np.bincount(bins.ravel(), minlength=self._counts.size).astype(np.int32)
        self._total += np.rint(rows.astype(np.float64) * _FIXED_POINT).astype(np.int64).sum(axis=1)

    def compute(self) -> ChannelStatistics:
        """The statistics so far.

        Raises:
            CalibrationError: nothing was collected.
        """
        if not self._rows:
            raise CalibrationError(f"no images were collected for {self.name}")
        self._count()
        return ChannelStatistics(
            self._minimum.copy(),
            self._maximum.copy(),
            self._counts.reshape(self.channels, 2, BINS).copy(),
            self._total.copy(),
            self._rows,
        )
