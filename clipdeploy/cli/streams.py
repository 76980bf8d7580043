"""Standard streams that cannot fail: an exit code does not depend on who reads the output.

A reader may have gone (``| head -1``), a disk may be full, and a stream may have been closed before
the program started (``2>&-``).  None of that changes a verdict.  What cannot be written is dropped
where it would have been written, below every library that prints, and :func:`closing_code` decides
once, at the end, what the loss means.

Whether the output was lost matters only to a command whose sole product it is, such as ``zoo``:
with a full disk it exits with 1 instead of 0.  A reader that has gone has read what it needed.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import IO, Any, TextIO, cast

__all__ = ["closing_code", "drop_impossible_sizes", "guard_streams", "made_more_than_output"]

_STDIN, _STDOUT, _STDERR = 0, 1, 2
# The reader has gone: a pipe's, a socket's.
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ESHUTDOWN})
# Of a terminal; columns below these show no table, and above these are no terminal.
_SIZES = {"COLUMNS": range(20, 10_001), "LINES": range(1, 10_001)}
_DIGITS = 5


class _Guarded(io.FileIO):
    """A standard stream without errors.

    ``lost`` is the first error.  After it stdout takes nothing more, so that what was written has
    no gap; stderr is tried again with every message, as each is a whole.  ``sole_product``: what is
    written to stdout is all that the command makes.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        # As Python calls its own.
        self.name = f"<{'stdout' if number == _STDOUT else 'stderr'}>"
        self.lost: OSError | None = None
        self.sole_product = True
        self._again = number == _STDERR

    def write(self, data: Any, /) -> int:
        """Write all of ``data``, or drop the rest of it; its number of bytes in either case."""
        view = memoryview(data).cast("B")
        if self.lost is None or self._again:
            try:
                self._write_all(view)
            except OSError as error:
                self.lost = self.lost or error
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        while view:
            # None: another program has made the stream non-blocking, and it is full.
            written = cast("int | None", super().write(view))
            if written is None:
                select.select([], [self], [])
            else:
                view = view[written:]


def guard_streams() -> None:
    """Let stdout and stderr accept everything, for the rest of the process.

    Streams that were replaced, as by a test or a notebook, are left alone.  Closed descriptors
    0 to 2 are opened on the null device: otherwise the next file that is opened would get such a
    number, and native libraries would write their messages into it.
    """
    for number in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number: this one.  Programs that are started inherit it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = _nowhere("r")
    sys.stdout = _guarded(sys.stdout, _STDOUT)
    sys.stderr = _guarded(sys.stderr, _STDERR)


def _nowhere(mode: str) -> TextIO:
    # A descriptor of its own: 0 to 2 may have become another file before this program began.
    return cast(TextIO, open(os.devnull, mode, encoding="utf-8", errors="surrogateescape"))


def _guarded(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:
        return _nowhere("w")
    if not isinstance(stream, io.TextIOWrapper) or _raw(stream) is not None:
        return stream
    try:
        if stream.fileno() != number:
            return stream
    except (OSError, ValueError):
        return stream
    with suppress(OSError):
        stream.flush()
    raw = _Guarded(number)
    # With `python -u` there is no buffer.
    unbuffered = isinstance(stream.buffer, io.FileIO)
    text = io.TextIOWrapper(
        cast("IO[bytes]", raw if unbuffered else io.BufferedWriter(raw)),
        encoding=stream.encoding,
        errors=_errors(stream),
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    cast(Any, text).mode = "w"
    return text


def _errors(stream: io.TextIOWrapper) -> str:
    """What is done with a character that the terminal's encoding lacks; never an exception.

    In UTF-8 only the bytes of a foreign file name are such: they are written as they are.
    """
    if stream.errors not in ("strict", "surrogateescape"):
        return str(stream.errors)
    utf8 = stream.encoding.lower().replace("-", "") == "utf8"
    return "surrogateescape" if utf8 else "backslashreplace"


def _raw(stream: object) -> _Guarded | None:
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, _Guarded) else None


def drop_impossible_sizes() -> None:
    """Remove ``COLUMNS`` and ``LINES`` from the environment where nothing can be shown in them.

    Libraries take them as they come: rich shows an empty table in 0 columns.
    """
    for name, possible in _SIZES.items():
        said = os.environ.get(name, "")
        number = said.isascii() and said.isdecimal() and len(said) <= _DIGITS
        if not number or int(said) not in possible:
            os.environ.pop(name, None)


def made_more_than_output() -> None:
    """Note that the command's result is not only what it prints: a verdict, or files."""
    if (raw := _raw(sys.stdout)) is not None:
        raw.sole_product = False


def closing_code(code: int) -> int:
    """The exit code, once everything has been written; a loss on stdout is reported on stderr.

    It is ``code``, but for a command whose sole product was lost.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    raw = _raw(sys.stdout)
    if raw is None or raw.lost is None or raw.lost.errno in _GONE:
        return code
    reason = os.strerror(raw.lost.errno) if raw.lost.errno else str(raw.lost)
    sys.stderr.write(f"error: the output is incomplete: cannot write stdout: {reason}\n")
    sys.stderr.flush()
    return 1 if raw.sole_product and code == 0 else code
