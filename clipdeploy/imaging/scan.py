"""A look at every image before long work: is it one, and is it there twice?

Only headers are read, and whole files where two have one size.  An image that is cut short behind
its header shows when it is decoded.
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
from clipdeploy.imaging.archives import Reader
from clipdeploy.imaging.decoding import usable_cores
from clipdeploy.imaging.images import ImageEntry, ImageFolder
from clipdeploy.imaging.preprocess import open_image
from clipdeploy.imaging.survey import Reading

__all__ = ["file_sizes", "scan_images"]

# Most of the time goes into waiting for the disk.
_THREADS = 4


def file_sizes(images: ImageFolder) -> list[int]:
    """Bytes of every image; -1 where the file is gone."""
    if not images.root.is_dir():
        return [entry.place.size if entry.place else -1 for entry in images.entries]
    found = []
    # A text: making a Path of each file takes longer than its stat.
    prefix = os.path.join(images.root, "")
    for entry in images.entries:
        size = -1
        with suppress(OSError):  # reading it will say why
            size = os.stat(prefix + entry.name).st_size
        found.append(size)
    return found


def _look(images: ImageFolder, reader: Reader, entry: ImageEntry, *, whole: bool) -> str:
    """The SHA-256 of a file that is to be read ``whole``, else empty; the header in any case."""
    where = f"{images.root}/{entry.name}"
    if images.root.is_dir() and not whole:
        try:
            with open(images.root / entry.name, "rb") as stream:
                open_image(stream, where)
        except OSError as error:
            raise DatasetError(f"cannot read the image {where}: {error.strerror}") from error
        return ""
    data = reader.read(entry.name, entry.place)
    open_image(io.BytesIO(data), where)
    return hashlib.sha256(data).hexdigest() if whole else ""


def scan_images(images: ImageFolder, progress: Progress = SILENT) -> Reading:
    """What is unreadable at first sight, and what has the bytes of another image."""
    sizes = file_sizes(images)
    often = Counter(sizes)
    reading, reader = Reading(), images.reader()

    def one(entry: ImageEntry, size: int) -> str | DatasetError:
        try:
            return _look(images, reader, entry, whole=often[size] > 1)
        except DatasetError as error:
            return error

    try:
        with (
            ThreadPoolExecutor(_THREADS * usable_cores()) as pool,
            progress.task("look over the images", len(sizes)) as advance,
        ):
            found: Iterator[str | DatasetError] = pool.map(one, images.entries, sizes)
            for entry, what in zip(images.entries, found, strict=True):
                if isinstance(what, DatasetError):
                    reading.add_unreadable(entry.name)
                elif what:
                    reading.add(entry.name, what)
                advance(1)
    finally:
        reader.close()
    return reading
