"""Keeps the measured times of engines in the workspace, so that each is measured once.

Every engine is timed beside FP16 in the same rounds: a clock that drifts from one engine to the
next slows both down.  With f and t the two times of such a pair, an engine takes

    T = t / f * T({}),   T({}) the time of FP16 when it was first measured
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from calibration.scheme import SchemeConfig
from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.files import write_atomic
from clipdeploy.core.passport import read_json, to_json
from clipdeploy.engines.roofline import Formats
from clipdeploy.tuning.engine_costs import Timer

__all__ = ["Conditions", "PairTimer", "forget_times", "kept_times"]

_SCHEMA = 1
# The times in microseconds of FP16 and of an engine with these formats, in the same rounds.
PairTimer = Callable[[Formats], tuple[float, float]]


@dataclass(frozen=True)
class Conditions:
    """What decides the time of an engine, apart from the formats of its products.

    ``graph`` and ``calibration`` are SHA-256 of the FP32 graph and of the calibration.
    """

    gpu: str
    sm: str
    driver: str
    cuda: str
    backend: str
    backend_version: str
    batch: int
    graph: str
    calibration: str
    scheme: SchemeConfig


@dataclass
class _Measured:
    """The pairs of times under some conditions, by the names of the products in 8 bits."""

    conditions: Conditions
    microseconds: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass
class _Times:
    measured: list[_Measured] = field(default_factory=list)
    schema: int = _SCHEMA

    def under(self, conditions: Conditions) -> _Measured:
        """What was measured under these conditions."""
        for each in self.measured:
            if each.conditions == conditions:
                return each
        self.measured.append(_Measured(conditions))
        return self.measured[-1]


def _load(path: Path) -> _Times:
    """The file at ``path``; nothing if it is missing or damaged."""
    try:
        return read_json(path, _Times, _SCHEMA) if path.exists() else _Times()
    except ArtifactError:
        return _Times()


def _slot(formats: Formats) -> str:
    """``int8: blocks.0.attn.qkv blocks.1.attn.qkv``; empty for FP16."""
    return f"{'+'.join(sorted(set(formats.values())))}: {' '.join(sorted(formats))}" * bool(formats)


def kept_times(measure: PairTimer, path: Path, conditions: Conditions) -> Timer:
    """A timer that reads what is in the file ``path``, and measures and saves the rest at once.

    Raises:
        FileError: when it is called, if the file cannot be read or written.
    """
    times = _load(path)
    known = times.under(conditions).microseconds

    def pair(formats: Formats) -> tuple[float, float]:
        slot = _slot(formats)
        if slot not in known:
            known[slot] = measure(formats)
            write_atomic(path, to_json(times))
        return known[slot]

    def time(formats: Formats) -> float:
        half, own = pair(formats)
        return own / half * pair({})[0]

    return time


def forget_times(path: Path, conditions: Conditions) -> None:
    """Remove what was measured under these conditions.

    Raises:
        FileError: the file cannot be written.
    """
    times = _load(path)
    times.measured.remove(times.under(conditions))
    write_atomic(path, to_json(times))
