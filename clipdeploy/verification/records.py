"""Defines the record of an image: the answers, and the errors of each artifact's logits.

Every number depends on one image alone, so that shards, resumed runs and single runs give the same
records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["GALLERY", "Answer", "ImageId", "ImageRecord", "Leak", "Outcome", "measure_images"]

_KEPT_ANSWERS = 5
# The images whose embeddings are kept, the first in the random order, so that they can be searched:
# it bounds the file, 4 D bytes for each image and artifact. The interval of a recall is then at
# most 2 points wide.
GALLERY = 10_000

Leak = Literal["", "near", "same"]

Logits = NDArray[np.float32]


class Answer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A classifier's answer to an image.

    ``top`` are the classes of the five largest logits, the largest first, without NaN. ``rank`` is
    the number of other logits that are at least as large as the label's, so that the label is among
    the first k if rank < k: a tie counts against the label, and constant logits score nothing.
    ``rank`` is None without a label, and if the label's logit is NaN or infinite.
    """

    top: tuple[int, ...]
    rank: int | None

    @property
    def first(self) -> int | None:
        """The top-1 class, None if all logits are NaN."""
        return self.top[0] if self.top else None

    def right(self, k: int = 1) -> bool:
        """Return whether the label is among the first ``k`` answers."""
        return self.rank is not None and self.rank < k


class Outcome(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The errors of an artifact's logits of an image against the reference's.

    ``max_abs`` and ``sum_abs`` are of the absolute differences over the classes, ``noise`` is the
    sum of their squares. These metrics and ``cosine`` are None if a logit is NaN or infinite.
    ``embedding`` is the output of an embedding model, little-endian float32; empty if it is not
    kept, and for a classifier.
    """

    answer: Answer
    max_abs: float | None
    sum_abs: float | None
    noise: float | None
    cosine: float | None
    embedding: bytes = b""

    @property
    def finite(self) -> bool:
        """False if a logit is NaN or infinite."""
        return self.noise is not None


class ImageId(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Identifies an image by its name, the hex SHA-256 of its file, and its crop's fingerprint.

    ``pixels`` is the hash of the decoded crop in hex, ``thumbnail`` its 64 grey means, see
    :mod:`clipdeploy.imaging.fingerprints`.
    """

    name: str
    sha256: str
    pixels: str
    thumbnail: bytes


class ImageRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An image, its class, and each classifier's answer.

    ``leak`` is ``same`` if an artifact was calibrated on this image, ``near`` if on one that looks
    almost the same, else empty; ``signal`` is the sum of the reference's squared logits;
    ``outcomes`` are in the order of the artifacts. ``embedding`` is the reference's, as in
    :class:`Outcome`. An embedding has no answers: :mod:`clipdeploy.verification.retrieval` adds
    those of a search.
    """

    image: ImageId
    label: int | None
    leak: Leak
    signal: float
    reference: Answer
    outcomes: tuple[Outcome, ...]
    embedding: bytes = b""

    @property
    def name(self) -> str:
        """The image's path inside its folder or archive."""
        return self.image.name

    @property
    def sha256(self) -> str:
        """The SHA-256 of the image's file in hex."""
        return self.image.sha256


# The answers to a batch, and the embeddings to keep.
_Answered = tuple[list[Answer], list[bytes]]


def _answers(logits: Logits, labels: Sequence[int | None]) -> list[Answer]:
    # NumPy sorts NaN as the largest value; here it is not an answer.
    numbers = ~np.isnan(logits)
    order = np.argsort(-np.where(numbers, logits, -np.inf), axis=1, kind="stable")[
        :, :_KEPT_ANSWERS
    ]
    own = np.take_along_axis(logits, np.asarray([[label or 0] for label in labels]), axis=1)
    ranks = (logits >= own).sum(axis=1) - 1
    columns = (order, np.take_along_axis(numbers, order, axis=1), ranks, np.isfinite(own[:, 0]))
    answers = []
    for label, top, sound, rank, known in zip(labels, *(c.tolist() for c in columns), strict=True):
        classes = (
            top
            if all(sound)
            else [index for index, is_number in zip(top, sound, strict=True) if is_number]
        )
        answers.append(Answer(tuple(classes), rank if known and label is not None else None))
    return answers


def _outcomes(
    logits: Logits, reference: Logits, answers: Sequence[Answer], embeddings: Sequence[bytes]
) -> list[Outcome]:
    ours, theirs = logits.astype(np.float64), reference.astype(np.float64)
    with np.errstate(all="ignore"):  # NaN and infinity are recorded as None
        difference = np.abs(ours - theirs)
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        cosine = (ours * theirs).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
        columns = (difference.max(axis=1), difference.sum(axis=1), (difference**2).sum(axis=1))
    finite = np.isfinite(np.concatenate([ours, theirs], axis=1)).all(axis=1).tolist()
    metrics = np.stack([*columns, cosine], axis=1).tolist()
    made = []
    for answer, sound, values, embedding in zip(answers, finite, metrics, embeddings, strict=True):
        largest, summed, noise, similarity = values if sound else (None,) * 4
        made.append(Outcome(answer, largest, summed, noise, similarity, embedding))
    return made


def _of_classifier(logits: Logits, labels: Sequence[int | None]) -> _Answered:
    return _answers(logits, labels), [b""] * len(logits)


def _of_embeddings(rows: Logits, *, kept: bool) -> _Answered:
    texts = [row.astype("<f4").tobytes() if kept else b"" for row in rows]
    return [Answer((), None)] * len(rows), texts


def measure_images(
    images: Sequence[ImageId],
    labels: Sequence[int | None],
    leaks: Sequence[Leak],
    reference: Logits,
    artifacts: Sequence[Logits],
    keep_embeddings: bool | None = None,
) -> list[ImageRecord]:
    """Return the records of one batch of B images.

    Args:
        images: B images.
        labels: B classes, None for an image without a label.
        leaks: B, whether an artifact was calibrated on the image.
        reference: (B, K) float32.
        artifacts: (B, K) float32 of each artifact.
        keep_embeddings: whether the records keep the rows, which are embeddings; None for logits.
    """

    def answered(rows: Logits) -> _Answered:
        if keep_embeddings is None:
            return _of_classifier(rows, labels)
        return _of_embeddings(rows, kept=keep_embeddings)

    with np.errstate(all="ignore"):
        signal = np.nan_to_num((reference.astype(np.float64) ** 2).sum(axis=1))
    by_artifact = [_outcomes(each, reference, *answered(each)) for each in artifacts]
    return [
        ImageRecord(image, label, leak, float(power), answer, tuple(outcomes), embedding)
        for image, label, leak, power, answer, embedding, *outcomes in zip(
            images, labels, leaks, signal, *answered(reference), *by_artifact, strict=True
        )
    ]
