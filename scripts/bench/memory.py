"""The largest resident size that a process had, as Linux reports it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["peak_megabytes"]


def peak_megabytes() -> float:
    """VmHWM of this process so far in units of 10 ** 6 bytes; NaN where /proc does not tell.

    Unlike ``ru_maxrss`` it starts anew with exec, so that a child does not inherit its parent's.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")
