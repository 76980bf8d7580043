"""Temporary files and folders whose writer may be killed: the next one removes what it left.

A writer holds a lock (``flock``) on what it writes, and the kernel lets go of it when the process
ends, however it ends.  What nobody holds was left by the dead.  Where the file system knows no such
locks nothing is ever removed.
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

# No name that a person would give: what is called so and held by nobody is removed.
_SCRATCH = (".clipdeploy-scratch-", ".part")


class HeldError(Exception):
    """Somebody else holds it."""


class RemovedError(HeldError):
    """It is not there, or no longer the same file: its last holder has removed it."""


def try_lock(path: Path) -> int | None:
    """A descriptor that holds ``path`` until it is closed; None where there are no locks.

    Two of them exclude each other in one process as well.

    Raises:
        HeldError: somebody else was first, or (RemovedError) has removed it.
    """
    if sys.platform == "win32":
        return None
    # NFS locks only what is open for writing, and folders cannot be.
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
    """Yield the file or folder that ``make`` makes, and hold it while the block runs."""
    while True:
        path = make()
        try:
            descriptor = try_lock(path)
            break
        except HeldError:  # between the two somebody took it for a leftover
            continue
    try:
        yield path
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_abandoned(path: Path) -> bool:
    """Whether ``path`` is there and nobody holds it; False where that cannot be told."""
    try:
        descriptor = try_lock(path)
    except HeldError:
        return False
    if descriptor is None:
        return False
    os.close(descriptor)
    return True


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove the files and folders in ``folder`` that match ``pattern`` and that nobody holds."""
    for path in folder.glob(pattern):
        try:
            descriptor = try_lock(path)
        except HeldError:
            continue
        if descriptor is None:
            continue
        try:
            with suppress(OSError):  # another user's: they have no business with it
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
    """Yield an empty folder for the block, among the system's temporary ones.

    It is removed when the block ends, or by the next call should the process be killed.
    """
    prefix, suffix = _SCRATCH
    remove_leftovers(Path(tempfile.gettempdir()), f"{prefix}????????{suffix}")
    with claimed(lambda: Path(tempfile.mkdtemp(suffix, prefix))) as folder:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
