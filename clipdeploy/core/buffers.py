"""Reuses the memory of large arrays once they are garbage collected.

The C library returns large blocks to the kernel on each ``free``.  The next array then costs 0.1 ms
per MiB for zeroed pages, as much as filling it.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Buffers"]

T = TypeVar("T", bound=np.generic)


class _Lease:
    """The base of an array and its views; returns the memory to the pool when deleted."""

    def __init__(self, memory: NDArray[np.uint8], free: deque[NDArray[np.uint8]]) -> None:
        self.__array_interface__: dict[str, Any] = memory.__array_interface__
        self._memory, self._free = memory, free

    def __del__(self) -> None:
        self._free.append(self._memory)


class Buffers:
    """A thread-safe pool of memory for arrays."""

    def __init__(self, keep: int) -> None:
        """``keep``: maximum number of free blocks in the pool."""
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=keep)

    def empty(self, shape: tuple[int, ...], dtype: type[T]) -> NDArray[T]:
        """Return an uninitialised array of this shape and type."""
        memory = self._take(math.prod(shape) * np.dtype(dtype).itemsize)
        return np.asarray(_Lease(memory, self._free)).view(dtype).reshape(shape)

    def _take(self, size: int) -> NDArray[np.uint8]:
        for _ in range(len(self._free)):
            try:
                memory = self._free.popleft()
            except IndexError:  # another thread took it
                break
            if memory.size == size:
                return memory
            self._free.append(memory)
        return np.empty(size, np.uint8)
