"""What a measurement was taken on: the machine, its clocks, the versions."""

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
    """The GPU at one moment: MHz now and at most, watts drawn and allowed; None if not told."""

    sm_mhz: int | None
    sm_max_mhz: int | None
    memory_mhz: int | None
    memory_max_mhz: int | None
    watts: float | None
    watts_limit: float | None


@dataclass(frozen=True)
class Environment:
    """A machine and its libraries.

    ``cpus`` are those that this process may use; ``load`` is the number of processes that wanted
    one, on average over the last minute; ``governor`` is Linux's policy of CPU clocks.  What the
    platform does not tell is None, and so is everything of a GPU where there is none.
    ``clocks_before`` and ``clocks_after`` are read at the first and after the last round, with the
    GPU still warm; ``note`` says how far the clocks can be trusted.
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
    """Processes that want a CPU, on average over the last minute; None where nobody counts."""
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
    """The management library's handle of the first GPU that CUDA shows."""
    if not gpus():
        return None
    import pynvml

    # NVML counts all GPUs of the machine, CUDA those that CUDA_VISIBLE_DEVICES leaves: the bus
    # address is the same to both.
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
    """The clocks of the first GPU at this moment; None without a GPU or its management library."""
    device = _nvml_device()
    if device is None:
        return None
    import pynvml

    def ask(question: Callable[..., int], *about: int) -> int | None:
        try:
            return question(device, *about)
        except pynvml.NVMLError:
            return None

    def watts(question: Callable[..., int]) -> float | None:
        milliwatts = ask(question)
        return None if milliwatts is None else milliwatts / 1e3

    return Clocks(
        sm_mhz=ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
        sm_max_mhz=ask(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM),
        memory_mhz=ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM),
        memory_max_mhz=ask(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_MEM),
        watts=watts(pynvml.nvmlDeviceGetPowerUsage),
        watts_limit=watts(pynvml.nvmlDeviceGetPowerManagementLimit),
    )


def clock_note(before: Clocks | None, after: Clocks | None, *, gpu: bool) -> str:
    """How far the clocks can be trusted, in a sentence."""
    if not gpu:
        return "on the CPU, whatever else ran on this machine is in the figures"
    if before is None or after is None or before.sm_mhz is None or after.sm_mhz is None:
        return "the GPU's clocks are not known, and were taken as they came"
    return (
        f"SM clock {before.sm_mhz} MHz at the first round, {after.sm_mhz} MHz after the last, "
        f"{after.sm_max_mhz or 'unknown'} MHz at most; clipdeploy does not lock it"
    )


def read_environment(
    before: Clocks | None, after: Clocks | None, *, on_gpu: bool, load: float | None
) -> Environment:
    """This machine; ``on_gpu`` says that some artifact ran on the GPU, ``load`` is from before."""
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
