"""Find images with equal bytes in two folders.

Only files of equal size are read.  Images that were saved again are found by their decoded pixels,
see :mod:`clipdeploy.imaging.fingerprints`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress

from clipdeploy.core.errors import DatasetError
from clipdeploy.imaging.images import ImageFolder
from clipdeploy.imaging.scan import file_sizes

__all__ = ["shared_images"]


def shared_images(first: ImageFolder, second: ImageFolder) -> tuple[str, ...]:
    """The names of the images in ``second`` whose bytes are also in ``first``, under any name.

    Unreadable files are skipped; decoding them reports the error.
    """
    ours, theirs = file_sizes(first), file_sizes(second)
    common = set(ours) & set(theirs)
    known = {digest for _, digest in _digests(first, ours, common)}
    return tuple(name for name, digest in _digests(second, theirs, common) if digest in known)


def _digests(
    images: ImageFolder, sizes: Sequence[int], wanted: set[int]
) -> Iterator[tuple[str, bytes]]:
    reader = images.reader()
    try:
        for entry, size in zip(images.entries, sizes, strict=True):
            if size in wanted:
                with suppress(DatasetError):
                    data = reader.read(entry.name, entry.place)
                    yield entry.name, hashlib.sha256(data).digest()
    finally:
        reader.close()
