"""Runs programs in pseudo-terminals of a given width and reads the final screen."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyte

__all__ = ["COLOUR", "CONTROL", "Terminal", "screen", "terminal"]

# Not allowed in files: escape sequences, and carriage returns of progress bars.
CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")
# Select Graphic Rendition with a colour among its parameters (ECMA-48, 8.3.117; 90 on: aixterm).
COLOUR = re.compile(rb"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;[0-9;]*)?m")
# Larger than any output, so that overlong lines are neither wrapped nor lost.
_WIDE, _HIGH = 1000, 2000


@dataclass
class Terminal:
    """``path`` is the device; ``raw`` is its output, available after the block."""

    path: str
    raw: bytes = b""
    _parts: list[bytes] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """Return the lines of the final screen."""
        return screen(self.raw)


@contextmanager
def terminal(columns: int, rows: int = 50) -> Iterator[Terminal]:
    """Open a terminal of this size during the block."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    opened = Terminal(os.ttyname(slave))
    # Read continuously, because a full terminal blocks its writer.
    reader = threading.Thread(target=_read, args=(master, opened._parts))
    reader.start()
    try:
        yield opened
    finally:
        os.close(slave)
        reader.join()
        os.close(master)
        opened.raw = b"".join(opened._parts)


def _read(master: int, parts: list[bytes]) -> None:
    while True:
        try:
            data = os.read(master, 1 << 16)
        except OSError as error:
            if error.errno != errno.EIO:  # on Linux: all writers have closed it
                raise
            return
        if not data:
            return
        parts.append(data)


def screen(raw: bytes) -> list[str]:
    """Return the screen of a terminal that never wraps, without trailing empty lines."""
    shown = pyte.Screen(_WIDE, _HIGH)
    pyte.ByteStream(shown).feed(raw)
    lines = []
    for row in range(max(shown.buffer, default=-1) + 1):
        cells = shown.buffer[row]
        width = max(cells, default=-1) + 1
        lines.append("".join(cells[column].data for column in range(width)).rstrip())
    while lines and not lines[-1]:
        lines.pop()
    return lines
