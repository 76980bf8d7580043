"""Find copies of images by their decoded pixels, independent of file name, format and bytes.

    pixels      XXH3-128 of the crop's bytes: equal for lossless copies
    thumbnail   8 x 8 grey means of the crop: nearly equal for lossy copies

Two pictures are near copies if the RMS difference of their thumbnails is at most ``NEAR`` grey
levels and at most ``NEAR_CONTRAST`` times the standard deviation of the flatter of the two:

    |a - b|^2 / 64  <=  min(NEAR^2, NEAR_CONTRAST^2 var(a), NEAR_CONTRAST^2 var(b))

The arithmetic is exact on integers, so the result is the same on every machine.
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

# RMS grey levels.  JPEG at quality 75 with a resize by a few percent changes the thumbnail of a
# photograph by 0.3 to 1.1 (0.4 is the rounding to whole grey levels); JPEG at quality 75 changes
# the 8 x 8 pixel digits of clip-vit-demo by at most 6.3.  The two most similar of these 700 digits
# differ by 14.
NEAR = 7.0
# Thumbnails of noise, fog or snow have little contrast, so unrelated ones differ by few grey
# levels.  Unrelated thumbnails differ by 1.4 standard deviations; 0.1 is a correlation of 0.995.
NEAR_CONTRAST = 0.1

_EDGE = 8
THUMBNAIL_BYTES = _EDGE * _EDGE
# The sum of this many bytes fits into 16 bits.
_ROWS_OF_16_BITS = 65535 // 255
# Number of thumbnails compared with their neighbours at once.
_BLOCK = 512
# The maximum float32 rounding error of a projected thumbnail (at most 8 x 255).
_ROUNDING = 0.01

Match = Literal["same", "near", ""]


class Fingerprint(NamedTuple):
    """``pixels``: hex XXH3-128 of a crop; ``thumbnail``: its 8 x 8 grey means, 64 bytes."""

    pixels: str
    thumbnail: bytes


def fingerprint(pixels: NDArray[np.uint8]) -> Fingerprint:
    """The fingerprint of a crop, uint8 (S, S, 3)."""
    pixels = np.ascontiguousarray(pixels)
    return Fingerprint(xxhash.xxh3_128_hexdigest(pixels.data), _thumbnail(pixels))


def _thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    size = pixels.shape[0]
    if size % _EDGE:
        # Cells of unequal size; below 8 pixels, neighbouring cells share a pixel.
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
    """Thumbnails prepared for comparing many at once.

    Their sums of squares and products are below 2^24, so float32 is exact here.
    """

    def __init__(self, thumbnails: NDArray[np.uint8]) -> None:
        self.values = thumbnails.astype(np.float32)
        self.squares = np.square(self.values).sum(axis=1)
        sums = thumbnails.sum(axis=1, dtype=np.int64)
        spread = self.squares - sums.astype(np.float64) ** 2 / THUMBNAIL_BYTES
        limits = np.minimum(NEAR**2 * THUMBNAIL_BYTES, NEAR_CONTRAST**2 * spread)
        # Squared distances are integers.
        self.limits = np.floor(limits).astype(np.float32)

    def near(self, rows: slice, others: _Thumbnails, columns: slice) -> NDArray[np.bool_]:
        """Which of ``rows`` are near copies of which ``columns`` of ``others``, (rows, columns)."""
        distances: NDArray[np.float32] = self.values[rows] @ others.values[columns].T
        distances *= -2
        distances += self.squares[rows, None]
        distances += others.squares[None, columns]
        near: NDArray[np.bool_] = distances <= np.minimum(
            self.limits[rows, None], others.limits[None, columns]
        )
        return near


def first_copies(
    pixels: Sequence[str], thumbnails: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each of n images, the index of the first image that it is a copy of, else its own.

    ``pixels`` are n :attr:`Fingerprint.pixels`, ``thumbnails`` uint8 (n, 64).  The first array,
    int64 (n,), counts equal pixels only.  The second also counts near copies, transitively: all
    images in a chain of near copies have the index of the chain's first image.
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
    """Join the near copies among the distinct thumbnails at ``places``."""
    thumbnails = thumbnails[places]
    # The distance along any direction is at most the full distance.  The direction of the largest
    # variance leaves the fewest neighbours to compare.
    centred = thumbnails.astype(np.float32) - thumbnails.mean(axis=0, dtype=np.float64)
    direction = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    along = centred @ direction
    order = np.argsort(along, kind="stable")
    along, places = along[order], places[order]
    sorted_ = _Thumbnails(thumbnails[order])
    reach = np.sqrt(np.maximum(sorted_.limits, 0)) + _ROUNDING
    for start in range(0, len(order), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(order)))
        last = (along[rows] + reach[rows]).max()
        columns = slice(start, int(np.searchsorted(along, last, side="right")))
        near = sorted_.near(rows, sorted_, columns)
        # Skip pairs that are already joined: most of them among thousands of frames of one film.
        near &= labels[places[rows], None] != labels[None, places[columns]]
        one, other = np.nonzero(near)
        _join(labels, places[one + start], places[other + start])


def _join(labels: NDArray[np.int64], one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
    """Merge the groups of every pair: all their members get the lowest of their labels."""
    while True:
        left, right = labels[one], labels[other]
        apart = left != right
        if not apart.any():
            return
        one, other = one[apart], other[apart]
        low = np.minimum(left[apart], right[apart])
        np.minimum.at(labels, left[apart], low)
        np.minimum.at(labels, right[apart], low)
        # A label is the index of an image whose label is lower or equal: follow to the lowest.
        while (deeper := labels[labels] != labels).any():
            labels[deeper] = labels[labels[deeper]]


class Known:
    """Images to find copies of, such as a model's calibration images."""

    def __init__(self, images: Iterable[tuple[str, Fingerprint | None]]) -> None:
        """``images`` are (hex SHA-256 of the file, fingerprint or None if unknown)."""
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
        """Match n images: ``same`` file or pixels as a known image, ``near`` copy, or ``""``.

        Without a fingerprint only the SHA-256 is compared.
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
