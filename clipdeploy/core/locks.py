"""Locks a file that one process writes for a long time, such as the records of a run.

The lock is a hidden file in the same folder that names its holder.  The kernel releases the lock
(``flock``) when the process ends, however it ends.  On a file system without locks there is no
protection.
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
from clipdeploy.core.leftovers import HeldError, RemovedError, remove_leftovers, try_lock

__all__ = ["remove_abandoned_lock", "sole_writer"]

# Larger than any lock file.
_MOST_BYTES = 4096
# Locks of this process.  A forked child inherits the descriptors and would keep the locks.
_HELD: set[int] = set()


def _release_in_child() -> None:
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_release_in_child)


@contextmanager
def sole_writer(path: Path, what: str) -> Iterator[None]:
    """Hold the lock on ``path`` while the block runs.

    The lock is the hidden file ``.NAME.lock`` in the same folder, removed when the block ends.  It
    contains JSON: ``what`` (such as ``clipdeploy verify``), process id, host and start time.  The
    lock file of a killed process is reused.  A missing parent folder is created.

    Raises:
        FileError: another process or thread holds the lock, or the lock file cannot be created.
    """
    lock = _lock_of(path)
    descriptor = _acquire(path, lock, what)
    try:
        yield
    finally:
        # A forked child does not hold the lock; the file belongs to its parent.
        if descriptor in _HELD:
            _HELD.discard(descriptor)
            with suppress(OSError):
                # If the file was deleted meanwhile, this one may belong to the next holder.
                if os.path.samestat(lock.stat(), os.fstat(descriptor)):
                    lock.unlink()
            os.close(descriptor)


def remove_abandoned_lock(path: Path) -> None:
    """Remove the lock on ``path`` that a killed process left, if there is nothing to write."""
    lock = _lock_of(path)
    remove_leftovers(lock.parent, lock.name)


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _acquire(path: Path, lock: Path, what: str) -> int | None:
    """Lock ``lock`` and write this process into it; None if locks are not supported."""
    if sys.platform == "win32":
        return None
    while True:
        _create(path, lock)
        try:
            descriptor = try_lock(lock)
            break
        except RemovedError:  # its holder has just finished
            continue
        except HeldError:
            raise _held_error(path, lock) from None
    if descriptor is None:
        with suppress(OSError):
            lock.unlink()
        return None
    _HELD.add(descriptor)
    _write_holder(descriptor, what)
    return descriptor


def _create(path: Path, lock: Path) -> None:
    with file_errors("lock", path):
        lock.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(lock, os.O_RDWR | os.O_CREAT, 0o666))


def _write_holder(descriptor: int, what: str) -> None:
    holder = {
        "what": what,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    # On a full disk the lock file stays empty.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)


def _held_error(path: Path, lock: Path) -> FileError:
    return FileError(
        f"{path} is being written by {_holder(lock)}",
        hint="wait until it has finished, or use another --workspace",
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
    ):  # the holder has not written its entry yet, or could not
        return "another process"


def _moment(since: datetime) -> str:
    today = since.date() == datetime.now().astimezone().date()
    return since.strftime("%H:%M" if today else "%Y-%m-%d %H:%M")
