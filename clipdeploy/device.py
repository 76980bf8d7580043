"""Which NVIDIA GPUs the driver shows, asked without any CUDA package."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache

__all__ = ["Gpu", "gpus"]

# CUdevice_attribute in cuda.h.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name and its compute capability, such as (8, 9)."""

    name: str
    compute_capability: tuple[int, int]

    @property
    def sm(self) -> str:
        """The compute capability as NVIDIA writes it: ``SM 8.9``."""
        return "SM {}.{}".format(*self.compute_capability)


@cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs of this machine; empty where there is no driver or no GPU."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        if cuda.cuDeviceGet(ctypes.byref(device), index):
            continue
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        found.append(Gpu(name.value.decode(), (major.value, minor.value)))
    return tuple(found)
