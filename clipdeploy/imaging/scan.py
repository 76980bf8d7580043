"""Scan images for unreadable files and duplicates before a long run.

Only headers are read, and whole files if several have the same size.  An image that is truncated
after its header is found only when it is decoded.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from clipdeploy.core.errors import DatasetError
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.imaging.archives import Reader, unreadable
from clipdeploy.imaging.decoding import usable_cores
from clipdeploy.imaging.images import ImageEntry, ImageFolder
from clipdeploy.imaging.preprocess import open_image
from clipdeploy.imaging.survey import Reading

__all__ = ["file_sizes", "scan_images"]

# Threads per core: most of the time is spent waiting for the disk.
_THREADS = 4


def file_sizes(images: ImageFolder) -> list[int]:
    """The size of every image in bytes; -1 if the file is missing."""
    if not images.root.is_dir():
        return [entry.place.size if entry.place else -1 for entry in images.entries]
    found = []
    # A string: creating a Path for each file takes longer than its stat.
    prefix = os.path.join(images.root, "")
    for entry in images.entries:
        size = -1
        with suppress(OSError):  # reading the file reports the error
            size = os.stat(prefix + entry.name).st_size
        found.append(size)
    return found


def _scan(images: ImageFolder, reader: Reader, entry: ImageEntry, *, whole: bool) -> str:
    """Check an image's header; return the file's SHA-256 if it is read ``whole``, else ""."""
    where = f"{images.root}/{entry.name}"
    if images.root.is_dir() and not whole:
        try:
            with open(images.root / entry.name, "rb") as stream:
                open_image(stream, where)
        except OSError as error:
            raise unreadable(f"the image {where}", str(error.strerror)) from error
        return ""
    data = reader.read(entry.name, entry.place)
    open_image(io.BytesIO(data), where)
    return hashlib.sha256(data).hexdigest() if whole else ""


def scan_images(images: ImageFolder, progress: Progress = SILENT) -> Reading:
    """Find images with an unreadable header, and images with equal bytes."""
    sizes = file_sizes(images)
    counts = Counter(sizes)
    reading, reader = Reading(), images.reader()

    def one(entry: ImageEntry, size: int) -> str | DatasetError:
        try:
            return _scan(images, reader, entry, whole=counts[size] > 1)
        except DatasetError as error:
            return error

    try:
        with (
            ThreadPoolExecutor(_THREADS * usable_cores()) as pool,
            progress.task("scan the images", len(sizes)) as advance,
        ):
            results: Iterator[str | DatasetError] = pool.map(one, images.entries, sizes)
            for entry, result in zip(images.entries, results, strict=True):
                if isinstance(result, DatasetError):
                    reading.add_unreadable(entry.name)
                elif result:
                    reading.add(entry.name, result)
                advance(1)
    finally:
        reader.close()
    return reading
