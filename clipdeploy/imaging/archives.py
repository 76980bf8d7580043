"""Read files of a folder, tar or zip archive in any order, without unpacking.

:mod:`clipdeploy.imaging.listing` records each member's position, and reading it is one ``pread``.
No file position is shared, so threads and processes can read at the same time, and only the first
process reads the archive's directory.

    tar   offset of the data; the 512-byte header before it is checked on every read
    zip   offset of the local header; the directory's CRC-32 is checked on every read

Sources: POSIX.1-1988 ustar header; PKWARE APPNOTE 6.3.10, sections 4.3.7, 4.4.4 and 4.4.5.
"""

from __future__ import annotations

import os
import struct
import tarfile
import threading
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from clipdeploy.core.errors import DatasetError

__all__ = ["Place", "Reader", "TarPlace", "ZipPlace", "unreadable"]

# Larger than any image file; protects against members that would fill the memory.
_MAX_BYTES = 512 << 20
_BLOCK = 512
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 0x1
_CHANGED = "the archive has changed since it was listed"
_SEEK = threading.Lock()


def unreadable(what: str, reason: str) -> DatasetError:
    """The error for an image that cannot be read or decoded."""
    return DatasetError(
        f"cannot read {what}: {reason}", hint="repair or remove it, or pass --skip-unreadable"
    )


class Place(Protocol):
    """A member's position in its archive."""

    @property
    def size(self) -> int:
        """The unpacked size in bytes."""

    def read(self, archive: int) -> bytes:
        """Read the member from the archive's file descriptor; ``ValueError`` if damaged."""


def _too_large(size: int) -> str:
    return f"its size of {size >> 20} MiB is above the limit of {_MAX_BYTES >> 20} MiB"


def _pread(archive: int, size: int, offset: int) -> bytes:
    if size > _MAX_BYTES + _BLOCK:
        raise ValueError(_too_large(size))
    if hasattr(os, "pread"):
        data = os.pread(archive, size, offset)
    else:  # Windows: all threads share one file position
        with _SEEK:
            os.lseek(archive, offset, os.SEEK_SET)
            data = os.read(archive, size)
    if len(data) != size:
        raise ValueError("the archive is truncated")
    return data


@dataclass(frozen=True, slots=True)
class TarPlace:
    """``offset`` and ``size`` of the data in a plain tar."""

    offset: int
    size: int

    def read(self, archive: int) -> bytes:
        """See :class:`Place`."""
        # If the archive was rewritten, the offset points to other bytes.
        block = _pread(archive, _BLOCK + self.size, self.offset - _BLOCK)
        try:
            header = tarfile.TarInfo.frombuf(block[:_BLOCK], "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise ValueError(_CHANGED) from error
        if header.size != self.size:
            raise ValueError(_CHANGED)
        return block[_BLOCK:]


@dataclass(frozen=True, slots=True)
class ZipPlace:
    """A zip member's directory entry; ``offset`` is that of the local header."""

    offset: int
    size: int
    packed: int
    method: int
    flags: int
    crc: int

    def read(self, archive: int) -> bytes:
        """See :class:`Place`."""
        if self.flags & _ENCRYPTED:
            raise ValueError("it is encrypted")
        if self.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"its zip method {self.method} is neither stored nor deflated")
        magic, name, extra = _LOCAL_HEADER.unpack(_pread(archive, _LOCAL_HEADER.size, self.offset))
        if magic != b"PK\x03\x04":
            raise ValueError(_CHANGED)
        data = _pread(archive, self.packed, self.offset + _LOCAL_HEADER.size + name + extra)
        if self.method == zipfile.ZIP_DEFLATED:
            data = self._inflate(data)
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise ValueError("its CRC-32 differs from the archive's directory")
        return data

    def _inflate(self, data: bytes) -> bytes:
        if self.size > _MAX_BYTES:
            raise ValueError(_too_large(self.size))
        try:
            # One byte more than stated is enough to detect a decompression bomb.
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.size + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from error


class Reader:
    """Reads files of a folder or archive; thread-safe.  The caller closes it.

    Raises:
        DatasetError: the archive cannot be opened.
    """

    def __init__(self, root: Path, places: dict[str, Place | None] | None = None) -> None:
        """``places`` is not needed for a folder, or if each read passes the position."""
        self._root = root
        self._places = places or {}
        self._archive = -1
        if root.is_dir():
            return
        try:
            self._archive = os.open(root, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise DatasetError(f"cannot read {root}: {error.strerror}") from error

    def read(self, name: str, place: Place | None = None) -> bytes:
        """Read the bytes of ``name``.

        Raises:
            DatasetError: the file is missing, damaged or larger than 512 MiB.
        """
        try:
            if self._archive < 0:
                return self._read_file(name)
            found = place or self._places.get(name)
            if found is None:
                raise ValueError("the archive does not contain it")
            return found.read(self._archive)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise unreadable(f"{self._root}/{name}", reason) from error

    def _read_file(self, name: str) -> bytes:
        with open(self._root / name, "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > _MAX_BYTES:
                raise ValueError(_too_large(size))
            return stream.readall()

    def close(self) -> None:
        """Close the archive."""
        if self._archive >= 0:
            os.close(self._archive)
            self._archive = -1
