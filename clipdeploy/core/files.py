"""Writes files and folders atomically; reads and hashes regular files."""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clipdeploy.core.errors import FileError
from clipdeploy.core.leftovers import claimed, is_abandoned, remove_leftovers

__all__ = [
    "atomic_folder",
    "atomic_path",
    "check_writable",
    "file_errors",
    "open_regular",
    "read_regular",
    "restore_folders",
    "sha256_file",
    "write_atomic",
]

# Default limit for files read into memory: a ViT-B's float32 graph has 350 MB, and the limit of
# protobuf is 2 GB.
MOST_BYTES = 1 << 31
# Windows has no O_NONBLOCK, and no named pipes in its file system.
_NONBLOCK = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

_HINTS = {
    errno.ENOSPC: "the disk is full: free space, or choose another folder with --workspace",
    errno.EDQUOT: "the disk quota is exceeded: free space, or choose another --workspace",
    errno.EFBIG: "the file size limit is exceeded: raise `ulimit -f`, or free quota",
    errno.EACCES: "no permission: choose a writable folder with --workspace",
    errno.EPERM: "no permission: choose a writable folder with --workspace",
    errno.EROFS: "the file system is read-only: choose another folder with --workspace",
    errno.ENOENT: "the path does not exist: check its spelling",
    errno.ENOTDIR: "a parent of this path is a file, not a folder",
    errno.EISDIR: "this is a folder: pass a file",
    errno.ENXIO: "this is a socket or a device: pass a file",
    errno.ELOOP: "symbolic links form a loop: fix the links",
    errno.ENAMETOOLONG: "the file name is too long: use a shorter one",
}


@contextmanager
def file_errors(verb: str, path: Path) -> Iterator[None]:
    """Convert an ``OSError`` of the block to an error with ``path`` and a hint.

    Raises:
        FileError: the block raised an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = _HINTS.get(error.errno or 0, "")
        raise FileError(f"cannot {verb} {path}: {reason}", hint=hint) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to ``path`` when the block succeeds.

    A missing parent folder is created.  The file is synced to disk before the rename, so a crash
    leaves either the old file or the new one.  On any exception, including ``KeyboardInterrupt``,
    the temporary file is removed; that of a killed process is removed by the next writer.

    Raises:
        FileError: no permission, no space, or a parent that is not a folder.
    """
    with _temporary(path, _new_file) as temporary:
        try:
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            # mkstemp creates private files; artifacts follow the user's umask.
            temporary.chmod(0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:  # also on Ctrl-C; raised again
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def _temporary(path: Path, make: Callable[[Path], Path]) -> Iterator[Path]:
    """Lock what ``make`` creates for ``path``; remove leftovers of killed writers."""
    with file_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path, "part")
        with claimed(lambda: make(path)) as temporary:
            yield temporary


def _sweep(path: Path, ending: str) -> None:
    remove_leftovers(path.parent, f".{glob.escape(path.name)}.????????.{ending}")


def _new_file(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    return Path(name)


def _new_folder(path: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder in the same folder; rename it to ``path`` when the block succeeds.

    Every file is synced to disk before the rename.  An existing folder is replaced, which takes two
    renames; if the process is killed between them, the old folder remains under a name that ends in
    ``.old``, see :func:`restore_folders`.  On any exception the temporary folder is removed; that
    of a killed process is removed by the next writer.

    Raises:
        FileError: no permission, no space, or a parent that is not a folder.
    """
    with _temporary(path, _new_folder) as temporary:
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as stream:
                        os.fsync(stream.fileno())
            temporary.chmod(0o777 & ~_umask())
            _replace_folder(temporary, path)
            _sweep(path, "old")
        except BaseException:  # as in atomic_path
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        return
    old = new.with_suffix(".old")
    os.rename(path, old)
    os.rename(new, path)
    with suppress(FileNotFoundError):  # another writer may have removed it as a leftover
        shutil.rmtree(old)


def restore_folders(parent: Path) -> None:
    """Restore folders in ``parent`` that a killed :func:`atomic_folder` had renamed.

    A folder is restored only if the new folder still has its temporary name.  Otherwise the process
    was killed later, when the old folder may be partly removed.

    Raises:
        FileError: no permission.
    """
    with file_errors("restore", parent):
        for old in parent.glob(".*.????????.old"):
            path = parent / old.name[1 : -len(".????????.old")]
            if not path.exists() and is_abandoned(old.with_suffix(".part")):
                os.rename(old, path)


def check_writable(path: Path) -> None:
    """Check that a file can be created at ``path``, before long work that writes it.

    A missing parent folder is created.

    Raises:
        FileError: no permission, or a parent that is not a folder.
    """
    with file_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` through :func:`atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def open_regular(path: Path) -> Iterator[io.FileIO]:
    """Open a regular file for reading, unbuffered.

    Raises:
        FileError: the file cannot be opened, or is a folder, pipe, socket or device, which could
            block or never end.
    """
    with file_errors("read", path):
        # Without O_NONBLOCK, opening a pipe blocks until it has a writer.
        descriptor = os.open(path, os.O_RDONLY | _NONBLOCK)
        with io.FileIO(descriptor) as stream:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(mode):
                raise FileError(
                    f"cannot read {path}: it is {_kind_of(mode)}, not a regular file",
                    hint="save its content as a file and pass that",
                )
            yield stream


def _kind_of(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def read_regular(path: Path, most: int = MOST_BYTES) -> bytes:
    """Read a regular file of at most ``most`` bytes.

    Raises:
        FileError: see :func:`open_regular`; or the file is larger.
    """
    with open_regular(path) as stream, file_errors("read", path):
        if os.fstat(stream.fileno()).st_size > most:
            raise FileError(
                f"cannot read {path}: it has more than {most:,} bytes, too many for its type",
                hint="check the path",
            )
        # The stated size is not used: it is 0 for files in /proc.
        return stream.read()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hex.

    Raises:
        FileError: the file cannot be read, or is not a regular file.
    """
    with open_regular(path) as stream, file_errors("read", path):
        return hashlib.file_digest(stream, "sha256").hexdigest()
