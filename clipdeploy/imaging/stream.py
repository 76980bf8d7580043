"""Decode the images of a folder or archive to crops, ahead of the consumer."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.errors import DatasetError
from clipdeploy.core.passport import Preprocess
from clipdeploy.imaging.crops import CropCache, CropShelf, Stamps
from clipdeploy.imaging.decoding import Failure, Loaded, Loader, Source
from clipdeploy.imaging.fingerprints import Fingerprint
from clipdeploy.imaging.images import ImageEntry, ImageFolder
from clipdeploy.imaging.loader import open_loader
from clipdeploy.imaging.survey import Reading

__all__ = ["Crop", "Skipped", "iter_crops", "stack_batches"]

Key = TypeVar("Key")

# Images whose sizes are read to estimate the size of all.
_SAMPLED = 16


@dataclass(frozen=True)
class Crop:
    """A decoded image: its entry, the hex SHA-256 of its file, its pixels and its fingerprint.

    ``pixels`` is uint8 (S, S, 3).  From the cache it is a view of a larger array: copy it to keep
    it for long.
    """

    entry: ImageEntry
    sha256: str
    pixels: NDArray[np.uint8]
    fingerprint: Fingerprint


@dataclass
class Skipped:
    """The names of unreadable images that were skipped."""

    names: list[str] = field(default_factory=list)


def iter_crops(
    images: ImageFolder,
    spec: Preprocess,
    *,
    skipped: Skipped | None = None,
    workers: int | None = None,
    cache: CropCache | None = None,
    reading: Reading | None = None,
) -> Iterator[Crop]:
    """Decode the images in order, ahead of the consumer.

    Args:
        images: the images.
        spec: how to resize and crop.
        skipped: collects the names of unreadable images and leaves them out; without it they raise
            an error.
        workers: number of decoding processes; 0 for threads of this process, None for one process
            per core if there are many images.
        cache: reads known crops from this cache and stores the others.
        reading: collects counts and problems.

    Raises:
        DatasetError: an image cannot be read and ``skipped`` is None, or a worker died.
    """
    shelf = cache.open(spec) if cache is not None else None
    # Workers look up equal bytes under another name; with an empty cache there are none.
    source = Source(images.root, spec, cache if shelf else None)
    loader = open_loader(source, _total_bytes(images), workers, shelf)
    notes = reading if reading is not None else Reading()
    try:
        for entry, loaded in _decode_ahead(images, loader, shelf, notes):
            if isinstance(loaded, Loaded):
                notes.add(entry.name, loaded.sha256)
                yield Crop(entry, *loaded)
                continue
            notes.add_unreadable(entry.name)
            if skipped is None:
                raise DatasetError(loaded.message, hint=loaded.hint)
            skipped.names.append(entry.name)
    finally:
        loader.close()
        if shelf is not None:
            notes.cache_problem = shelf.problem
            shelf.close()


def stack_batches(
    crops: Iterable[tuple[Key, NDArray[np.uint8]]], size: int
) -> Iterator[tuple[list[Key], NDArray[np.uint8]]]:
    """Group (key, crop) pairs into batches of ``size``; the last batch may be smaller.

    Each batch is the keys of B images and their crops, uint8 (B, S, S, 3).
    """
    remaining = iter(crops)
    while batch := list(islice(remaining, size)):
        yield [key for key, _ in batch], np.stack([pixels for _, pixels in batch])


def _total_bytes(images: ImageFolder) -> float:
    """The approximate size of all images in bytes, from a sample."""
    count = len(images.entries)
    few = images.entries[:: max(1, count // _SAMPLED)]
    return count * sum(_bytes_of(images.root, entry) for entry in few) / max(1, len(few))


def _bytes_of(root: Path, entry: ImageEntry) -> int:
    if entry.place is not None:
        return entry.place.size
    try:
        return os.stat(root / entry.name).st_size
    except OSError:  # reading the file reports the error
        return 0


def _decode_ahead(
    images: ImageFolder, loader: Loader, shelf: CropShelf | None, notes: Reading
) -> Iterator[tuple[ImageEntry, Loaded | Failure]]:
    lookups = _look_up(images, shelf)
    pending: deque[tuple[ImageEntry, bytes, Loaded | None]] = deque()
    # Submit several at once: the fixed cost of a message to a worker exceeds that of its content.
    step = max(1, loader.capacity // 4)
    while True:
        if len(pending) <= loader.capacity - step:
            for found in islice(lookups, loader.capacity - len(pending)):
                if found[2] is None:
                    loader.submit(found[0].name, found[0].place)
                pending.append(found)
            loader.send()
        if not pending:
            return
        entry, stamp, cached = pending.popleft()
        result = loader.result() if cached is None else cached
        if cached is not None:
            notes.cached += 1
        elif shelf is not None and isinstance(result, Loaded):
            shelf.keep(stamp, *result)
        yield entry, result


def _look_up(
    images: ImageFolder, shelf: CropShelf | None
) -> Iterator[tuple[ImageEntry, bytes, Loaded | None]]:
    """Every image, its file's stamp, and its crop if it is cached."""
    if shelf is None:
        yield from ((entry, b"", None) for entry in images.entries)
        return
    stamps = Stamps(images.root)
    for start in range(0, len(images.entries), shelf.together):
        entries = images.entries[start : start + shelf.together]
        states = [stamps.of(entry.name) for entry in entries]
        hashes = [shelf.hash_of(stamp) for stamp in states]
        crops = shelf.find_all(hashes)
        for entry, stamp, sha256, found in zip(entries, states, hashes, crops, strict=True):
            yield entry, stamp, Loaded(sha256, *found) if sha256 and found else None
