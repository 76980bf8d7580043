"""Reads the peak resident size of a process on Linux."""

from __future__ import annotations

from pathlib import Path

__all__ = ["peak_megabytes"]


def peak_megabytes() -> float:
    """Return VmHWM of this process in units of 10 ** 6 bytes; NaN if /proc is not available.

    Unlike ``ru_maxrss`` it is reset by exec, so a child does not inherit its parent's value.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")
