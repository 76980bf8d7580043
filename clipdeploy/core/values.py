"""Values that come from a file, checked once where the file is read.

A passport's values become paths, code, lines of files and sizes of arrays.  msgspec checks that a
field has its type; whether a value of that type can be is checked here.  A type that is read from
JSON has a method ``faults``, which yields a :class:`Fault` for each value that cannot be, and
:func:`first_fault` asks every such type inside a value.  A writer of code still escapes what it
writes, by the rules of its own language.
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

# Pixels of a crop's edge, images of a batch, logits of an image: each far above any real one, and
# small enough that an array of that size, or a loop over it, does no harm.
MOST_EDGE = 8192
MOST_BATCH = 65_536
MOST_CLASSES = 1_000_000
_MOST_TEXT = 4096
_MOST_DEPTH = 16
_SHOWN = 60

# Also a file's name on every system: no separator, no leading dot or dash, no space.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_HASH = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+_-]{0,63}")


@dataclass(frozen=True)
class Fault:
    """A field, its value, and what the value should be."""

    field: str
    value: object
    wanted: str

    def __str__(self) -> str:
        shown = ascii(self.value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        return f"{self.field} is {shown}, not {self.wanted}"


@runtime_checkable
class _Checked(Protocol):
    def faults(self) -> Iterator[Fault]: ...


def first_fault(value: object, field: str = "") -> Fault | None:
    """The first value inside ``value``, at any depth, that cannot be; None if there is none."""
    return next(_faults(value, field), None)


def _faults(value: object, field: str) -> Iterator[Fault]:
    if isinstance(value, _Checked):
        for fault in value.faults():
            yield replace(fault, field=f"{field}.{fault.field}".strip("."))
    for name, inner in _inside(value):
        yield from _faults(inner, f"{field}{name}".strip("."))


def _inside(value: object) -> Iterator[tuple[str, object]]:
    """The parts of ``value`` that may have faults of their own."""
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
    """Whether ``text`` may be part of a path, of a program and of a command line."""
    return _NAME.fullmatch(text) is not None


def is_hash(text: str) -> bool:
    """Whether ``text`` is a SHA-256 in hex."""
    return _HASH.fullmatch(text) is not None


def is_version(text: str) -> bool:
    """Whether ``text`` is a version such as ``10.13.3.9``."""
    return _VERSION.fullmatch(text) is not None


def is_number(value: float, least: float, most: float) -> bool:
    """Whether ``value`` is finite, and from ``least`` to ``most``."""
    return math.isfinite(value) and least <= value <= most


def unless(held: bool, field: str, value: object, wanted: str) -> Iterator[Fault]:
    """A fault, unless the condition is ``held``."""
    if not held:
        yield Fault(field, value, wanted)


def unless_lines(field: str, value: object, depth: int = 0) -> Iterator[Fault]:
    """A fault for each text inside ``value``, keys included, that is not one line of characters.

    ``value`` is what JSON can hold; a tuple or a list is a row of lines.
    """
    if isinstance(value, str):
        held = is_one_line(value) and len(value) <= _MOST_TEXT
        yield from unless(held, field, value, "one line of printable text")
    elif depth > _MOST_DEPTH:
        yield Fault(field, "deeper", f"{_MOST_DEPTH} levels deep at most")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from unless_lines(field, key, depth + 1)
            yield from unless_lines(f"{field}.{key}", inner, depth + 1)
    elif isinstance(value, tuple | list):
        for index, inner in enumerate(value):
            yield from unless_lines(f"{field}[{index}]", inner, depth + 1)
