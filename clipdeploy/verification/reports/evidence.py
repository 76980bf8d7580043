"""Extracts from the records the error of each image, and the images with the largest errors.

SQNR of one image, over its K logits:  10 log10(sum reference^2 / sum (reference - artifact)^2)  dB
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clipdeploy.verification.records import ImageRecord, Outcome
from exporters.metrics import BROKEN_DB, ratio_db

__all__ = ["Disagreeing", "Spread", "disagreeing_of", "spread_of", "worst_images"]

# Of a box plot: ends, whiskers, box and median.
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class Spread:
    """The distribution of an artifact's SQNR per image in dB, from the worst image to the best.

    ``percentiles`` are those of ``PERCENTILES``, by nearest rank: infinite if the logits equal the
    reference's, empty without an image with finite logits. ``broken`` images have a logit that is
    NaN or infinite and are left out; of the others, ``equal`` have the reference's logits.
    """

    percentiles: tuple[float, ...]
    broken: int
    equal: int


def _sqnr(signal: float, noise: float) -> float:
    db = ratio_db(signal, noise)
    if db is None:
        return math.inf
    return -math.inf if db == BROKEN_DB else db


def spread_of(records: Sequence[ImageRecord], lane: int) -> Spread:
    """Return the distribution of the error of the artifact with index ``lane``."""
    noises = [(record.signal, record.outcomes[lane].noise) for record in records]
    values = sorted(_sqnr(signal, noise) for signal, noise in noises if noise is not None)
    # Nearest rank: always the value of an actual image.
    ranks = (max(math.ceil(p / 100 * len(values)) - 1, 0) for p in PERCENTILES)
    found = tuple(values[rank] for rank in ranks) if values else ()
    return Spread(found, len(records) - len(values), sum(value == math.inf for value in values))


@dataclass(frozen=True)
class Disagreeing:
    """Counts of images with another top-1 answer than the reference's, by who is right.

    ``lost``: only the reference; ``gained``: only the artifact; ``neither``: the rest.
    """

    images: int
    lost: int
    gained: int

    @property
    def neither(self) -> int:
        """Both are wrong, or there is no label."""
        return self.images - self.lost - self.gained


def disagreeing_of(records: Iterable[ImageRecord], lane: int) -> Disagreeing:
    """Count the disagreements of the artifact with index ``lane``."""
    pairs = [(record.reference, record.outcomes[lane].answer) for record in records]
    different = [(a, b) for a, b in pairs if a.first != b.first]
    return Disagreeing(
        len(different),
        sum(a.right() and not b.right() for a, b in different),
        sum(b.right() and not a.right() for a, b in different),
    )


def worst_images(records: Iterable[ImageRecord], most: int, least: int) -> list[ImageRecord]:
    """Return the images with the largest errors, the worst first.

    At most ``most`` images on which any artifact's top-1 answer differs from the reference's, those
    with NaN first, then by the largest logit difference. If these are fewer than ``least``, images
    with the same answer and the largest differences follow.
    """
    judged = [record for record in records if record.outcomes]
    ranked = sorted(judged, key=_by_error)
    different = [record for record in ranked if _differing(record)]
    same = [record for record in ranked if not _differing(record) and _largest(record) > 0]
    return [*different[:most], *same[: max(least - len(different), 0)]]


def _differing(record: ImageRecord) -> list[Outcome]:
    return [each for each in record.outcomes if each.answer.first != record.reference.first]


def _by_error(record: ImageRecord) -> tuple[int, float, str]:
    broken = sum(not outcome.finite for outcome in record.outcomes)
    return -broken, -_largest(record), record.name


def _largest(record: ImageRecord) -> float:
    """Return the largest difference that is finite."""
    return max(outcome.max_abs or 0.0 for outcome in record.outcomes)
