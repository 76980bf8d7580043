"""Cache decoded crops, and other arrays computed from them, on disk.

A crop's key is the SHA-256 of its file's bytes, which is found by a stamp of the file's state: a
second run opens no image.  Each preprocessing has a folder of shards, named by everything that
determines the pixels, see :mod:`clipdeploy.imaging.keys`.  Damaged or truncated entries are
ignored and decoded again, see :mod:`clipdeploy.imaging.crop_shards`.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.buffers import Buffers
from clipdeploy.core.cache import cache_folder
from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import Preprocess
from clipdeploy.imaging.crop_shards import (
    NO_NOTE,
    NO_STAMP,
    ROW_BYTES,
    ShardReader,
    ShardWriter,
    Spot,
    read_rows,
    remove,
    size_of,
)
from clipdeploy.imaging.fingerprints import Fingerprint
from clipdeploy.imaging.keys import digest_of, pixels_key

__all__ = ["CropCache", "CropShelf", "Shelf", "Stamps", "pixels_key"]

T = TypeVar("T", bound=np.generic)

# Version of the shard format.
_FORMAT = 2
_LIMIT_BYTES = 32 << 30
_SHARD_BYTES = 256 << 20
# Size of one read.
_READ_BYTES = 16 << 20
# Shards open for reading, well below the usual limit of 1024 open files per process.
_MAX_OPEN = 64
# A file changed more recently than this may change again within one tick of the file system's
# clock (two seconds on FAT), so its state does not identify its content yet.
_SETTLED_NS = 2_000_000_000


class Stamps:
    """Computes 16-byte stamps that identify a file in its current state.

    A stamp is a hash of path, name, size, mtime and ctime.  The ctime cannot be set back, so a
    replaced file is noticed even if size and mtime are equal.
    """

    def __init__(self, root: Path) -> None:
        """``root`` is a folder, or an archive, whose state then applies to every member."""
        # A string: creating a Path for each file takes longer than its stat.
        self._prefix = os.path.join(root, "")
        self._name = os.path.realpath(root)
        self._archive = None if root.is_dir() else root.stat()

    def of(self, name: str) -> bytes:
        """The stamp of a file; zeros if it is missing or was changed in the last two seconds."""
        try:
            state = self._archive or os.stat(self._prefix + name)
        except OSError:  # reading the file reports the error
            return NO_STAMP
        if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) < _SETTLED_NS:
            return NO_STAMP
        parts = (self._name, name, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        return hashlib.blake2b(repr(parts).encode("utf-8", "replace"), digest_size=16).digest()


@dataclass(frozen=True)
class CropCache:
    """A disk cache of crops and arrays computed from them, at most ``limit_bytes`` in size.

    The least recently used shards are removed first; shards used by this run are kept.  Concurrent
    runs may each exceed the limit by one shard (an eighth of the limit, at most 256 MiB).

    Raises:
        UsageError: the limit is negative.
    """

    folder: Path
    limit_bytes: int = _LIMIT_BYTES

    def __post_init__(self) -> None:
        if self.limit_bytes < 0:
            raise UsageError(
                f"the crop cache's limit is {self.limit_bytes} bytes, which is negative",
                hint="use 0 to disable the cache",
            )

    def problem(self, spec: Preprocess) -> str:
        """A sentence on why no crop of this preprocessing can be stored, empty if it can.

        Checks the limit, the disk space and the folder's permissions.
        """
        return self.too_small(_crop_bytes(spec)) or self._unwritable(_crop_bytes(spec))

    def too_small(self, item_bytes: int) -> str:
        """A sentence if the limit is below one item of this size, else empty."""
        if self.limit_bytes >= item_bytes + ROW_BYTES:
            return ""
        if self.limit_bytes == 0:
            return "nothing is cached: the cache's limit is 0 bytes"
        return (
            f"nothing is cached: the cache's limit is {self.limit_bytes} bytes, "
            f"but one crop takes {item_bytes + ROW_BYTES}"
        )

    def _unwritable(self, item_bytes: int) -> str:
        there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        if not there.is_dir():
            return f"nothing is cached: {there} is not a folder"
        if not os.access(there, os.W_OK | os.X_OK):
            return f"nothing is cached: {there} cannot be written"
        if (free := shutil.disk_usage(there).free) < item_bytes + ROW_BYTES:
            return f"nothing is cached: the disk of {there} has only {free} bytes free"
        return ""

    @classmethod
    def default(cls, limit_bytes: int = _LIMIT_BYTES) -> CropCache:
        """The cache in ``$CLIPDEPLOY_HOME/crops``, else in ``~/.cache/clipdeploy/crops``."""
        return cls(cache_folder() / "crops", limit_bytes)

    def open(self, spec: Preprocess) -> CropShelf:
        """Open the crops of one preprocessing; the caller closes them."""
        return CropShelf(self, spec)

    def shards(self) -> list[Path]:
        """The ``.items`` file of every shard, least recently used first."""
        aged = []
        for path in self.folder.glob("*/*.items"):
            with suppress(OSError):  # another process removed it
                aged.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(aged)]

    def size(self) -> int:
        """The size of all shards in bytes."""
        return sum(map(size_of, self.shards()))

    def make_room(self, wanted: int, keep: set[Path]) -> int:
        """Remove shards, except ``keep``, until ``wanted`` bytes fit; return the bytes that fit."""
        total = self.size()
        for shard in self.shards():
            if total + wanted <= self.limit_bytes:
                break
            if shard not in keep:
                total -= size_of(shard)
                remove(shard)
        return min(wanted, self.limit_bytes - total)


class Shelf(Generic[T]):
    """Stores arrays of one shape and dtype by the SHA-256 of their source.

    Each process opens its own shelf.  ``problem`` is a sentence on why arrays are not stored,
    empty while they are.  If the cache's limit is below one array, none is read either.
    """

    def __init__(self, cache: CropCache, name: str, shape: tuple[int, ...], dtype: type[T]) -> None:
        """Open the arrays of ``shape`` and ``dtype`` in the folder ``name``.

        ``name`` has to identify everything, apart from the source, that determines the arrays.
        """
        self._cache = cache
        self._shape, self._type = shape, dtype
        self._bytes = math.prod(shape) * np.dtype(dtype).itemsize
        self._buffers = Buffers(keep=2)
        self.problem = cache.too_small(self._bytes)
        self._folder = cache.folder / name
        self._hashes: dict[bytes, bytes] = {}
        self._spots: dict[bytes, Spot] = {}
        self._used: set[Path] = set()
        self._open: dict[Path, ShardReader] = {}
        self._writer: ShardWriter | None = None
        if self.problem:
            return
        for path in sorted(self._folder.glob("*.rows")):
            for row in read_rows(path):
                self._note(*row)

    def __len__(self) -> int:
        return len(self._spots)

    def _note(self, stamp: bytes, sha256: bytes, spot: Spot | None) -> None:
        if stamp != NO_STAMP:
            self._hashes[stamp] = sha256
        if spot is not None:
            self._spots[sha256] = spot

    def hash_of(self, stamp: bytes) -> str | None:
        """The hex SHA-256 of the file with this stamp, None if unknown."""
        found = self._hashes.get(stamp)
        return found.hex() if found else None

    def get(self, sha256: str) -> NDArray[T] | None:
        """The array with this key, None if it is missing or damaged."""
        arrays, (spot,) = self.read([sha256])
        return None if spot is None else arrays[0]

    def read(self, keys: Sequence[str | None]) -> tuple[NDArray[T], list[Spot | None]]:
        """Read the arrays with n keys, (n, ...), and their positions in shards.

        The position is None if the key is None or the array is missing or damaged; its content is
        then undefined.
        """
        known = [bytes.fromhex(key or "") for key in keys]
        spots = [self._spots.get(key) for key in known]
        if not any(spots):
            return np.empty((0, *self._shape), self._type), spots
        arrays = self._buffers.empty((len(keys), *self._shape), self._type)
        for start, end in _runs(spots):
            run = [spot for spot in spots[start:end] if spot is not None]
            reader = self._reader(run[0].shard)
            sound = reader.read(run, arrays[start:end]) if reader else [False] * len(run)
            for at in range(start, end):
                if not sound[at - start]:
                    self._spots.pop(known[at], None)
                    spots[at] = None
        return arrays, spots

    def _reader(self, shard: Path) -> ShardReader | None:
        """The open shard, None if it was removed."""
        reader = self._open.get(shard)
        if reader is None:
            try:
                reader = ShardReader(shard)
            except OSError:  # another process removed it
                return None
            if len(self._open) >= _MAX_OPEN:
                self._open.clear()
            self._open[shard] = reader
            self._used.add(shard)
            with suppress(OSError):  # a read-only cache
                os.utime(shard)
        return reader

    def put(self, stamp: bytes, sha256: str, array: NDArray[T], note: bytes = NO_NOTE) -> None:
        """Store an array and 64 bytes of ``note``; if it does not fit, set ``problem``."""
        key = bytes.fromhex(sha256)
        known = key in self._spots
        if self.problem or (known and (stamp == NO_STAMP or self._hashes.get(stamp) == key)):
            return
        try:
            writer = self._shard_with_room()
            if writer is None:
                return
            if known:
                writer.append_stamp(stamp, key)
                self._note(stamp, key, None)
            else:
                self._note(stamp, key, writer.append(stamp, key, array, note))
        except OSError as error:
            reason = error.strerror or error
            self.problem = f"nothing more is cached: {self._folder} cannot be written: {reason}"

    def _shard_with_room(self) -> ShardWriter | None:
        if self._writer is not None and self._writer.has_room(self._bytes):
            return self._writer
        self.close()
        one, limit = self._bytes + ROW_BYTES, self._cache.limit_bytes
        wanted = max(one, min(_SHARD_BYTES, limit // 8))
        room = self._cache.make_room(wanted, self._used)
        if room < one:
            self.problem = (
                f"nothing more is cached: {self._cache.folder} is full, its limit is {limit} bytes"
            )
            return None
        self._writer = ShardWriter(self._folder, room)
        self._used.add(self._writer.path)
        return self._writer

    def close(self) -> None:
        """Finish the shard being written, and close the others."""
        self._open.clear()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _runs(spots: Sequence[Spot | None]) -> Iterator[tuple[int, int]]:
    """Start and end of each run of consecutive items of one shard."""
    start = 0
    while start < len(spots):
        first, end = spots[start], start + 1
        if first is not None:
            while (
                end < len(spots)
                and (spot := spots[end]) is not None
                and spot.slot == first.slot + end - start
                and spot.shard == first.shard
            ):
                end += 1
            yield start, end
        start = end


class CropShelf(Shelf[np.uint8]):
    """Stores the crops, uint8 (S, S, 3), of one preprocessing."""

    def __init__(self, cache: CropCache, spec: Preprocess) -> None:
        super().__init__(cache, _shelf_name(spec), (spec.size, spec.size, 3), np.uint8)
        # A power of two, as batch sizes are, so that one read covers a batch.
        self.together = min(64, 1 << int(math.log2(max(1, _READ_BYTES // _crop_bytes(spec)))))

    def find(self, sha256: str) -> tuple[NDArray[np.uint8], Fingerprint] | None:
        """The crop of a file and its fingerprint, None if it is missing or damaged."""
        return self.find_all([sha256])[0]

    def find_all(
        self, sha256s: Sequence[str | None]
    ) -> list[tuple[NDArray[np.uint8], Fingerprint] | None]:
        """:meth:`find` for several files; consecutive crops of a shard share one array."""
        arrays, spots = self.read(sha256s)
        # Both hashes are XXH3-128, so the digest that was just verified is the fingerprint's.
        return [
            None if spot is None else (arrays[at], Fingerprint(spot.digest.hex(), spot.note))
            for at, spot in enumerate(spots)
        ]

    def keep(
        self, stamp: bytes, sha256: str, pixels: NDArray[np.uint8], found: Fingerprint
    ) -> None:
        """Store a crop with its fingerprint, see :meth:`put`."""
        self.put(stamp, sha256, pixels, found.thumbnail)


def _crop_bytes(spec: Preprocess) -> int:
    return spec.size * spec.size * 3


def _shelf_name(spec: Preprocess) -> str:
    return digest_of({"format": _FORMAT, "pixels": pixels_key(spec)})
