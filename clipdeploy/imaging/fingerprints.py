"""Copies of an image by its decoded pixels, whatever its file's name, format or bytes.

    pixels      XXH3-128 of the crop's bytes: equal for the same picture saved without loss
    thumbnail   8 x 8 grey means of the crop: nearly equal for the same picture saved with loss

Two pictures are near copies if the RMS difference of their thumbnails is at most ``NEAR`` grey
levels and at most ``NEAR_CONTRAST`` times the standard deviation of the flatter of the two:

    |a - b|^2 / 64  <=  min(NEAR^2, NEAR_CONTRAST^2 var(a), NEAR_CONTRAST^2 var(b))

All of it is integer arithmetic on bytes, so that every machine gives the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

__all__ = [
    "NEAR",
    "NEAR_CONTRAST",
    "THUMBNAIL_BYTES",
    "Fingerprint",
    "Known",
    "Match",
    "fingerprint",
    "first_copies",
]

# RMS grey levels.  JPEG at quality 75 and a resize by a few percent move the thumbnail of a
# photograph by 0.3 to 1.1 (rounding to whole grey levels alone by 0.4), JPEG at quality 75 that of
# the 8 x 8 pixel digits of clip-vit-demo by 6.3 at most.  The two most alike of these 700 digits
# are 14 apart.
NEAR = 7.0
# Thumbnails of noise, fog or snow are flat and so a few grey levels apart whatever they show.  Two
# unrelated ones differ by 1.4 standard deviations; 0.1 is a correlation of 0.995.
NEAR_CONTRAST = 0.1

_EDGE = 8
THUMBNAIL_BYTES = _EDGE * _EDGE
# Sums of so many rows of bytes fit into 16 bits.
_ROWS_OF_16_BITS = 65535 // 255
# Thumbnails that are compared with their neighbours at once.
_BLOCK = 512
# The most that float32 rounding moves a projection of a thumbnail (at most 8 x 255).
_SLACK = 0.01

Match = Literal["same", "near", ""]


class Fingerprint(NamedTuple):
    """``pixels``: hex XXH3-128 of a crop's bytes; ``thumbnail``: its 8 x 8 grey means, 64 bytes."""

    pixels: str
    thumbnail: bytes


def fingerprint(pixels: NDArray[np.uint8]) -> Fingerprint:
    """The fingerprint of a crop, uint8 (S, S, 3)."""
    pixels = np.ascontiguousarray(pixels)
    return Fingerprint(xxhash.xxh3_128_hexdigest(pixels.data), _thumbnail(pixels))


def _thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    size = pixels.shape[0]
    if size % _EDGE:
        # Cells of unequal size; in a crop of less than 8 pixels neighbouring cells share a pixel.
        starts = np.arange(_EDGE) * size // _EDGE
        counts = np.maximum(np.diff(starts, append=size), 1)
        rows = np.add.reduceat(pixels.sum(axis=2, dtype=np.uint32), starts, axis=0)
        sums = np.add.reduceat(rows, starts, axis=1)
        weights = 3 * counts[:, None] * counts[None, :]
    else:
        edge = size // _EDGE
        wide = np.uint16 if edge <= _ROWS_OF_16_BITS else np.uint32
        rows = np.add.reduce(pixels.reshape(_EDGE, edge, 3 * size), axis=1, dtype=wide)
        sums = rows.reshape(_EDGE, _EDGE, 3 * edge).sum(axis=2, dtype=np.uint32)
        weights = 3 * edge * edge
    means: NDArray[np.uint32] = (2 * sums + weights) // (2 * weights)
    return means.astype(np.uint8).tobytes()


class _Thumbnails:
    """Thumbnails in a form in which many are compared at once.

    Squares and products of bytes add up to less than 2^24, so that float32 is exact here.
    """

    def __init__(self, thumbnails: NDArray[np.uint8]) -> None:
        self.values = thumbnails.astype(np.float32)
        self.squares = np.square(self.values).sum(axis=1)
        sums = thumbnails.sum(axis=1, dtype=np.int64)
        spread = self.squares - sums.astype(np.float64) ** 2 / THUMBNAIL_BYTES
        most = np.minimum(NEAR**2 * THUMBNAIL_BYTES, NEAR_CONTRAST**2 * spread)
        # Squared distances are whole numbers.
        self.most = np.floor(most).astype(np.float32)

    def near(self, rows: slice, others: _Thumbnails, columns: slice) -> NDArray[np.bool_]:
        """Which of ``rows`` are near copies of which ``columns`` of ``others``, (rows, columns)."""
        distances: NDArray[np.float32] = self.values[rows] @ others.values[columns].T
        distances *= -2
        distances += self.squares[rows, None]
        distances += others.squares[None, columns]
        near: NDArray[np.bool_] = distances <= np.minimum(
            self.most[rows, None], others.most[None, columns]
        )
        return near


def first_copies(
    pixels: Sequence[str], thumbnails: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each of n images the index of the first that it is a copy of, itself if of none.

    ``pixels`` are n :attr:`Fingerprint.pixels`, ``thumbnails`` uint8 (n, 64).  The first array goes
    by equal pixels.  The second by near copies as well, and from one to the next: all images that a
    chain of near copies joins have the chain's first.
    """
    first_of: dict[str, int] = {}
    same = np.fromiter(
        (first_of.setdefault(value, at) for at, value in enumerate(pixels)), np.int64, len(pixels)
    )
    labels = same.copy()
    if len(pixels) == 0:
        return same, labels
    rows = np.ascontiguousarray(thumbnails, np.uint8).reshape(len(pixels), THUMBNAIL_BYTES)
    _, first, inverse = np.unique(
        rows.view(f"V{THUMBNAIL_BYTES}")[:, 0], return_index=True, return_inverse=True
    )
    _join(labels, np.arange(len(pixels)), first[inverse])
    _join_near(labels, rows, first)
    return same, labels


def _join_near(
    labels: NDArray[np.int64], thumbnails: NDArray[np.uint8], places: NDArray[np.int64]
) -> None:
    """Join the near copies among the different thumbnails at ``places``."""
    thumbnails = thumbnails[places]
    # The distance along any direction is at most the whole distance.  Along that of the largest
    # spread the fewest neighbours are left to be compared.
    centred = thumbnails.astype(np.float32) - thumbnails.mean(axis=0, dtype=np.float64)
    direction = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    along = centred @ direction
    order = np.argsort(along, kind="stable")
    along, places = along[order], places[order]
    sorted_ = _Thumbnails(thumbnails[order])
    reach = np.sqrt(np.maximum(sorted_.most, 0)) + _SLACK
    for start in range(0, len(order), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(order)))
        last = (along[rows] + reach[rows]).max()
        columns = slice(start, int(np.searchsorted(along, last, side="right")))
        near = sorted_.near(rows, sorted_, columns)
        # Among thousands of frames of one film most pairs are joined by earlier ones already.
        near &= labels[places[rows], None] != labels[None, places[columns]]
        one, other = np.nonzero(near)
        _join(labels, places[one + start], places[other + start])


def _join(labels: NDArray[np.int64], one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
    """Give both ends of every pair, and all with the same labels, the lowest of their labels."""
    while True:
        left, right = labels[one], labels[other]
        apart = left != right
        if not apart.any():
            return
        one, other = one[apart], other[apart]
        low = np.minimum(left[apart], right[apart])
        np.minimum.at(labels, left[apart], low)
        np.minimum.at(labels, right[apart], low)
        # A label is the index of an image whose own label is lower or equal: follow to the lowest.
        while (deeper := labels[labels] != labels).any():
            labels[deeper] = labels[labels[deeper]]


class Known:
    """Images that others are compared with, such as those that a model was calibrated on."""

    def __init__(self, images: Iterable[tuple[str, Fingerprint | None]]) -> None:
        """Of each the hex SHA-256 of its file, and its fingerprint, None if that is unknown."""
        listed = list(images)
        prints = [found for _, found in listed if found is not None]
        self._files = frozenset(sha256 for sha256, _ in listed)
        self._pixels = frozenset(found.pixels for found in prints)
        self._thumbnails = _Thumbnails(_stack(prints))

    def match(self, sha256: str, found: Fingerprint | None) -> Match:
        """See :meth:`match_all`."""
        return self.match_all([sha256], [found])[0]

    def match_all(
        self, sha256s: Sequence[str], fingerprints: Sequence[Fingerprint | None]
    ) -> list[Match]:
        """``same``: a known image has the same file or the same pixels; ``near``: nearly so.

        Empty if none has, as far as fingerprints are known.
        """
        matches: list[Match] = []
        places: list[int] = []
        for sha256, found in zip(sha256s, fingerprints, strict=True):
            same = sha256 in self._files or (found is not None and found.pixels in self._pixels)
            if not same and found is not None:
                places.append(len(matches))
            matches.append("same" if same else "")
        if not len(self._thumbnails.values):
            return matches
        ours = _Thumbnails(_stack([fingerprints[at] for at in places]))
        for start in range(0, len(places), _BLOCK):
            block = slice(start, start + _BLOCK)
            near = ours.near(block, self._thumbnails, slice(None))
            for at in np.flatnonzero(near.any(axis=1)):
                matches[places[start + at]] = "near"
        return matches


def _stack(prints: Sequence[Fingerprint | None]) -> NDArray[np.uint8]:
    """Thumbnails as uint8 (n, 64)."""
    data = b"".join(found.thumbnail for found in prints if found is not None)
    return np.frombuffer(data, np.uint8).reshape(-1, THUMBNAIL_BYTES)
