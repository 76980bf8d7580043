"""Removes temporary files and folders of processes that were killed.

A writer locks its temporary files (``flock``).  The kernel releases the lock when the process ends,
however it ends, so an unlocked file belongs to a process that has exited.  On a file system without
locks nothing is removed.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

__all__ = [
    "HeldError",
    "RemovedError",
    "claimed",
    "is_abandoned",
    "remove_leftovers",
    "scratch_folder",
    "try_lock",
]

# Users are unlikely to choose this prefix; unlocked folders with it are removed.
_SCRATCH = (".clipdeploy-scratch-", ".part")


class HeldError(Exception):
    """Another process or thread holds the lock."""


class RemovedError(HeldError):
    """The file was removed or replaced by the previous holder."""


def try_lock(path: Path) -> int | None:
    """Lock ``path`` and return a descriptor that holds the lock until it is closed.

    Locks also exclude each other within a process.  Returns None if locks are not supported.

    Raises:
        HeldError: the lock is held by another; RemovedError if the file was removed.
    """
    if sys.platform == "win32":
        return None
    # NFS can lock only files opened for writing; folders cannot be opened for writing.
    mode = os.O_RDONLY if path.is_dir() else os.O_RDWR
    try:
        descriptor = os.open(path, mode)
    except FileNotFoundError:
        raise RemovedError from None
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.stat(path), os.fstat(descriptor)):
            raise RemovedError
    except BlockingIOError:
        os.close(descriptor)
        raise HeldError from None
    except (FileNotFoundError, RemovedError):
        os.close(descriptor)
        raise RemovedError from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def claimed(make: Callable[[], Path]) -> Iterator[Path]:
    """Yield the file or folder that ``make`` creates, locked while the block runs."""
    while True:
        path = make()
        try:
            descriptor = try_lock(path)
            break
        except HeldError:  # another process removed it as a leftover before it was locked
            continue
    try:
        yield path
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_abandoned(path: Path) -> bool:
    """Return whether ``path`` exists and is unlocked; False if locks are not supported."""
    try:
        descriptor = try_lock(path)
    except HeldError:
        return False
    if descriptor is None:
        return False
    os.close(descriptor)
    return True


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove the unlocked files and folders in ``folder`` that match ``pattern``."""
    for path in folder.glob(pattern):
        try:
            descriptor = try_lock(path)
        except HeldError:
            continue
        if descriptor is None:
            continue
        try:
            with suppress(OSError):  # files of another user cannot be removed
                _remove(path)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield an empty temporary folder for the block.

    It is removed when the block ends, or by the next call if the process is killed.
    """
    prefix, suffix = _SCRATCH
    remove_leftovers(Path(tempfile.gettempdir()), f"{prefix}????????{suffix}")
    with claimed(lambda: Path(tempfile.mkdtemp(suffix, prefix))) as folder:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
