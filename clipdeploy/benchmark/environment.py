"""Records the machine, clocks and library versions of a measurement."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from clipdeploy.core.device import driver, gpus
from clipdeploy.engines.passport import library_versions, platform_name

__all__ = ["Clocks", "Environment", "machine_load", "read_clocks", "read_environment"]

_CPU_INFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


@dataclass(frozen=True)
class Clocks:
    """Current and maximum GPU clocks in MHz, and power draw and limit in W; None if unknown."""

    sm_mhz: int | None
    sm_max_mhz: int | None
    memory_mhz: int | None
    memory_max_mhz: int | None
    watts: float | None
    watts_limit: float | None


@dataclass(frozen=True)
class Environment:
    """A machine and its libraries.

    ``cpus`` is the number of CPUs that this process may use; ``load`` the average number of
    runnable processes over the last minute; ``governor`` Linux's policy for CPU clocks.  Values
    that the platform does not report are None, and so are GPU values without a GPU.
    ``clocks_before`` and ``clocks_after`` are read before the first and after the last round, while
    the GPU is warm; ``note`` describes how reliable the clocks are.
    """

    timestamp: str
    platform: str
    cpu: str
    cpus: int
    load: float | None
    governor: str | None
    gpu: str | None
    sm: str | None
    driver: str | None
    cuda: str | None
    clocks_before: Clocks | None
    clocks_after: Clocks | None
    note: str
    versions: dict[str, str]


def _cpu_name() -> str:
    with suppress(OSError):
        for line in _CPU_INFO.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cpu_count() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_load() -> float | None:
    """Average number of runnable processes over the last minute; None if it is unknown."""
    if sys.platform == "win32":
        return None
    with suppress(OSError):
        return round(os.getloadavg()[0], 2)
    return None


def _governor() -> str | None:
    with suppress(OSError):
        return _GOVERNOR.read_text().strip()
    return None


@cache
def _nvml_device() -> Any | None:
    """The NVML handle of the first GPU that CUDA uses."""
    if not gpus():
        return None
    import pynvml

    # NVML numbers all GPUs of the machine, CUDA only those in CUDA_VISIBLE_DEVICES; the PCI bus
    # address identifies a GPU in both.
    cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    device, bus = ctypes.c_int(), ctypes.create_string_buffer(32)
    if cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if cuda.cuDeviceGetPCIBusId(bus, len(bus), device):
        return None
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByPciBusId(bus.value.decode())
    except pynvml.NVMLError:
        return None


def read_clocks() -> Clocks | None:
    """Read the clocks of the first GPU; None without a GPU or NVML."""
    device = _nvml_device()
    if device is None:
        return None
    import pynvml

    def read(query: Callable[..., int], *arguments: int) -> int | None:
        try:
            return query(device, *arguments)
        except pynvml.NVMLError:
            return None

    def watts(query: Callable[..., int]) -> float | None:
        milliwatts = read(query)
        return None if milliwatts is None else milliwatts / 1e3

    return Clocks(
        sm_mhz=read(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
        sm_max_mhz=read(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM),
        memory_mhz=read(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM),
        memory_max_mhz=read(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_MEM),
        watts=watts(pynvml.nvmlDeviceGetPowerUsage),
        watts_limit=watts(pynvml.nvmlDeviceGetPowerManagementLimit),
    )


def clock_note(before: Clocks | None, after: Clocks | None, *, gpu: bool) -> str:
    """Describe how reliable the clocks are, in one sentence."""
    if not gpu:
        return "measured on the CPU: other programs on this machine affect the latencies"
    if before is None or after is None or before.sm_mhz is None or after.sm_mhz is None:
        return "the GPU's clocks are unknown and were not locked"
    return (
        f"SM clock {before.sm_mhz} MHz before the first round, {after.sm_mhz} MHz after the last, "
        f"{after.sm_max_mhz or 'unknown'} MHz maximum; clipdeploy does not lock it"
    )


def read_environment(
    before: Clocks | None, after: Clocks | None, *, on_gpu: bool, load: float | None
) -> Environment:
    """Describe this machine.

    ``on_gpu`` is True if an artifact ran on the GPU; ``load`` was read before the rounds.
    """
    first = gpus()[0] if gpus() else None
    nvidia = driver()
    return Environment(
        timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
        platform=platform_name(),
        cpu=_cpu_name(),
        cpus=_cpu_count(),
        load=load,
        governor=_governor(),
        gpu=first.name if first else None,
        sm=first.sm if first else None,
        driver=nvidia.version if nvidia else None,
        cuda=nvidia.cuda if nvidia else None,
        clocks_before=before,
        clocks_after=after,
        note=clock_note(before, after, gpu=on_gpu),
        versions=library_versions(),
    )
