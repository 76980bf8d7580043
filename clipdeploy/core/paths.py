"""Paths as a user of the Python API gives them: texts as well as ``Path`` objects."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["StrPath", "as_path", "as_paths", "hold_paths"]

StrPath = str | os.PathLike[str]


def as_path(path: StrPath | None) -> Path | None:
    """A path that may have been left out."""
    return None if path is None else Path(path)


def as_paths(paths: StrPath | Iterable[StrPath]) -> tuple[Path, ...]:
    """One path or several; a text is one path, not a sequence of letters."""
    if isinstance(paths, str | os.PathLike):
        return (Path(paths),)
    return tuple(Path(path) for path in paths)


def hold_paths(config: object, *names: str) -> None:
    """Make fields of a frozen configuration ``Path`` objects; they may have been given as texts."""
    for name in names:
        object.__setattr__(config, name, as_path(getattr(config, name)))
