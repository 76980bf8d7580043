"""One writer at a time for a file that is written over a long time, as what a later run resumes.

The lock is a hidden file beside it that names its holder.  The kernel drops the lock when the
holder ends, however it ends (``flock``).  Where the file system has no such locks nothing is
protected.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from clipdeploy.core.errors import FileError
from clipdeploy.core.files import file_errors, open_regular
from clipdeploy.core.leftovers import HeldError, RemovedError, try_lock

__all__ = ["sole_writer"]

# Longer than any holder's entry.
_MOST_BYTES = 4096
# Of this process.  A forked child inherits the descriptors, and would go on holding the locks.
_HELD: set[int] = set()


def _release_in_child() -> None:
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_release_in_child)


@contextmanager
def sole_writer(path: Path, what: str) -> Iterator[None]:
    """Let no other process or thread that calls this write ``path`` while the block runs.

    The lock is the hidden file ``.NAME.lock`` beside ``path``; it is removed when the block ends,
    and says in JSON ``what`` holds it (such as ``clipdeploy verify``), with its process, host and
    start time.  What a killed holder has left is taken over.  A missing parent folder is made.

    Raises:
        FileError: somebody else is writing, who is named; or the lock file cannot be made.
    """
    lock = path.with_name(f".{path.name}.lock")
    descriptor = _acquire(path, lock, what)
    try:
        yield
    finally:
        # A forked child that gets here has no lock, and the file is its parent's.
        if descriptor in _HELD:
            _HELD.discard(descriptor)
            with suppress(OSError):
                # Should somebody have deleted it, this may be the next holder's.
                if os.path.samestat(lock.stat(), os.fstat(descriptor)):
                    lock.unlink()
            os.close(descriptor)


def _acquire(path: Path, lock: Path, what: str) -> int | None:
    """The descriptor that holds ``lock``, which names us; None where there are no locks."""
    if sys.platform == "win32":
        return None
    while True:
        _make(path, lock)
        try:
            descriptor = try_lock(lock)
            break
        except RemovedError:  # its holder has just ended
            continue
        except HeldError:
            raise _refusal(path, lock) from None
    if descriptor is None:
        with suppress(OSError):
            lock.unlink()
        return None
    _HELD.add(descriptor)
    _sign(descriptor, what)
    return descriptor


def _make(path: Path, lock: Path) -> None:
    with file_errors("lock", path):
        lock.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(lock, os.O_RDWR | os.O_CREAT, 0o666))


def _sign(descriptor: int, what: str) -> None:
    holder = {
        "what": what,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    # A full disk leaves the lock without its holder's name.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)


def _refusal(path: Path, lock: Path) -> FileError:
    return FileError(
        f"{path} is being written by {_holder(lock)}",
        hint="wait for it, or use another --workspace",
    )


def _holder(lock: Path) -> str:
    try:
        with open_regular(lock) as stream:
            found: Any = json.loads(stream.read(_MOST_BYTES))
        since = datetime.fromisoformat(found["since"]).astimezone()
        who = f"process {int(found['pid'])} on {found['host']} since {_moment(since)}"
        return f"`{found['what']}` ({who})"
    except (
        FileError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
    ):  # it has not signed yet, or could not
        return "another process"


def _moment(since: datetime) -> str:
    today = since.date() == datetime.now().astimezone().date()
    return since.strftime("%H:%M" if today else "%Y-%m-%d %H:%M")
