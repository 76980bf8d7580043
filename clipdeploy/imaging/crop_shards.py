"""The files of the crop cache: shards that one process appends to and any process reads.

    NAME.items    item 0, item 1, ...    of one size: a crop, uint8 (S, S, 3), or float32 logits
    NAME.rows     64 bytes each:  stamp 16 | sha256 32 | slot | CRC-32 of the item | magic | CRC-32

An item is written before its row, so that a killed run leaves a shorter shard.  A row that is
damaged or cut short is no row, an item whose CRC-32 is not its row's is no item.
"""

from __future__ import annotations

import itertools
import os
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
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

_MAGIC = 0x50435243
_ROW = struct.Struct("<16s32sIII")
_CRC = struct.Struct("<I")
ROW_BYTES = _ROW.size + _CRC.size
NO_STAMP = bytes(16)
# The slot of a row that only says which content a file has.
_NO_ITEM = 0xFFFFFFFF
_COUNTER = itertools.count()


class Spot(NamedTuple):
    """Where an item lies: its ``.items`` file, its number in it, and its CRC-32."""

    shard: Path
    slot: int
    crc: int


class ShardReader:
    """An open ``.items`` file.  It is closed with its last reference: other threads may be reading.

    A shard that is removed meanwhile can still be read.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        # Not there if it could not be opened.
        if hasattr(self, "_file"):
            os.close(self._file)

    def read(self, spot: Spot, size: int) -> bytes | None:
        """The ``size`` bytes of the item there, None if it is cut short or damaged."""
        # Not mapped into memory: a shard cut short under a mapping would kill the process.
        try:
            data = os.pread(self._file, size, spot.slot * size)
        except OSError:  # a broken disk, a network that is gone
            return None
        return data if len(data) == size and zlib.crc32(data) == spot.crc else None


class Row(NamedTuple):
    """What a row says: a file's stamp, its SHA-256, and where its item lies, if here."""

    stamp: bytes
    sha256: bytes
    spot: Spot | None


def read_rows(path: Path) -> Iterator[Row]:
    """The sound rows of a ``.rows`` file; none if it is gone."""
    try:
        data = path.read_bytes()
    except OSError:  # another process removed it
        return
    items = path.with_suffix(".items")
    for start in range(0, len(data) - ROW_BYTES + 1, ROW_BYTES):
        row = data[start : start + _ROW.size]
        stamp, sha256, slot, crc, magic = _ROW.unpack(row)
        if magic == _MAGIC and _CRC.unpack_from(data, start + _ROW.size)[0] == zlib.crc32(row):
            yield Row(stamp, sha256, None if slot == _NO_ITEM else Spot(items, slot, crc))


def size_of(items: Path) -> int:
    """Bytes on disk of the shard that has this ``.items`` file."""
    size = 0
    for path in (items, items.with_suffix(".rows")):
        with suppress(OSError):
            size += path.stat().st_size
    return size


def remove(items: Path) -> None:
    """Remove a shard; no error if it is gone, or may not be removed."""
    for path in (items.with_suffix(".rows"), items):
        with suppress(OSError):
            path.unlink()


class ShardWriter:
    """Appends to a new shard that nobody else writes, ``room`` bytes at most."""

    def __init__(self, folder: Path, room: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The time first: of two rows for one content, the one of the later name counts.
        name = f"{time.time_ns():020d}-{os.getpid()}-{next(_COUNTER)}"
        self.path = folder / f"{name}.items"
        self._room = room
        self._count = 0
        self._items = open(self.path, "xb", buffering=0)  # noqa: SIM115 - closed by close()
        self._rows = open(self.path.with_suffix(".rows"), "xb", buffering=0)  # noqa: SIM115

    def has_room(self, size: int) -> bool:
        """Whether one more item of ``size`` bytes fits."""
        return self._room >= size + ROW_BYTES

    def append(self, stamp: bytes, sha256: bytes, item: NDArray[Any] | None) -> Spot | None:
        """Write an item, of any shape, and its row; of None a row alone: which content a file has.

        Raises:
            OSError: the disk is full.
        """
        slot, crc = _NO_ITEM, 0
        if item is not None:
            data = np.ascontiguousarray(item).data.cast("B")
            slot, crc = self._count, zlib.crc32(data)
            if self._items.write(data) != data.nbytes:
                raise OSError("the disk is full")
            self._count += 1
            self._room -= data.nbytes
        row = _ROW.pack(stamp, sha256, slot, crc, _MAGIC)
        self._rows.write(row + _CRC.pack(zlib.crc32(row)))
        self._room -= ROW_BYTES
        return None if item is None else Spot(self.path, slot, crc)

    def close(self) -> None:
        """Close both files."""
        self._items.close()
        self._rows.close()
