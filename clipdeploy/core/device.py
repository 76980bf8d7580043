"""Queries the NVIDIA driver and its GPUs, without PyTorch or the CUDA toolkit."""

from __future__ import annotations

import ctypes
import sys
import warnings
from dataclasses import dataclass
from functools import cache

__all__ = ["CpuFallback", "Driver", "Gpu", "driver", "gpus", "warn_of_cpu"]

# CUdevice_attribute in cuda.h.
_MAJOR, _MINOR = 75, 76


class CpuFallback(UserWarning):
    """Something runs on the CPU although a GPU is visible, because a library cannot use it."""


@cache
def warn_of_cpu(what: str, problem: str) -> None:
    """Warn, once per process, that ``what`` ("graphs run") is on the CPU because of ``problem``."""
    text = f"{what} on the CPU although there is a GPU: {problem} (run clipdeploy doctor)"
    warnings.warn(text, CpuFallback, stacklevel=4)


@dataclass(frozen=True)
class Gpu:
    """A GPU: name and compute capability, such as (8, 9)."""

    name: str
    compute_capability: tuple[int, int]

    @property
    def sm(self) -> str:
        """The compute capability in NVIDIA's notation: ``SM 8.9``."""
        return f"SM {self.capability}"

    @property
    def capability(self) -> str:
        """The compute capability as an option value: ``8.9``."""
        return "{}.{}".format(*self.compute_capability)


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver: its version and the newest CUDA version that it supports."""

    version: str
    cuda: str


@cache
def _cuda() -> ctypes.CDLL | None:
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    return None if cuda.cuInit(0) else cuda


@cache
def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs visible to this process (CUDA_VISIBLE_DEVICES)."""
    cuda = _cuda()
    count = ctypes.c_int()
    if cuda is None or cuda.cuDeviceGetCount(ctypes.byref(count)):
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


@cache
def driver() -> Driver | None:
    """Return the NVIDIA driver, queried through NVML; None if there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    except pynvml.NVMLError:
        return None
    # nvml.h: 1000 * major + 10 * minor.
    return Driver(str(version), f"{cuda // 1000}.{cuda % 1000 // 10}")
