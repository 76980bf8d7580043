"""Compares the crop cache with general-purpose caches: seconds to write and to read crops.

    pip install diskcache lmdb
    python scripts/bench/crop_cache.py [--crops 2000] [--size 224] [--repeat 5]

    shards       ``CropShelf``: one read for a run of crops, each compared with its XXH3-128
    lmdb         a transaction a batch; the crops are copied out, and not checked
    lmdb, XXH3   the same; each crop's XXH3-128 is compared, as the shards do
    diskcache    a file and a row of SQLite for each crop; not checked

Each is written once and then read in batches of 32, in the order of writing, from the operating
system's page cache.  All take turns in one run; medians are printed, and ratios to ``shards``.  A
library whose package is not installed is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from clipdeploy.core.passport import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from clipdeploy.imaging.crop_shards import NO_STAMP
from clipdeploy.imaging.crops import CropCache

Crops = NDArray[np.uint8]
BATCH = 32


def batches(keys: list[str]) -> Iterator[list[str]]:
    """Keys in batches."""
    for start in range(0, len(keys), BATCH):
        yield keys[start : start + BATCH]


class Shards:
    """The crop cache."""

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        spec = Preprocess(shape[0], IMAGENET_MEAN, IMAGENET_STD)
        self.cache = CropCache(folder), spec

    def write(self, keys: list[str], crops: Crops) -> None:
        """Write all crops."""
        cache, spec = self.cache
        shelf = cache.open(spec)
        for key, crop in zip(keys, crops, strict=True):
            shelf.put(NO_STAMP, key, crop)
        shelf.close()

    def read(self, keys: list[str]) -> int:
        """Read all crops in batches; the sum of each batch's first byte."""
        cache, spec = self.cache
        shelf = cache.open(spec)
        total = 0
        for some in batches(keys):
            arrays, spots = shelf.read(some)
            assert all(spots)
            total += int(arrays[0, 0, 0, 0])
        shelf.close()
        return total


class Lmdb:
    """LMDB, with the crops' XXH3-128 in front of them if they are ``checked``."""

    def __init__(self, folder: Path, shape: tuple[int, ...], *, checked: bool = False) -> None:
        lmdb = importlib.import_module("lmdb")
        self.shape, self.checked = shape, checked
        self.database = lmdb.open(str(folder), map_size=32 << 30)

    def write(self, keys: list[str], crops: Crops) -> None:
        """Write all crops, in a transaction a batch."""
        for start in range(0, len(keys), BATCH):
            with self.database.begin(write=True) as transaction:
                for key, crop in zip(keys[start:], crops[start : start + BATCH], strict=False):
                    data = crop.tobytes()
                    digest = xxhash.xxh3_128_digest(data) if self.checked else b""
                    transaction.put(bytes.fromhex(key), digest + data)

    def read(self, keys: list[str]) -> int:
        """See :meth:`Shards.read`."""
        into = np.empty((BATCH, *self.shape), np.uint8)
        total, skipped = 0, 16 if self.checked else 0
        for some in batches(keys):
            with self.database.begin(buffers=True) as transaction:
                for row, key in zip(into, some, strict=False):
                    item = transaction.get(bytes.fromhex(key))
                    row.data.cast("B")[:] = item[skipped:]
                    if self.checked:
                        assert xxhash.xxh3_128_digest(row.data) == bytes(item[:16])
            total += int(into[0, 0, 0, 0])
        return total


class DiskCache:
    """``diskcache.Cache``."""

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        diskcache = importlib.import_module("diskcache")
        self.shape = shape
        self.cache = diskcache.Cache(str(folder), size_limit=32 << 30)

    def write(self, keys: list[str], crops: Crops) -> None:
        """Write all crops."""
        for key, crop in zip(keys, crops, strict=True):
            self.cache[key] = crop.tobytes()

    def read(self, keys: list[str]) -> int:
        """See :meth:`Shards.read`."""
        into = np.empty((BATCH, *self.shape), np.uint8)
        total = 0
        for some in batches(keys):
            for row, key in zip(into, some, strict=False):
                row.data.cast("B")[:] = self.cache[key]
            total += int(into[0, 0, 0, 0])
        return total


CACHES: dict[str, Callable[[Path, tuple[int, ...]], Any]] = {
    "shards": Shards,
    "lmdb": Lmdb,
    "lmdb, XXH3": lambda folder, shape: Lmdb(folder, shape, checked=True),
    "diskcache": DiskCache,
}


def measure(crops: Crops, repeat: int) -> None:
    """Write and read ``crops`` with each cache in turn, and print the table."""
    keys = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(len(crops))]
    wanted = sum(int(crops[start, 0, 0, 0]) for start in range(0, len(crops), BATCH))
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(repeat):
        for name, make in CACHES.items():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    cache = make(Path(folder), crops.shape[1:])
                except ModuleNotFoundError as error:
                    print(f"left out: {name}, because {error.name} is not installed")
                    continue
                taken = seconds.setdefault(name, {"write": [], "read": []})
                started = time.perf_counter()
                cache.write(keys, crops)
                written = time.perf_counter()
                assert cache.read(keys) == wanted
                taken["write"].append(written - started)
                taken["read"].append(time.perf_counter() - written)
    print(f"{len(crops)} crops of {crops.nbytes // len(crops):,} bytes, median of {repeat}")
    print(f"{'':12}{'write s':>9}{'ratio':>7}{'read s':>9}{'ratio':>7}")
    medians = {
        name: {what: statistics.median(each) for what, each in taken.items()}
        for name, taken in seconds.items()
    }
    for name, row in medians.items():
        cells = [f"{row[what]:9.2f}{row[what] / medians['shards'][what]:7.2f}" for what in row]
        print(f"{name:12}{''.join(cells)}")


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crops", type=int, default=2000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    shape = (options.crops, options.size, options.size, 3)
    measure(np.random.default_rng(0).integers(0, 256, shape, np.uint8), options.repeat)


if __name__ == "__main__":
    main()
