"""Decoded crops on disk, so that an image is decoded once; and whatever else is made from content.

A crop is found by the SHA-256 of its file's bytes, and that hash by a stamp of the file's state: a
second run opens no image.  Each preprocessing has a folder of shards of its own; what decides a
crop's pixels is in the folder's name, see :mod:`clipdeploy.imaging.keys`.  Whatever is damaged or
cut short is decoded again, see :mod:`clipdeploy.imaging.crop_shards`.
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

# Of the shards.
_FORMAT = 2
_LIMIT_BYTES = 32 << 30
_SHARD_BYTES = 256 << 20
# Crops that are read at once.
_READ_BYTES = 16 << 20
# Shards that are open to be read, well below the 1024 files that a process may usually open.
_MOST_OPEN = 64
# A file changed less than this ago may change again within one tick of its file system's clock,
# two seconds on FAT: its state does not stand for its content yet.
_SETTLED_NS = 2_000_000_000


class Stamps:
    """Sixteen bytes that stand for a file in its present state.

    A hash of path, name, size, mtime and ctime: nobody can set a ctime back, so that a file put in
    the place of another one is noticed even if it has the other's size and mtime.
    """

    def __init__(self, root: Path) -> None:
        """``root`` is a folder, or an archive: then its own state stands for each member's."""
        # A text: making a Path of each file takes longer than its stat.
        self._prefix = os.path.join(root, "")
        self._name = os.path.realpath(root)
        self._archive = None if root.is_dir() else root.stat()

    def of(self, name: str) -> bytes:
        """The stamp of a file; zeros if it is gone, or was changed just now."""
        try:
            state = self._archive or os.stat(self._prefix + name)
        except OSError:  # reading it will say why
            return NO_STAMP
        if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) < _SETTLED_NS:
            return NO_STAMP
        parts = (self._name, name, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        return hashlib.blake2b(repr(parts).encode("utf-8", "replace"), digest_size=16).digest()


@dataclass(frozen=True)
class CropCache:
    """The crops under ``folder`` and what was computed from them, at most ``limit_bytes``.

    Where room is needed the shards that were not used for longest go; what this run used stays.
    Runs at the same time may each pass the limit by one shard (an eighth of it, 256 MiB at most).

    Raises:
        UsageError: a limit below zero.
    """

    folder: Path
    limit_bytes: int = _LIMIT_BYTES

    def __post_init__(self) -> None:
        if self.limit_bytes < 0:
            raise UsageError(f"a crop cache of {self.limit_bytes} bytes", hint="0 keeps none")

    def problem(self, spec: Preprocess) -> str:
        """Why no further crop of this preprocessing can be kept, as a sentence; empty if one can.

        Known without a run: the limit is too low, or the folder has no space or cannot be written.
        """
        return self.too_small(_crop_bytes(spec)) or self._unwritable(_crop_bytes(spec))

    def too_small(self, item_bytes: int) -> str:
        """Why nothing of this many bytes each is kept or read, as a sentence; empty if it is."""
        if self.limit_bytes >= item_bytes + ROW_BYTES:
            return ""
        if self.limit_bytes == 0:
            return "nothing is cached: the cache's limit is 0 bytes"
        return (
            f"nothing is cached: the cache's limit is {self.limit_bytes} bytes, "
            f"one crop takes {item_bytes + ROW_BYTES}"
        )

    def _unwritable(self, item_bytes: int) -> str:
        there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        if not there.is_dir():
            return f"nothing is cached: {there} is no folder"
        if not os.access(there, os.W_OK | os.X_OK):
            return f"nothing is cached: {there} cannot be written"
        if (free := shutil.disk_usage(there).free) < item_bytes + ROW_BYTES:
            return f"nothing is cached: the disk of {there} has {free} bytes left"
        return ""

    @classmethod
    def default(cls, limit_bytes: int = _LIMIT_BYTES) -> CropCache:
        """The cache in ``$CLIPDEPLOY_HOME/crops``, else in ``~/.cache/clipdeploy/crops``."""
        return cls(cache_folder() / "crops", limit_bytes)

    def open(self, spec: Preprocess) -> CropShelf:
        """The crops of one preprocessing; close it after use."""
        return CropShelf(self, spec)

    def shards(self) -> list[Path]:
        """The ``.items`` file of every shard, the one that was not used for longest first."""
        aged = []
        for path in self.folder.glob("*/*.items"):
            with suppress(OSError):  # another process removed it
                aged.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(aged)]

    def size(self) -> int:
        """Bytes of all shards on disk."""
        return sum(map(size_of, self.shards()))

    def make_room(self, wanted: int, keep: set[Path]) -> int:
        """Remove shards, but none of ``keep``, until ``wanted`` bytes fit; the bytes that do."""
        total = self.size()
        for shard in self.shards():
            if total + wanted <= self.limit_bytes:
                break
            if shard not in keep:
                total -= size_of(shard)
                remove(shard)
        return min(wanted, self.limit_bytes - total)


class Shelf(Generic[T]):
    """Arrays of one shape and type by the SHA-256 of what they were made from.

    One process writes through it, others have their own.  ``problem`` says in a sentence why
    arrays are no longer kept; empty while they are.  A cache whose limit is below one array gives
    none either, whatever earlier runs kept.
    """

    def __init__(self, cache: CropCache, name: str, shape: tuple[int, ...], dtype: type[T]) -> None:
        """``name`` is the folder's: whatever else decides the arrays is to be in it."""
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
        """The hex SHA-256 of the file that had this stamp, if it is known."""
        found = self._hashes.get(stamp)
        return found.hex() if found else None

    def get(self, sha256: str) -> NDArray[T] | None:
        """The array with this key, None if it is not here or damaged."""
        arrays, (spot,) = self.read([sha256])
        return None if spot is None else arrays[0]

    def read(self, keys: Sequence[str | None]) -> tuple[NDArray[T], list[Spot | None]]:
        """The arrays with n keys, (n, ...), and where they are kept.

        None for each that is not here, damaged, or has no key: in its place is any content.
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
        """The shard, opened once; None if it is gone."""
        reader = self._open.get(shard)
        if reader is None:
            try:
                reader = ShardReader(shard)
            except OSError:  # another process removed it
                return None
            if len(self._open) >= _MOST_OPEN:
                self._open.clear()
            self._open[shard] = reader
            self._used.add(shard)
            with suppress(OSError):  # a cache that may only be read is of use too
                os.utime(shard)
        return reader

    def put(self, stamp: bytes, sha256: str, array: NDArray[T], note: bytes = NO_NOTE) -> None:
        """Keep an array; where disk or cache are full it is not kept, and ``problem`` says so.

        ``note``: 64 bytes that are kept with it.
        """
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
                f"nothing more is cached: {self._cache.folder} is full, {limit} bytes are allowed"
            )
            return None
        self._writer = ShardWriter(self._folder, room)
        self._used.add(self._writer.path)
        return self._writer

    def close(self) -> None:
        """End the shard that was being written, and let go of those that were read."""
        self._open.clear()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _runs(spots: Sequence[Spot | None]) -> Iterator[tuple[int, int]]:
    """Start and end of each run of items that follow each other in one shard."""
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
    """The crops, uint8 (S, S, 3), of one preprocessing; close it after use."""

    def __init__(self, cache: CropCache, spec: Preprocess) -> None:
        super().__init__(cache, _shelf_name(spec), (spec.size, spec.size, 3), np.uint8)
        # A power of two, as batches are: a batch's crops then come of one read.
        self.together = min(64, 1 << int(math.log2(max(1, _READ_BYTES // _crop_bytes(spec)))))

    def find(self, sha256: str) -> tuple[NDArray[np.uint8], Fingerprint] | None:
        """The crop of a file and its fingerprint, None if it is not here or damaged."""
        return self.find_all([sha256])[0]

    def find_all(
        self, sha256s: Sequence[str | None]
    ) -> list[tuple[NDArray[np.uint8], Fingerprint] | None]:
        """:meth:`find` for each; crops that are kept one behind the other lie so in memory too."""
        arrays, spots = self.read(sha256s)
        # Both hashes are XXH3-128: the pixels are hashed once, to see that they are undamaged.
        return [
            None if spot is None else (arrays[at], Fingerprint(spot.digest.hex(), spot.note))
            for at, spot in enumerate(spots)
        ]

    def keep(
        self, stamp: bytes, sha256: str, pixels: NDArray[np.uint8], found: Fingerprint
    ) -> None:
        """Keep a crop with its fingerprint, see :meth:`put`."""
        self.put(stamp, sha256, pixels, found.thumbnail)


def _crop_bytes(spec: Preprocess) -> int:
    return spec.size * spec.size * 3


def _shelf_name(spec: Preprocess) -> str:
    return digest_of({"format": _FORMAT, "pixels": pixels_key(spec)})
