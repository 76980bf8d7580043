"""Validates values that were read from files.

The values of a passport become paths, code, lines of files and sizes of arrays.  msgspec checks the
type of each field, this module the value: a type that is read from JSON has a method ``faults``,
which yields a :class:`Fault` for each invalid value, and :func:`first_fault` calls it for every
object inside a value.  Code generators still have to escape values for their language.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Protocol, runtime_checkable

from clipdeploy.core.printable import is_one_line

__all__ = [
    "MOST_BATCH",
    "MOST_CLASSES",
    "MOST_EDGE",
    "Fault",
    "first_fault",
    "is_hash",
    "is_name",
    "is_number",
    "is_version",
    "unless",
    "unless_lines",
]

# Pixels of a crop's edge, images of a batch, logits of an image: far above real values, and small
# enough for arrays and loops of that size.
MOST_EDGE = 8192
MOST_BATCH = 65_536
MOST_CLASSES = 1_000_000
_MOST_TEXT = 4096
_MOST_DEPTH = 16
_SHOWN = 60

# Valid as a file name on every system: no separator, no leading dot or dash, no space.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_HASH = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+_-]{0,63}")


@dataclass(frozen=True)
class Fault:
    """An invalid value: the field, the value and what is expected."""

    field: str
    value: object
    expected: str

    def __str__(self) -> str:
        shown = ascii(self.value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        return f"{self.field} is {shown}, not {self.expected}"


@runtime_checkable
class _Checked(Protocol):
    def faults(self) -> Iterator[Fault]: ...


def first_fault(value: object, field: str = "") -> Fault | None:
    """Return the first invalid value inside ``value``, at any depth; None if there is none."""
    return next(_faults(value, field), None)


def _faults(value: object, field: str) -> Iterator[Fault]:
    if isinstance(value, _Checked):
        for fault in value.faults():
            yield replace(fault, field=f"{field}.{fault.field}".strip("."))
    for name, inner in _inside(value):
        yield from _faults(inner, f"{field}{name}".strip("."))


def _inside(value: object) -> Iterator[tuple[str, object]]:
    """Yield the parts of ``value`` that may contain invalid values, with their names."""
    if is_dataclass(value):
        for each in fields(value):
            yield f".{each.name}", getattr(value, each.name)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if is_dataclass(inner):
                yield f"[{key!r}]", inner
    elif isinstance(value, tuple | list):
        for index, inner in enumerate(value):
            if is_dataclass(inner):
                yield f"[{index}]", inner


def is_name(text: str) -> bool:
    """Return whether ``text`` is safe as part of a path, a program and a command line."""
    return _NAME.fullmatch(text) is not None


def is_hash(text: str) -> bool:
    """Return whether ``text`` is a SHA-256 in hex."""
    return _HASH.fullmatch(text) is not None


def is_version(text: str) -> bool:
    """Return whether ``text`` is a version such as ``10.13.3.9``."""
    return _VERSION.fullmatch(text) is not None


def is_number(value: float, least: float, most: float) -> bool:
    """Return whether ``value`` is finite, and from ``least`` to ``most``."""
    return math.isfinite(value) and least <= value <= most


def unless(valid: bool, field: str, value: object, expected: str) -> Iterator[Fault]:
    """Yield a fault if the value is not ``valid``."""
    if not valid:
        yield Fault(field, value, expected)


def unless_lines(field: str, value: object, depth: int = 0) -> Iterator[Fault]:
    """Yield a fault for each string inside ``value``, including keys, that is not a single line.

    ``value`` is any JSON value.
    """
    if isinstance(value, str):
        valid = is_one_line(value) and len(value) <= _MOST_TEXT
        yield from unless(valid, field, value, "one line of printable text")
    elif depth > _MOST_DEPTH:
        yield Fault(field, "deeper", f"{_MOST_DEPTH} levels deep at most")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from unless_lines(field, key, depth + 1)
            yield from unless_lines(f"{field}.{key}", inner, depth + 1)
    elif isinstance(value, tuple | list):
        for index, inner in enumerate(value):
            yield from unless_lines(f"{field}[{index}]", inner, depth + 1)
