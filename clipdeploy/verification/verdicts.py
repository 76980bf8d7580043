"""From records to verdicts.  It fails closed: whatever is missing can only lose an ``equivalent``.

a logit is NaN or infinite                    regressed
the artifact did not run                      not executed
random weights, no labels                     not judged
float16 was only emulated                     not judged
PyTorch itself misses its accuracy            not judged
otherwise the interval of the paired drop:    equivalent, regressed, undecided
"""

from __future__ import annotations

from clipdeploy.imaging import Reading
from clipdeploy.verification.baseline import Expected, check_baseline
from clipdeploy.verification.disagreements import disagreements_of
from clipdeploy.verification.figures import Fidelity, accuracy_of, fidelity_of
from clipdeploy.verification.paired import DropJudgement, judge_drop
from clipdeploy.verification.result import (
    Baseline,
    Row,
    Verdict,
    Verification,
)
from clipdeploy.verification.results import Asked, Question, Results
from exporters.errors import DatasetError

__all__ = ["judge", "judge_results"]

_WORST = 12


def judge(
    fidelity: Fidelity,
    question: Question,
    asked: Asked,
    baseline: Baseline,
    max_drop: float,
) -> tuple[Verdict, str, DropJudgement | None]:
    """The verdict on figures, the sentence that explains it, and what it rests on."""
    if not fidelity.finite:
        return "regressed", "logits are NaN or infinite", None
    if question.random_weights:
        return "not judged", "random weights: logits only, accuracy means nothing", None
    if not question.labelled:
        return "not judged", "images without labels: logits only", None
    if asked.emulated:
        return "not judged", "float16 was computed in float32, which hides overflow", None
    drop = judge_drop(
        fidelity.lost,
        fidelity.gained,
        fidelity.images,
        max_drop,
        anytime=question.sequential is not None,
    )
    if not baseline:
        return "not judged", f"the baseline failed: {baseline.sentence}", drop
    foreign = "" if asked.vouched else "; no passport vouches for this file"
    return drop.verdict, drop.sentence + foreign, drop


def _row(asked: Asked, lane: int, results: Results, baseline: Baseline, max_drop: float) -> Row:
    what = (asked.artifact, asked.kind, asked.precision, asked.runner, asked.vouched)
    if not asked.runner:
        return Row(*what, "not executed", asked.why_not, None, None, 0, ())
    question, records = results.question, results.records
    fidelity = fidelity_of(records, lane, question.classes, labelled=question.labelled)
    verdict, reason, drop = judge(fidelity, question, asked, baseline, max_drop)
    different = disagreements_of(records, lane)
    return Row(*what, verdict, reason, fidelity, drop, len(different), tuple(different[:_WORST]))


def judge_results(
    results: Results, max_drop: float, expected: Expected = Expected()
) -> Verification:
    """The verdict on every artifact of a finished run.

    Raises:
        DatasetError: not one image could be read.
        UsageError: ``max_drop`` is outside 0 to 100.
    """
    question, records = results.question, results.records
    if not records:
        raise DatasetError(
            f"not one image of {results.data} could be read", hint="look at one of them"
        )
    judged = question.labelled and not question.random_weights
    answers = [record.reference for record in records]
    accuracy = accuracy_of(answers) if judged else None
    baseline = check_baseline(answers, question, expected)
    rows, lane = [], 0
    for asked in question.artifacts:
        rows.append(_row(asked, lane, results, baseline, max_drop))
        lane += bool(asked.runner)
    return Verification(
        model=question.model,
        data=results.data,
        images=len(records),
        listed=question.images,
        labelled=question.labelled,
        skipped=results.unreadable,
        problems=(*question.problems, *_found_by_reading(results)),
        leaked=None if question.calibrated is None else sum(r.leaked for r in records),
        random_weights=question.random_weights,
        class_names=question.class_names,
        max_drop=max_drop,
        sequential=question.sequential is not None,
        baseline=baseline,
        reference=accuracy,
        rows=tuple(rows),
        passed=bool(rows) and all(row.verdict == "equivalent" for row in rows),
    )


def _found_by_reading(results: Results) -> tuple[str, ...]:
    """What only reading the images shows: unreadable ones, and some that are there twice."""
    reading = Reading()
    for record in results.records:
        reading.add(record.name, record.sha256)
    for name in results.unreadable:
        reading.add_unreadable(name)
    return reading.problems()
