"""The 8-bit number formats that tensors are quantised to.

A tensor x is stored as x = step * q with a number q of the format.  A format has

    INT8    q = -127, -126, .. 127              equal distances
    FP8     q = (-1)^s 2^(e - 7) (1 + m / 8)    e > 0
            q = (-1)^s 2^-6 m / 8               e = 0: subnormal numbers

FP8 is E4M3, with 4 bits for e and 3 for m, from -448 to 448, without infinity (Micikevicius et al.
2022, "FP8 formats for deep learning").  Values beyond the largest number saturate.  FP8's distances
grow with |q|, so its error is relative and hardly depends on the step.

A new format is a subclass of :class:`NumberFormat` and an entry of :data:`FORMATS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = [
    "FORMATS",
    "FP8",
    "INT8",
    "SMALLEST_SCALE",
    "FormatName",
    "NumberFormat",
    "float16_scale",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
FormatName = Literal["int8", "fp8"]
SMALLEST_SCALE = float(np.finfo(np.float16).tiny)


def float16_scale(scale: F64) -> F32:
    """Round scales of any shape to float16 values, at least float16's smallest normal number.

    Quantised graphs with an FP16 and an FP32 remainder then have equal numbers and scales.
    """
    return np.maximum(scale, SMALLEST_SCALE).astype(np.float16).astype(np.float32)


class NumberFormat(ABC):
    """A set of numbers q, symmetric about zero.

    ``label``: its name in messages.  ``largest``: max q.  ``onnx_type`` and ``dtype``: how ONNX and
    numpy store q.  ``even``: whether the numbers have equal distances; then smoothing the input's
    outliers and moving its zero lower the error.
    """

    name: FormatName
    label: str
    largest: float
    onnx_type: ir.DataType
    dtype: np.dtype[Any]
    even: bool

    def step(self, limit: float) -> float:
        """The step limit / largest, rounded to a float16 value."""
        return float(float16_scale(np.asarray([limit / self.largest]))[0])

    @abstractmethod
    def rounded(self, units: F32) -> F32:
        """The nearest q of each x / step, float32 of any shape; may write to ``units``."""

    @abstractmethod
    def squared_integral(self, units: F64) -> F64:
        """The integral of (q - u) ** 2 from 0 to |u|, with u's sign, of any shape; u = x / step."""

    @abstractmethod
    def error_integral(self, units: F64) -> F64:
        """The integral of q - u from 0 to |u|, an even function of u = x / step, of any shape."""

    @abstractmethod
    def cells(self, count: int) -> NDArray[np.int64]:
        """The index of the number >= 0 that represents each of ``count`` equal bins, (count,)."""


class _Integers(NumberFormat):
    name: FormatName = "int8"
    label, even = "INT8", True
    largest = 127.0
    onnx_type, dtype = ir.DataType.INT8, np.dtype(np.int8)

    def rounded(self, units: F32) -> F32:
        np.rint(units, out=units)
        return np.clip(units, -self.largest, self.largest, out=units)

    def squared_integral(self, units: F64) -> F64:
        # With n = round(u) and f = u - n it is n / 12 + f ** 3 / 3 up to 127.5.
        size = np.abs(units)
        inside = np.minimum(size, self.largest + 0.5)
        nearest = np.rint(inside)
        fraction = inside - nearest
        over = np.maximum(size - self.largest, 0.5)
        # Products, because numpy's power is ten times as slow.
        integral = nearest / 12 + fraction * fraction * fraction / 3
        integral += (over * over * over - 0.125) / 3
        return np.asarray(np.copysign(integral, units))

    def error_integral(self, units: F64) -> F64:
        size = np.abs(units)
        inside = np.minimum(size, self.largest + 0.5)
        fraction = inside - np.rint(inside)
        over = np.maximum(size - self.largest, 0.5)
        return np.asarray(-(fraction**2) / 2 - (over**2 - 0.25) / 2)

    def cells(self, count: int) -> NDArray[np.int64]:
        return np.arange(count) * (int(self.largest) + 1) // count


class _Floats(NumberFormat):
    name: FormatName = "fp8"
    label, even = "FP8", False
    dtype = np.dtype(ml_dtypes.float8_e4m3fn)
    onnx_type = ir.DataType.FLOAT8E4M3FN
    largest = 448.0

    @cached_property
    def _numbers(self) -> F64:
        """All q >= 0 in ascending order."""
        # All bit patterns with sign 0; the last is NaN.
        numbers: F64 = np.arange(127, dtype=np.uint8).view(self.dtype).astype(np.float64)
        return numbers

    @cached_property
    def _middles(self) -> F64:
        """The middle between each q >= 0 and the next."""
        return (self._numbers[:-1] + self._numbers[1:]) / 2

    @cached_property
    def _bounds(self) -> F64:
        """The smallest u >= 0 that is rounded to each q."""
        return np.concatenate([[0.0], self._middles])

    def rounded(self, units: F32) -> F32:
        np.clip(units, -self.largest, self.largest, out=units)
        return units.astype(self.dtype).astype(np.float32)

    def _integral(self, units: F64, power: int) -> F64:
        """The integral of (u - q) ** (power - 1) from 0 to |u|."""
        numbers, bounds = self._numbers, self._bounds
        size = np.abs(units)
        nearest = np.searchsorted(self._middles, size, side="right")
        start = (bounds - numbers) ** power
        whole = np.concatenate([[0.0], ((bounds[1:] - numbers[:-1]) ** power - start[:-1])])
        inside = (size - numbers[nearest]) ** power - start[nearest]
        return np.asarray((np.cumsum(whole)[nearest] + inside) / power)

    def squared_integral(self, units: F64) -> F64:
        return np.asarray(np.copysign(self._integral(units, 3), units))

    def error_integral(self, units: F64) -> F64:
        return -self._integral(units, 2)

    def cells(self, count: int) -> NDArray[np.int64]:
        middles = (np.arange(count) + 0.5) / count * self.largest
        return np.searchsorted(self._middles, middles, side="right")


INT8: NumberFormat = _Integers()
FP8: NumberFormat = _Floats()
FORMATS: dict[FormatName, NumberFormat] = {each.name: each for each in (INT8, FP8)}
