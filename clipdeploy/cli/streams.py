"""Makes standard streams accept all output, so that the exit code does not depend on the reader.

The reader may have closed the pipe (``| head -1``), the disk may be full, or a stream may have been
closed before the program started (``2>&-``).  None of these changes a verdict.  Output that cannot
be written is dropped at the lowest level, below all libraries that print, and :func:`closing_code`
decides once, at the end, what to do about it.

Lost output matters only to a command that makes nothing else, such as ``zoo``: with a full disk it
exits with 1 instead of 0.  A closed pipe does not matter: the reader has read what it needed.
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
# Errors of a pipe or socket that its reader has closed.
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ESHUTDOWN})
# Possible sizes of a terminal: fewer columns cannot show a table.
_SIZES = {"COLUMNS": range(20, 10_001), "LINES": range(1, 10_001)}
_DIGITS = 5


class _Guarded(io.FileIO):
    """A standard stream that raises no errors.

    ``lost`` is the first error.  After it, everything written to stdout is dropped, so that the
    output has no gap; each message to stderr is tried again.  ``sole_product``: the command makes
    nothing but its output.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        # The names of Python's own streams.
        self.name = f"<{'stdout' if number == _STDOUT else 'stderr'}>"
        self.lost: OSError | None = None
        self.sole_product = True
        self._again = number == _STDERR

    def write(self, data: Any, /) -> int:
        """Write ``data``, or drop what cannot be written; returns the size of ``data`` in bytes."""
        view = memoryview(data).cast("B")
        if self.lost is None or self._again:
            try:
                self._write_all(view)
            except OSError as error:
                self.lost = self.lost or error
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        while view:
            # None: another program has made the stream non-blocking, and its buffer is full.
            written = cast("int | None", super().write(view))
            if written is None:
                select.select([], [self], [])
            else:
                view = view[written:]


def guard_streams() -> None:
    """Let stdout and stderr accept everything, for the rest of the process.

    Streams replaced by a test or a notebook are left alone.  Closed descriptors 0 to 2 are opened
    on the null device: otherwise the next file to be opened would get such a number, and native
    libraries would write their messages into it.
    """
    for number in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(number)
        except OSError:
            # open() takes the lowest free number, which is this one.  Child processes inherit it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = _nowhere("r")
    sys.stdout = _guarded(sys.stdout, _STDOUT)
    sys.stderr = _guarded(sys.stderr, _STDERR)


def _nowhere(mode: str) -> TextIO:
    # A new descriptor: 0 to 2 may have been another file before this program began.
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
    """The error handler for characters that the encoding lacks; it never raises.

    In UTF-8 only undecodable bytes of file names are such characters; they are written unchanged.
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
    """Remove impossible values of ``COLUMNS`` and ``LINES`` from the environment.

    Libraries use them unchecked: rich shows an empty table in 0 columns.
    """
    for name, possible in _SIZES.items():
        text = os.environ.get(name, "")
        number = text.isascii() and text.isdecimal() and len(text) <= _DIGITS
        if not number or int(text) not in possible:
            os.environ.pop(name, None)


def made_more_than_output() -> None:
    """Record that the command gives a verdict or makes files, beside its output."""
    if (raw := _raw(sys.stdout)) is not None:
        raw.sole_product = False


def closing_code(code: int) -> int:
    """Flush the streams, report lost output on stderr, and return the exit code.

    That is ``code``, or 1 if the lost output is all that the command makes.
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
