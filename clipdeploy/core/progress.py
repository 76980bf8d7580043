"""The interface through which long stages report progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["SILENT", "Progress"]

Advance = Callable[[int], None]


class Progress(Protocol):
    """Shows the tasks of a stage; the command line implements it as bars on stderr."""

    def task(self, text: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Show ``text`` while the block runs; the block calls the yielded function with units done.

        ``total`` is the number of units, ``None`` if unknown.
        """


class _Silent:
    @contextmanager
    def task(self, text: str, total: int | None = None) -> Iterator[Advance]:
        yield lambda count: None


SILENT: Progress = _Silent()
