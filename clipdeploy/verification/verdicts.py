"""Derives verdicts from records. It fails closed: missing evidence can only lose ``equivalent``.

a logit is NaN or infinite                    regressed
the artifact did not run                      not executed
repeated calls give other answers             not judged
random weights, no labels                     not judged
float16 was only emulated                     not judged
PyTorch itself misses its accuracy            not judged
otherwise the interval of the paired drop:    equivalent, regressed, undecided

The drop of an embedding model is that of recall@10, see :mod:`clipdeploy.verification.retrieval`;
with an SQNR below 20 dB it is regressed whatever it finds.

Copies of an image count once. ``equivalent`` needs more than the interval: it must also hold
without the images that look almost like another one, and a fault that affects whole calls must be
excluded down to the allowed drop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clipdeploy.core.errors import DatasetError
from clipdeploy.core.spans import DROP
from clipdeploy.imaging import Reading
from clipdeploy.verification.baseline import Expected, check_baseline
from clipdeploy.verification.disagreements import disagreements_of
from clipdeploy.verification.distinct import Distinct, distinct_records
from clipdeploy.verification.metrics import (
    NEIGHBOURS,
    Fidelity,
    accuracy_of,
    fidelity_of,
    retrieval_of,
)
from clipdeploy.verification.paired import DropJudgement, judge_drop
from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.repeatability import Repeatability, repeatability_of
from clipdeploy.verification.result import (
    Baseline,
    Row,
    Verdict,
    Verification,
)
from clipdeploy.verification.results import ArtifactEntry, Results, RunKey
from clipdeploy.verification.retrieval import check_search, searched, with_retrieval

__all__ = ["Limits", "judge_results"]

_WORST = 12
# Noise of 1 % of an embedding's power moves its cosine with another one by up to 0.1.
_LEAST_DB = 20.0
# From best to worst: the worse of two verdicts on one artifact counts.
_RANK: tuple[Verdict, ...] = ("equivalent", "undecided", "regressed")


@dataclass(frozen=True)
class Limits:
    """Percentage points that an artifact may lose, of top-1 and, unless None, of top-5.

    For an embedding model, ``top1`` is the limit of recall@10.

    Raises:
        UsageError: a limit is outside 0 to 100.
    """

    top1: float = 1.0
    top5: float | None = None

    def __post_init__(self) -> None:
        DROP.check(self.top1, "--max-drop")
        DROP.or_none.check(self.top5, "--max-top5-drop")


@dataclass(frozen=True)
class _Drops:
    """The drops of one artifact, and the verdict on them."""

    main: DropJudgement
    top5: DropJudgement | None
    verdict: Verdict
    reason: str


def _judged(lost: int, gained: int, images: int, limit: float, run_key: RunKey) -> DropJudgement:
    anytime = run_key.sequential is not None
    return judge_drop(lost, gained, images, limit, anytime=anytime)


def _drops(
    fidelity: Fidelity, unlike: Fidelity, repeats: Repeatability, run_key: RunKey, limits: Limits
) -> _Drops:
    top1 = _judged(fidelity.lost, fidelity.gained, fidelity.images, limits.top1, run_key)
    limit5 = limits.top1 if limits.top5 is None else limits.top5
    counts5 = (fidelity.lost_top5, fidelity.gained_top5)
    top5 = _judged(*counts5, fidelity.images, limit5, run_key)
    verdict, reason = top1.verdict, top1.sentence
    if limits.top5 is not None:
        reason = f"top-1: {top1.sentence}; top-5: {top5.sentence}"
        verdict = max(top1.verdict, top5.verdict, key=_RANK.index)
    elif top5.interval.low > 0 >= top1.interval.low:
        reason += (
            f"; top-5 is proven to drop, by {top5.interval.low:.2f} to {top5.interval.high:.2f} "
            "points: pass --max-top5-drop to judge it"
        )
    if verdict == "equivalent":
        again = _judged(unlike.lost, unlike.gained, unlike.images, limits.top1, run_key)
        allowed = min(limits.top1, limit5) if limits.top5 is not None else limits.top1
        if doubts := _doubts(again, repeats, allowed):
            verdict, reason = "undecided", reason + doubts
    return _Drops(top1, top5, verdict, reason)


def _doubts(
    unlike: DropJudgement, repeats: Repeatability, allowed: float, samples: str = "images"
) -> str:
    """Return why an interval within the limit is no proof; empty if it is.

    ``unlike`` is the drop over the ``samples`` that do not look almost like another.
    """
    doubts = ""
    if unlike.verdict != "equivalent":
        doubts = f"; but only {unlike.n:,} {samples} do not look almost like another: "
        doubts += unlike.sentence
    if repeats.excluded > allowed:
        doubts += (
            f"; but of {repeats.calls:,} different calls {repeats.excluded:.2g} % could be "
            f"wrong undetected: add {samples}, which make more calls"
        )
    return doubts


def _retrieval_drops(
    fidelity: Fidelity,
    found: Distinct,
    lane: int,
    repeats: Repeatability,
    run_key: RunKey,
    limits: Limits,
) -> _Drops:
    everything, unlike = searched(found.records), searched(found.unlike)
    drop = _recall_drop(everything, lane, limits, run_key)
    verdict, reason = drop.verdict, f"recall@{NEIGHBOURS}: {drop.sentence}"
    if verdict == "equivalent":
        # The first image is among both.
        again = _recall_drop(unlike, lane, limits, run_key)
        if doubts := _doubts(again, repeats, limits.top1, f"{run_key.tower}s"):
            verdict, reason = "undecided", reason + doubts
    if fidelity.sqnr_db is not None and fidelity.sqnr_db < _LEAST_DB:
        verdict = "regressed"
        reason = (
            f"the embeddings have an SQNR of {fidelity.sqnr_db:.1f} dB, below {_LEAST_DB:g}: "
            f"cosines with other embeddings change; {reason}"
        )
    return _Drops(drop, None, verdict, reason)


def _recall_drop(
    records: Sequence[ImageRecord], lane: int, limits: Limits, run_key: RunKey
) -> DropJudgement:
    pairs = [
        (r.reference.right(NEIGHBOURS), r.outcomes[lane].answer.right(NEIGHBOURS)) for r in records
    ]
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    return judge_drop(lost, gained, len(pairs), limits.top1, samples=f"{run_key.tower}s")


def _judge(
    fidelity: Fidelity,
    drops: _Drops | None,
    repeats: Repeatability,
    run_key: RunKey,
    entry: ArtifactEntry,
    baseline: Baseline,
) -> tuple[Verdict, str]:
    """Return the verdict on an artifact that ran, and the sentence that explains it."""
    if not fidelity.finite:
        what = "embeddings" if run_key.task == "embedding" else "logits"
        return "regressed", f"{what} are NaN or infinite"
    if not repeats:
        return "not judged", repeats.sentence
    if run_key.random_weights:
        what = "embeddings" if run_key.task == "embedding" else "logits"
        return "not judged", f"random weights have no accuracy: only {what} were compared"
    if drops is None:
        what = "logits" if run_key.task == "classification" else "embeddings"
        why = "the images have no labels" if what == "logits" else "no image was searched for"
        return "not judged", f"{why}: only {what} were compared"
    if entry.emulated:
        why = f": {entry.why_not}" if entry.why_not else ""
        return "not judged", f"float16 was computed in float32, which hides overflow{why}"
    if not baseline:
        return "not judged", f"the baseline failed: {baseline.sentence}"
    foreign = "" if entry.vouched else "; this file has no passport"
    return drops.verdict, drops.reason + foreign


def _row(
    entry: ArtifactEntry,
    lane: int,
    results: Results,
    found: Distinct,
    baseline: Baseline,
    limits: Limits,
) -> Row:
    run_key = results.run_key
    calibrated = None if entry.calibration is None else bool(entry.calibration)
    row = Row(
        artifact=entry.artifact,
        kind=entry.kind,
        precision=entry.precision,
        runner=entry.runner,
        vouched=entry.vouched,
        verdict="not executed",
        reason=entry.why_not,
        fidelity=None,
        drop=None,
        drop_top5=None,
        repeats=None,
        calibrated=calibrated,
        disagreements=0,
        worst=(),
    )
    if not entry.runner:
        return row

    def fidelity_over(records: Sequence[ImageRecord]) -> Fidelity:
        return fidelity_of(records, lane, run_key.classes, labelled=run_key.labelled)

    fidelity, repeats = fidelity_over(found.records), repeatability_of(results, lane, entry)
    retrieval = None
    if run_key.task == "embedding" and (near := searched(found.records)):
        retrieval = retrieval_of([record.outcomes[lane].answer for record in near])
        same = sum(r.outcomes[lane].answer.first == r.reference.first for r in near)
        fidelity = replace(fidelity, agreement=100.0 * same / len(near))
    drops = None
    if run_key.random_weights or not fidelity.finite:
        pass
    elif retrieval is not None:
        drops = _retrieval_drops(fidelity, found, lane, repeats, run_key, limits)
    elif run_key.labelled:
        drops = _drops(fidelity, fidelity_over(found.unlike), repeats, run_key, limits)
    verdict, reason = _judge(fidelity, drops, repeats, run_key, entry, baseline)
    different = disagreements_of(found.records, lane)
    return replace(
        row,
        verdict=verdict,
        reason=reason,
        fidelity=fidelity,
        drop=drops.main if drops else None,
        drop_top5=drops.top5 if drops else None,
        repeats=repeats,
        retrieval=retrieval,
        disagreements=len(different),
        worst=tuple(different[:_WORST]),
    )


def judge_results(
    results: Results,
    limits: float | Limits,
    expected: Expected = Expected(),
) -> Verification:
    """Return the verdict on every artifact of a finished run; ``limits`` as a number are of top-1.

    Raises:
        DatasetError: no image could be read.
        UsageError: a limit is outside 0 to 100.
    """
    limits = limits if isinstance(limits, Limits) else Limits(limits)
    results = with_retrieval(results)
    run_key, records = results.run_key, results.records
    if not records:
        raise DatasetError(
            f"no image of {results.data} could be read",
            hint="check that these files are images and that you may read them",
        )
    found = distinct_records(records)
    judged = run_key.labelled and not run_key.random_weights
    # The published accuracy of a whole set counts all its files, copies included.
    if run_key.task == "embedding":
        baseline = check_search([record.reference for record in searched(found.records)])
    else:
        baseline = check_baseline(
            [record.reference for record in records],
            run_key,
            expected,
            per_class=tuple(Counter(record.label for record in records).values()),
            different=[record.reference for record in found.records],
        )
    rows, lane = [], 0
    for entry in run_key.artifacts:
        rows.append(_row(entry, lane, results, found, baseline, limits))
        lane += bool(entry.runner)
    unknown = any(entry.calibration is None for entry in run_key.artifacts)
    matters = any(entry.calibration for entry in run_key.artifacts)
    leaks = [record.leak for record in records] if matters else []
    return Verification(
        model=run_key.model,
        data=results.data,
        images=len(found.records),
        listed=run_key.images,
        copies=found.copies,
        near_copies=found.near_copies,
        labelled=run_key.labelled,
        skipped=tuple(sorted(results.unreadable)),
        problems=(*run_key.problems, *_found_by_reading(results), *_about_copies(found, leaks)),
        leaked=None if unknown else leaks.count("same"),
        near_leaked=None if unknown else leaks.count("near"),
        random_weights=run_key.random_weights,
        class_names=run_key.class_names if run_key.task == "classification" else (),
        max_drop=limits.top1,
        max_drop_top5=limits.top5,
        sequential=run_key.sequential is not None,
        baseline=baseline,
        reference=accuracy_of([r.reference for r in found.records]) if judged else None,
        rows=tuple(rows),
        left_out=_left_out(run_key),
        passed=bool(rows) and all(row.verdict == "equivalent" for row in rows),
        task=run_key.task,
        tower=run_key.tower,
    )


def _left_out(run_key: RunKey) -> tuple[str, ...]:
    """Return the existing engines of judged graphs that were not judged themselves."""
    judged = {Path(entry.artifact) for entry in run_key.artifacts}
    engines = [path.with_suffix(".engine") for path in sorted(judged) if path.suffix == ".onnx"]
    return tuple(str(path) for path in engines if path not in judged and path.exists())


def _about_copies(found: Distinct, leaks: Sequence[str]) -> tuple[str, ...]:
    """Return sentences on copies among the images and of calibration images."""
    sentences = []
    if found.copies:
        sentences.append(
            f"{found.copies:,} images have the same pixels as another one and are counted once"
        )
    if found.near_copies:
        sentences.append(f"{found.near_copies:,} images look almost like another one")
    if near := leaks.count("near"):
        sentences.append(f"{near:,} images look almost like one that an artifact was calibrated on")
    return tuple(sentences)


def _found_by_reading(results: Results) -> tuple[str, ...]:
    """Return problems that only decoding reveals: unreadable images and duplicate files."""
    reading = Reading()
    for record in results.records:
        reading.add(record.name, record.sha256)
    for name in results.unreadable:
        reading.add_unreadable(name)
    return reading.problems()
