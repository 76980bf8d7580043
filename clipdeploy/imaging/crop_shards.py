"""Read and write the crop cache's shards, which one process appends to and any process reads.

    NAME.items    item 0, item 1, ...    of one size: a crop, uint8 (S, S, 3), or float32 logits
    NAME.rows     140 bytes each: stamp 16 | sha256 32 | XXH3-128 of the item 16 | note 64
                                  | slot | magic | CRC-32 of all of these

An item is written before its row, so a killed run leaves a valid, shorter shard.  Rows with a wrong
CRC-32 and items with a wrong XXH3-128 are ignored.
"""

from __future__ import annotations

import itertools
import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

__all__ = [
    "NO_NOTE",
    "NO_STAMP",
    "ROW_BYTES",
    "Row",
    "ShardReader",
    "ShardWriter",
    "Spot",
    "read_rows",
    "remove",
    "size_of",
]

_MAGIC = 0x50435244
_NOTE_BYTES = 64
_ROW = struct.Struct(f"<16s32s16s{_NOTE_BYTES}sII")
_CRC = struct.Struct("<I")
ROW_BYTES = _ROW.size + _CRC.size
NO_STAMP = bytes(16)
NO_NOTE = bytes(_NOTE_BYTES)
_NO_DIGEST = bytes(16)
# The slot of a row without an item, which only maps a stamp to a SHA-256.
_NO_ITEM = 0xFFFFFFFF
_COUNTER = itertools.count()


class Spot(NamedTuple):
    """An item's position (``.items`` file and index), XXH3-128 and note."""

    shard: Path
    slot: int
    digest: bytes
    note: bytes


class ShardReader:
    """An open ``.items`` file; it stays readable if the shard is removed.

    It is closed with its last reference, because other threads may be reading it.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        # Missing if the file could not be opened.
        if hasattr(self, "_file"):
            os.close(self._file)

    def read(self, spots: Sequence[Spot], into: NDArray[Any]) -> list[bool]:
        """Read n consecutive items into ``into``, C-contiguous (n, ...).

        Returns which of them are undamaged; the content of the others is undefined.
        """
        # Not memory-mapped: truncating a mapped file would kill the process.
        size = into.nbytes // len(spots)
        try:
            got = _pread_into(self._file, into.data.cast("B"), spots[0].slot * size)
        except OSError:  # a broken disk or a lost network share
            got = 0
        return [
            (number + 1) * size <= got and xxhash.xxh3_128_digest(item.data) == spot.digest
            for number, (spot, item) in enumerate(zip(spots, into, strict=True))
        ]


def _pread_into(file: int, into: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file, [into], offset)
    data = os.pread(file, len(into), offset)
    into[: len(data)] = data
    return len(data)


class Row(NamedTuple):
    """A row: a file's stamp, its SHA-256, and the position of its item, if stored."""

    stamp: bytes
    sha256: bytes
    spot: Spot | None


def read_rows(path: Path) -> Iterator[Row]:
    """The undamaged rows of a ``.rows`` file; none if the file is missing."""
    try:
        data = path.read_bytes()
    except OSError:  # another process removed it
        return
    items = path.with_suffix(".items")
    for start in range(0, len(data) - ROW_BYTES + 1, ROW_BYTES):
        row = data[start : start + _ROW.size]
        stamp, sha256, digest, note, slot, magic = _ROW.unpack(row)
        if magic == _MAGIC and _CRC.unpack_from(data, start + _ROW.size)[0] == zlib.crc32(row):
            spot = None if slot == _NO_ITEM else Spot(items, slot, digest, note)
            yield Row(stamp, sha256, spot)


def size_of(items: Path) -> int:
    """The size in bytes of the shard with this ``.items`` file."""
    size = 0
    for path in (items, items.with_suffix(".rows")):
        with suppress(OSError):
            size += path.stat().st_size
    return size


def remove(items: Path) -> None:
    """Remove a shard; ignore errors, such as missing files or permissions."""
    for path in (items.with_suffix(".rows"), items):
        with suppress(OSError):
            path.unlink()


class ShardWriter:
    """Appends to a new shard, at most ``room`` bytes; no other process writes to it."""

    def __init__(self, folder: Path, room: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Starts with the time: of two rows with the same key, the one in the later shard is used.
        name = f"{time.time_ns():020d}-{os.getpid()}-{next(_COUNTER)}"
        self.path = folder / f"{name}.items"
        self._room = room
        self._count = 0
        self._items = open(self.path, "xb", buffering=0)  # noqa: SIM115 - closed by close()
        self._rows = open(self.path.with_suffix(".rows"), "xb", buffering=0)  # noqa: SIM115

    def has_room(self, size: int) -> bool:
        """Whether another item of ``size`` bytes fits."""
        return self._room >= size + ROW_BYTES

    def append(self, stamp: bytes, sha256: bytes, item: NDArray[Any], note: bytes) -> Spot:
        """Write an item of any shape, and its row.

        Raises:
            OSError: the disk is full.
        """
        data = np.ascontiguousarray(item).data.cast("B")
        if self._items.write(data) != data.nbytes:
            raise OSError("the disk is full")
        spot = Spot(self.path, self._count, xxhash.xxh3_128_digest(data), note)
        self._count += 1
        self._room -= data.nbytes
        self._write_row(stamp, sha256, spot.digest, note, spot.slot)
        return spot

    def append_stamp(self, stamp: bytes, sha256: bytes) -> None:
        """Write a row without an item, mapping a stamp to a SHA-256.

        Raises:
            OSError: the disk is full.
        """
        self._write_row(stamp, sha256, _NO_DIGEST, NO_NOTE, _NO_ITEM)

    def _write_row(
        self, stamp: bytes, sha256: bytes, digest: bytes, note: bytes, slot: int
    ) -> None:
        row = _ROW.pack(stamp, sha256, digest, note, slot, _MAGIC)
        if self._rows.write(row + _CRC.pack(zlib.crc32(row))) != ROW_BYTES:
            raise OSError("the disk is full")
        self._room -= ROW_BYTES

    def close(self) -> None:
        """Close both files."""
        self._items.close()
        self._rows.close()
