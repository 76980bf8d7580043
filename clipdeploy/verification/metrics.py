"""Compares an artifact's logits with the reference's over many images.

Sums are ``math.fsum``'s, exactly rounded: they do not depend on the order of the images, nor on
how the images were split into batches or over machines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipdeploy.verification.paired import Interval, wilson_interval
from clipdeploy.verification.records import Answer, ImageId, ImageRecord, Leak, measure_images
from exporters.metrics import ratio_db

__all__ = [
    "NEIGHBOURS",
    "Accuracy",
    "Fidelity",
    "FidelityMeter",
    "Retrieval",
    "accuracy_of",
    "fidelity_of",
    "retrieval_of",
]


@dataclass(frozen=True)
class Accuracy:
    """Percent of images whose label is the top-1 answer or among the top 5.

    The intervals are Wilson's at 95 %.
    """

    top1: float
    top5: float
    top1_interval: Interval
    top5_interval: Interval


@dataclass(frozen=True)
class Fidelity:
    """Metrics of an artifact's logits against the reference's on the same images.

    ``max_abs`` and ``mean_abs`` are over all logits, ``cosine`` is the smallest of any image;
    ``sqnr_db`` is 10 log10(sum reference^2 / sum (reference - artifact)^2) over all logits, None if
    they are equal. If a logit is NaN or infinite, ``finite`` is False and these four are of the
    other images. ``agreement`` is the percentage of images with the same top-1 answer; ``lost`` and
    ``gained`` count the images that only the reference, or only the artifact, gets right;
    ``lost_top5`` and ``gained_top5`` the same for a label among the top 5.
    """

    images: int
    max_abs: float
    mean_abs: float
    cosine: float
    sqnr_db: float | None
    agreement: float
    finite: bool
    accuracy: Accuracy | None
    lost: int = 0
    gained: int = 0
    lost_top5: int = 0
    gained_top5: int = 0

    @property
    def drop(self) -> float | None:
        """Percentage points of top-1 lost against the reference; negative is a gain."""
        return None if self.accuracy is None else 100.0 * (self.lost - self.gained) / self.images


# The nearest images that are looked at to judge an embedding model.
NEIGHBOURS = 10


@dataclass(frozen=True)
class Retrieval:
    """Percent of ``images`` whose nearest neighbour is among the artifact's 1, 5 and 10 nearest.

    ``interval`` is Wilson's at 95 % of ``recall10``.
    """

    images: int
    recall1: float
    recall5: float
    recall10: float
    interval: Interval


def retrieval_of(answers: Sequence[Answer]) -> Retrieval:
    """Return the recalls of one or more answers of a search.

    See :mod:`clipdeploy.verification.retrieval`.
    """
    count = len(answers)
    found = [sum(answer.right(k) for answer in answers) for k in (1, 5, NEIGHBOURS)]
    one, five, ten = (100.0 * each / count for each in found)
    return Retrieval(count, one, five, ten, wilson_interval(found[-1], count))


def accuracy_of(answers: Sequence[Answer]) -> Accuracy:
    """Return the accuracy of one or more answers to labelled images."""
    count = len(answers)
    hits = [sum(answer.right(k) for answer in answers) for k in (1, 5)]
    intervals = [wilson_interval(each, count) for each in hits]
    return Accuracy(100.0 * hits[0] / count, 100.0 * hits[1] / count, *intervals)


def fidelity_of(
    records: Sequence[ImageRecord], artifact: int, classes: int, *, labelled: bool
) -> Fidelity:
    """Return the metrics of the artifact with this index, over one or more images.

    ``classes`` is the number of logits of an image.
    """
    outcomes = [record.outcomes[artifact] for record in records]
    sound = [
        (record.signal, outcome)
        for record, outcome in zip(records, outcomes, strict=True)
        if outcome.finite
    ]
    signal = math.fsum(power for power, _ in sound)
    noise = math.fsum(outcome.noise or 0.0 for _, outcome in sound)
    ours = [outcome.answer for outcome in outcomes]
    theirs = [record.reference for record in records]
    pairs = list(zip(theirs, ours, strict=True))
    return Fidelity(
        images=len(records),
        max_abs=max((outcome.max_abs or 0.0 for _, outcome in sound), default=0.0),
        mean_abs=math.fsum(o.sum_abs or 0.0 for _, o in sound) / max(len(sound) * classes, 1),
        cosine=min((o.cosine for _, o in sound if o.cosine is not None), default=0.0),
        sqnr_db=ratio_db(signal, noise),
        agreement=100.0 * sum(a.first == b.first for a, b in pairs) / len(records),
        finite=len(sound) == len(records),
        accuracy=accuracy_of(ours) if labelled else None,
        lost=sum(a.right() and not b.right() for a, b in pairs),
        gained=sum(b.right() and not a.right() for a, b in pairs),
        lost_top5=sum(a.right(5) and not b.right(5) for a, b in pairs),
        gained_top5=sum(b.right(5) and not a.right(5) for a, b in pairs),
    )


class FidelityMeter:
    """Accumulates batches of logits and the reference's; ``result`` returns the metrics."""

    def __init__(self) -> None:
        self._records: list[ImageRecord] = []
        self._classes = 0

    def add(
        self,
        logits: NDArray[np.float32],
        reference: NDArray[np.float32],
        labels: NDArray[np.int64] | None,
    ) -> None:
        """Add a batch: logits and reference (B, K) float32, labels (B,) int64 or None."""
        count, self._classes = logits.shape
        classes = [None] * count if labels is None else labels.tolist()
        no_leak: list[Leak] = [""] * count
        nameless = [ImageId("", "", "", b"")] * count
        self._records += measure_images(nameless, classes, no_leak, reference, [logits])

    def result(self) -> Fidelity:
        """Return the metrics over everything added, which must be at least one image."""
        labelled = all(record.label is not None for record in self._records)
        return fidelity_of(self._records, 0, self._classes, labelled=labelled)
