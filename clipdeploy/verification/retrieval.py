"""Searches the images for PyTorch's nearest neighbours, with an artifact's embeddings.

    n(x) = argmax_y cos(r(x), r(y)),  y != x
    rank(x) = max over g in (a, r) of #{y: cos(a(x), g(y)) >= cos(a(x), g(n(x)))},  y not x or n(x)
    recall@k = share of images with rank(x) < k

r are PyTorch's embeddings and a the artifact's. The neighbour must be found among the artifact's
own embeddings, as in an index that it made, and among PyTorch's, as in an index made before: an
artifact that turns all embeddings alike finds it only among its own. PyTorch finds its own
neighbours; those that are not distinct from others count as not found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from clipdeploy.verification.distinct import distinct_records
from clipdeploy.verification.metrics import NEIGHBOURS
from clipdeploy.verification.records import Answer, ImageRecord, Outcome
from clipdeploy.verification.result import Baseline
from clipdeploy.verification.results import Results

__all__ = ["check_search", "searched", "with_retrieval"]

# Percent of the images whose neighbours may be no nearer than others: copies that differ in a few
# pixels have some.
_MOST_ALIKE = 1.0
_BLOCK = 512
# Cosines that differ by less are equal, in float32 with D up to 1024 (about 8 units of rounding).
_TIE = 1e-6

Rows = NDArray[np.float32]
Ranks = NDArray[np.int64]


def searched(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Return the records that were searched for: those with an answer of the reference."""
    return [record for record in records if record.reference.top]


def with_retrieval(results: Results) -> Results:
    """Return the results of an embedding model with the neighbours as answers.

    A class is then an image: ``class_names`` are the names of the images that were searched, the
    first answer is the nearest of them, and ``rank`` is as above. Copies of images are not
    searched. Other results, and those that have answers, are returned as they are.
    """
    if results.run_key.task != "embedding" or results.run_key.class_names:
        return results
    gallery = [r for r in distinct_records(results.records).records if r.embedding]
    names = tuple(record.name for record in gallery)
    if not gallery:
        return results
    answered = dict(zip(names, _answered(gallery), strict=True))
    batches = tuple(
        replace(batch, records=tuple(answered.get(r.name, r) for r in batch.records))
        for batch in results.batches
    )
    run_key = replace(results.run_key, class_names=names)
    return replace(results, run_key=run_key, batches=batches)


def _answered(gallery: Sequence[ImageRecord]) -> list[ImageRecord]:
    theirs = _unit([record.embedding for record in gallery])
    nearest, _ = _search(theirs, theirs, None)
    _, ties = _search(theirs, theirs, nearest, margin=_TIE)
    reference = _answers(nearest, ties)
    lanes = [
        _found(_unit([record.outcomes[lane].embedding for record in gallery]), theirs, nearest)
        for lane in range(len(gallery[0].outcomes))
    ]
    return [
        _with_answers(record, answer, answers)
        for record, answer, *answers in zip(gallery, reference, *lanes, strict=True)
    ]


def _with_answers(record: ImageRecord, answer: Answer, answers: Sequence[Answer]) -> ImageRecord:
    outcomes: tuple[Outcome, ...] = tuple(
        msgspec.structs.replace(outcome, answer=own)
        for outcome, own in zip(record.outcomes, answers, strict=True)
    )
    return msgspec.structs.replace(record, reference=answer, outcomes=outcomes)


def _unit(embeddings: Sequence[bytes]) -> Rows:
    """Decode the embeddings and give them length 1; NaN for those without a length."""
    rows = np.frombuffer(b"".join(embeddings), "<f4").reshape(len(embeddings), -1)
    with np.errstate(all="ignore"):
        wide = rows.astype(np.float64)
        unit: Rows = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)
    return unit


def _found(ours: Rows, theirs: Rows, wanted: Ranks) -> list[Answer]:
    nearest, own = _search(ours, ours, wanted)
    _, among_theirs = _search(ours, theirs, wanted)
    lost = (own < 0) | (among_theirs < 0)
    return _answers(nearest, np.where(lost, -1, np.maximum(own, among_theirs)))


def _answers(nearest: Ranks, ranks: Ranks) -> list[Answer]:
    return [
        Answer((index,) if index >= 0 else (), rank if rank >= 0 else None)
        for index, rank in zip(nearest.tolist(), ranks.tolist(), strict=True)
    ]


def _search(
    queries: Rows, gallery: Rows, wanted: Ranks | None, *, margin: float = 0.0
) -> tuple[Ranks, Ranks]:
    """The nearest other image of each query, and how many others are as near as ``wanted``.

    Query i is image i of the gallery, which is not searched for itself. -1 where a cosine is NaN.
    """
    count = len(queries)
    nearest, ranks = np.full(count, -1), np.full(count, -1)
    for start in range(0, count, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, count))
        with np.errstate(all="ignore"):
            cosines = queries[rows] @ gallery.T
        cosines[rows - start, rows] = -np.inf
        sound = ~np.isnan(queries[rows]).any(axis=1) & (count > 1)
        best = np.where(np.isnan(cosines), -np.inf, cosines).argmax(axis=1)
        nearest[rows] = np.where(sound, best, -1)
        if wanted is not None:
            own = cosines[rows - start, wanted[rows]]
            found = (cosines >= (own - np.float32(margin))[:, None]).sum(axis=1) - 1
            ranks[rows] = np.where(sound & (wanted[rows] >= 0), found, -1)
    return nearest, ranks


def check_search(answers: Sequence[Answer]) -> Baseline:
    """Check that PyTorch's embeddings distinguish the images; ``answers`` as of a search.

    Nothing is published that a search could be compared with.
    """
    lost = sum(not answer.right(NEIGHBOURS) for answer in answers)
    if 100 * lost > _MOST_ALIKE * len(answers):
        return Baseline(
            "implausible",
            f"PyTorch's embeddings of {lost:,} of {len(answers):,} images equal those of many "
            "others: the weights or the preprocessing are wrong",
        )
    return Baseline(
        "unpublished",
        "PyTorch is the reference; export --probe compares it with your framework",
    )
