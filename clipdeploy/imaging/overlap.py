"""Images that two folders share, by their bytes.

Only files of one size can be the same, so that of a large folder a few are read.  An image that was
saved again is found once it is decoded, see :mod:`clipdeploy.imaging.fingerprints`.
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
    """The names of those of ``second`` that ``first`` holds too, whatever they are called there.

    A file that cannot be read is shared with none: whoever uses it will say so.
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
