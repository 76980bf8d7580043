"""Decoded crops on disk, so that an image is decoded once; and whatever else is made from content.

A crop is found by the SHA-256 of its file's bytes, and that hash by a stamp of the file's state: a
second run opens no image.  Each preprocessing has a folder of shards of its own; what decides a
crop's pixels is in the folder's name: the size and kind of crop, the code of
:mod:`clipdeploy.imaging.preprocess`, and the versions of Pillow and its codecs.  Whatever is
damaged or cut short is decoded again, see :mod:`clipdeploy.imaging.crop_shards`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import __version__ as pillow_version
from PIL import features

from clipdeploy.cache import cache_folder
from clipdeploy.imaging import preprocess
from clipdeploy.imaging.crop_shards import (
    NO_STAMP,
    ROW_BYTES,
    ShardReader,
    ShardWriter,
    Spot,
    read_rows,
    remove,
    size_of,
)
from exporters.artifact import Preprocess
from exporters.errors import UsageError

__all__ = ["CropCache", "CropShelf", "Shelf", "Stamps"]

T = TypeVar("T", bound=np.generic)

_FORMAT = 1
_LIMIT_BYTES = 32 << 30
_SHARD_BYTES = 256 << 20
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
        self._root = root
        self._name = os.path.realpath(root)
        self._archive = None if root.is_dir() else root.stat()

    def of(self, name: str) -> bytes:
        """The stamp of a file; zeros if it is gone, or was changed just now."""
        try:
            state = self._archive or os.stat(self._root / name)
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

    One process writes through it, others have their own.  ``problem`` says why arrays are no
    longer kept; empty while they are.
    """

    def __init__(self, cache: CropCache, name: str, shape: tuple[int, ...], dtype: type[T]) -> None:
        """``name`` is the folder's: whatever else decides the arrays is to be in it."""
        self.problem = ""
        self._cache = cache
        self._shape, self._dtype = shape, np.dtype(dtype)
        self._bytes = math.prod(shape) * self._dtype.itemsize
        self._folder = cache.folder / name
        self._hashes: dict[bytes, bytes] = {}
        self._spots: dict[bytes, Spot] = {}
        self._used: set[Path] = set()
        self._open: dict[Path, ShardReader] = {}
        self._writer: ShardWriter | None = None
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
        key = bytes.fromhex(sha256)
        spot = self._spots.get(key)
        if spot is None:
            return None
        reader = self._reader(spot.shard)
        data = reader.read(spot, self._bytes) if reader else None
        if data is None:
            self._spots.pop(key, None)
            return None
        return np.frombuffer(data, self._dtype).reshape(self._shape)

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

    def put(self, stamp: bytes, sha256: str, array: NDArray[T]) -> None:
        """Keep an array; where disk or cache are full it is not kept, and ``problem`` says so."""
        key = bytes.fromhex(sha256)
        known = key in self._spots
        if self.problem or (known and (stamp == NO_STAMP or self._hashes.get(stamp) == key)):
            return
        try:
            writer = self._shard_with_room()
            if writer is not None:
                self._note(stamp, key, writer.append(stamp, key, None if known else array))
        except OSError as error:
            self.problem = f"{self._folder} cannot be written: {error.strerror or error}"

    def _shard_with_room(self) -> ShardWriter | None:
        if self._writer is not None and self._writer.has_room(self._bytes):
            return self._writer
        self.close()
        one, limit = self._bytes + ROW_BYTES, self._cache.limit_bytes
        wanted = max(one, min(_SHARD_BYTES, limit // 8))
        room = self._cache.make_room(wanted, self._used)
        if room < one:
            self.problem = f"{self._cache.folder} is full, {limit} bytes are allowed"
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


class CropShelf(Shelf[np.uint8]):
    """The crops, uint8 (S, S, 3), of one preprocessing; close it after use."""

    def __init__(self, cache: CropCache, spec: Preprocess) -> None:
        super().__init__(cache, _shelf_name(spec), (spec.size, spec.size, 3), np.uint8)


def _shelf_name(spec: Preprocess) -> str:
    decides = {
        "format": _FORMAT,
        "crop": [spec.size, spec.crop_pct, spec.crop_mode, spec.exif_orientation],
        "code": hashlib.sha256(Path(preprocess.__file__).read_bytes()).hexdigest(),
        "pillow": pillow_version,
        "codecs": [features.version_codec(codec) for codec in ("jpg", "zlib", "libtiff")],
        "webp": features.version_module("webp"),
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
