"""Files that appear whole or not at all, and their hashes."""

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

# The largest file that is read into memory as a whole where its reader names no other bound: a
# ViT-B's graph in float32 has 350 MB, and protobuf takes no more than 2 GB.
MOST_BYTES = 1 << 31
# Windows has no such flag, and no named pipes in its file system.
_NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

_HINTS = {
    errno.ENOSPC: "the disk is full: free space, or choose another folder with --workspace",
    errno.EDQUOT: "the disk quota is used up: free space, or choose another --workspace",
    errno.EFBIG: "files may not grow this large here: raise `ulimit -f`, or free the quota",
    errno.EACCES: "no permission: choose a folder you can write with --workspace",
    errno.EPERM: "no permission: choose a folder you can write with --workspace",
    errno.EROFS: "the file system is read-only: choose another folder with --workspace",
    errno.ENOENT: "the path does not exist: check its spelling",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EISDIR: "this is a folder, a file is needed",
    errno.ENXIO: "this is a socket or a device, a file is needed",
    errno.ELOOP: "symbolic links lead in a circle",
    errno.ENAMETOOLONG: "file systems take no name as long as this",
}


@contextmanager
def file_errors(verb: str, path: Path) -> Iterator[None]:
    """Turn the block's ``OSError`` into an error that names ``path`` and the mend.

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
    """Yield a temporary path beside ``path``; give it the name once the block ends well.

    The parent folder is made if it is missing.  The data is on disk (fsync) before the rename, so
    a crash leaves either the old file or the new one.  On any exception, ``KeyboardInterrupt``
    included, the temporary file is removed; a killed process's by the next writer of ``path``.

    Raises:
        FileError: no permission, no space, or a parent that is not a folder.
    """
    with _beside(path, _new_file) as temporary:
        try:
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            # mkstemp makes files private; an artifact follows the user's umask.
            temporary.chmod(0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:  # Ctrl-C as well must leave nothing behind; it is raised again
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def _beside(path: Path, make: Callable[[Path], Path]) -> Iterator[Path]:
    """What ``make`` makes for ``path``, held; what killed writers of it have left is removed."""
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
    """Yield a temporary folder beside ``path``; give it the name once the block ends well.

    Every file is on disk (fsync) before the rename.  A folder that is already there is replaced;
    should the process be killed between the two renames that this takes, the old one lies beside
    it, under a name that ends in ``.old``.  On any exception the temporary folder is removed, and
    what a killed process has left by the next writer of ``path``.

    Raises:
        FileError: no permission, no space, or a parent that is not a folder.
    """
    with _beside(path, _new_folder) as temporary:
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
    with suppress(FileNotFoundError):  # another writer may be removing it as a leftover
        shutil.rmtree(old)


def restore_folders(parent: Path) -> None:
    """Put the folders of ``parent`` back that a killed :func:`atomic_folder` has moved aside.

    A kill between its two renames leaves no folder of the name; the new one still beside the old
    one tells that moment from later ones, when the old one may be half removed.

    Raises:
        FileError: no permission.
    """
    with file_errors("restore", parent):
        for old in parent.glob(".*.????????.old"):
            path = parent / old.name[1 : -len(".????????.old")]
            if not path.exists() and is_abandoned(old.with_suffix(".part")):
                os.rename(old, path)


def check_writable(path: Path) -> None:
    """Make sure that a file can be made at ``path``, before long work that ends with one.

    The parent folder is made if it is missing.

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
        FileError: the file cannot be opened, or is a folder, a pipe, a socket or a device: reading
            one of those may wait for ever, or never end.
    """
    with file_errors("read", path):
        # A pipe without a writer would hold a plain open() until one comes.
        descriptor = os.open(path, os.O_RDONLY | _NO_WAITING)
        with io.FileIO(descriptor) as stream:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(mode):
                raise FileError(
                    f"cannot read {path}: it is no regular file but {_kind_of(mode)}",
                    hint="save its content as a file and name that",
                )
            yield stream


def _kind_of(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def read_regular(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file of at most ``most`` bytes.

    Raises:
        FileError: see :func:`open_regular`; or it is larger.
    """
    with open_regular(path) as stream, file_errors("read", path):
        if os.fstat(stream.fileno()).st_size > most:
            raise FileError(
                f"cannot read {path}: it has more than {most:,} bytes, too many for its kind",
                hint="check that it is the file that you mean",
            )
        # All of it, whatever size is stated: it is 0 for files such as those of /proc.
        return stream.read()


def sha256_file(path: Path) -> str:
    """The hex SHA-256 of a file's bytes.

    Raises:
        FileError: the file cannot be read, or is no regular file.
    """
    with open_regular(path) as stream, file_errors("read", path):
        return hashlib.file_digest(stream, "sha256").hexdigest()
