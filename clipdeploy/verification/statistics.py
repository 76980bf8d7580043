"""What the logits of an artifact say beside the reference's, accumulated batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Accuracy", "Fidelity", "FidelityMeter", "top_k_hits"]


@dataclass(frozen=True)
class Accuracy:
    """Percent of images whose label is the first (``top1``) or among the first five (``top5``)."""

    top1: float
    top5: float


@dataclass(frozen=True)
class Fidelity:
    """Logits of an artifact against the reference's on the same images.

    ``sqnr_db`` is 10 log10(sum reference^2 / sum (reference - artifact)^2) over all logits,
    ``None`` where they are equal; ``cosine`` the smallest over the images; ``agreement`` percent
    of images with the same first answer; ``lost`` and ``gained`` count the images that only the
    reference, or only the artifact, gets right.
    """

    images: int
    max_abs: float
    mean_abs: float
    cosine: float
    sqnr_db: float | None
    agreement: float
    finite: bool
    accuracy: Accuracy | None
    reference_accuracy: Accuracy | None
    lost: int = 0
    gained: int = 0

    @property
    def drop(self) -> float | None:
        """Percentage points of top-1 lost against the reference; negative is a gain."""
        if self.accuracy is None or self.reference_accuracy is None:
            return None
        return self.reference_accuracy.top1 - self.accuracy.top1


def top_k_hits(logits: NDArray[np.float32], labels: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """For each image, whether its label is among the ``k`` largest logits, (B,) bool.

    A label tied with others counts as ranked behind them, so that constant logits score nothing.
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    rank = (logits >= own).sum(axis=1) - 1
    hits: NDArray[np.bool_] = (rank < k) & np.isfinite(own[:, 0])
    return hits


class FidelityMeter:
    """Adds up one artifact's batches; ``result`` at the end."""

    def __init__(self) -> None:
        self._images = 0
        self._logits = 0
        self._max_abs = self._sum_abs = self._signal = self._noise = 0.0
        self._cosine = 1.0
        self._agree = 0
        self._finite = True
        self._labelled = True
        self._hits = np.zeros(4, np.int64)
        self._lost = self._gained = 0

    def add(
        self,
        logits: NDArray[np.float32],
        reference: NDArray[np.float32],
        labels: NDArray[np.int64] | None,
    ) -> None:
        """One batch: logits and reference (B, K) float32, labels (B,) or None."""
        ours, theirs = logits.astype(np.float64), reference.astype(np.float64)
        self._images += len(ours)
        self._logits += ours.size
        self._finite = self._finite and bool(np.isfinite(ours).all())
        difference = np.abs(ours - theirs)
        self._max_abs = max(self._max_abs, float(difference.max()))
        self._sum_abs += float(difference.sum())
        self._signal += float((theirs**2).sum())
        self._noise += float((difference**2).sum())
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        cosine = (ours * theirs).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
        self._cosine = min(self._cosine, float(cosine.min()))
        self._agree += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
        if labels is None:
            self._labelled = False
            return
        hits = [
            top_k_hits(values, labels, k)
            for values, k in ((logits, 1), (logits, 5), (reference, 1), (reference, 5))
        ]
        self._hits += [int(hit.sum()) for hit in hits]
        self._lost += int((hits[2] & ~hits[0]).sum())
        self._gained += int((hits[0] & ~hits[2]).sum())

    def result(self) -> Fidelity:
        """The figures over everything added."""
        count = max(self._images, 1)
        percent = [100.0 * int(hits) / count for hits in self._hits]
        sqnr = 10 * math.log10(self._signal / self._noise) if self._noise > 0 else None
        return Fidelity(
            images=self._images,
            max_abs=self._max_abs,
            mean_abs=self._sum_abs / max(self._logits, 1),
            cosine=self._cosine,
            sqnr_db=sqnr,
            agreement=100.0 * self._agree / count,
            finite=self._finite,
            accuracy=Accuracy(percent[0], percent[1]) if self._labelled else None,
            reference_accuracy=Accuracy(percent[2], percent[3]) if self._labelled else None,
            lost=self._lost,
            gained=self._gained,
        )
