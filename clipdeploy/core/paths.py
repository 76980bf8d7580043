"""Converts paths given as ``str`` to ``Path`` objects."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["StrPath", "as_path", "as_paths", "convert_paths"]

StrPath = str | os.PathLike[str]


def as_path(path: StrPath | None) -> Path | None:
    """Convert a path; None stays None."""
    return None if path is None else Path(path)


def as_paths(paths: StrPath | Iterable[StrPath]) -> tuple[Path, ...]:
    """Convert one path or several to a tuple; a ``str`` is one path."""
    if isinstance(paths, str | os.PathLike):
        return (Path(paths),)
    return tuple(Path(path) for path in paths)


def convert_paths(config: object, *names: str) -> None:
    """Convert the fields ``names`` of a frozen configuration to ``Path`` objects, in place."""
    for name in names:
        object.__setattr__(config, name, as_path(getattr(config, name)))
