"""The files of the crop cache: shards that one process appends to and any process reads.

    NAME.items    item 0, item 1, ...    of one size: a crop, uint8 (S, S, 3), or float32 logits
    NAME.rows     140 bytes each: stamp 16 | sha256 32 | XXH3-128 of the item 16 | note 64
                                  | slot | magic | CRC-32 of all of these

An item is written before its row, so that a killed run leaves a shorter shard.  A row that is
damaged or cut short is no row, an item whose XXH3-128 is not its row's is no item.
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
# The slot of a row that only says which content a file has.
_NO_ITEM = 0xFFFFFFFF
_COUNTER = itertools.count()


class Spot(NamedTuple):
    """Where an item lies: its ``.items`` file and its number in it; its XXH3-128 and its note."""

    shard: Path
    slot: int
    digest: bytes
    note: bytes


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

    def read(self, spots: Sequence[Spot], into: NDArray[Any]) -> list[bool]:
        """Read n items that follow each other into ``into``, C-contiguous (n, ...).

        Which of them are whole and undamaged; in place of the others lie any bytes.
        """
        # Not mapped into memory: a shard cut short under a mapping would kill the process.
        size = into.nbytes // len(spots)
        try:
            got = _pread_into(self._file, into.data.cast("B"), spots[0].slot * size)
        except OSError:  # a broken disk, a network that is gone
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
        stamp, sha256, digest, note, slot, magic = _ROW.unpack(row)
        if magic == _MAGIC and _CRC.unpack_from(data, start + _ROW.size)[0] == zlib.crc32(row):
            spot = None if slot == _NO_ITEM else Spot(items, slot, digest, note)
            yield Row(stamp, sha256, spot)


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

    def append(self, stamp: bytes, sha256: bytes, item: NDArray[Any], note: bytes) -> Spot:
        """Write an item, of any shape, with its row.

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
        """Write a row alone: which content a file has.

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
