"""Each row of the table in the docstring of ``verdicts``, and their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from clipdeploy.verification.baseline import Expected
from clipdeploy.verification.disagreements import disagreements_of
from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.result import Verification
from clipdeploy.verification.results import Results
from clipdeploy.verification.verdicts import judge_results
from exporters.errors import DatasetError, UsageError

Make = Callable[..., Results]
One = Callable[..., ImageRecord]
# 500 images without a difference prove a drop below 0.8 points.
COUNT = 500


def asked(results: Results, **changes: Any) -> Results:
    """The same results of an artifact of which something else is said."""
    (graph,) = results.question.artifacts
    question = replace(results.question, artifacts=(replace(graph, **changes),))
    return replace(results, question=question)


def verdict(result: Verification) -> str:
    (row,) = result.rows
    assert result.passed == (row.verdict == "equivalent")
    return row.verdict


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    [
        (0, 0, "equivalent"),
        (0, 20, "equivalent"),
        (2, 2, "undecided"),
        (5, 0, "undecided"),
        (20, 0, "regressed"),
    ],
)
def test_the_interval_of_the_drop(
    lost: int, gained: int, expected: str, made: Make, one: One
) -> None:
    records = [
        one(i, reference=i >= gained, artifacts=(i < gained or i >= gained + lost,))
        for i in range(COUNT)
    ]
    result = judge_results(made(records), 1.0, Expected("none"))
    assert verdict(result) == expected
    drop = result.rows[0].drop
    assert drop is not None
    assert (drop.b, drop.c) == (lost, gained)
    # The same records and a drop that is allowed.
    assert verdict(judge_results(made(records), 50.0, Expected("none"))) == "equivalent"


def test_one_logit_that_is_no_number_is_enough(made: Make, one: One) -> None:
    results = made([one(i, finite=i != 77) for i in range(COUNT)])
    result = judge_results(results, 100.0)
    assert verdict(result) == "regressed"
    assert result.rows[0].reason == "logits are NaN or infinite"
    # Before all else: neither random weights nor missing labels excuse it.
    for excuse in ({"random_weights": True}, {"labelled": False}):
        spoilt = replace(results, question=replace(results.question, **excuse))
        assert verdict(judge_results(spoilt, 100.0)) == "regressed"


def test_what_did_not_run(made: Make, one: One) -> None:
    results = asked(made([one(i, artifacts=()) for i in range(COUNT)]), runner="", why_not="no GPU")
    result = judge_results(results, 100.0)
    assert verdict(result) == "not executed"
    assert result.rows[0].reason == "no GPU"
    assert result.rows[0].fidelity is None


def test_lanes_are_those_that_ran(made: Make, one: One) -> None:
    """The artifact in the middle did not run: the last one keeps its own figures."""
    results = made([one(i, artifacts=(True, False)) for i in range(COUNT)])
    (graph,) = results.question.artifacts
    three = (graph, replace(graph, runner="", why_not="no GPU"), graph)
    results = replace(results, question=replace(results.question, artifacts=three))
    result = judge_results(results, 1.0)
    assert [row.verdict for row in result.rows] == ["equivalent", "not executed", "regressed"]
    assert not result


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"random_weights": True}, "random weights"),
        ({"labelled": False}, "images without labels"),
    ],
)
def test_no_accuracy_no_verdict(changes: dict[str, Any], reason: str, made: Make, one: One) -> None:
    labelled = changes.get("labelled", True)
    results = made([one(i, labelled=labelled) for i in range(COUNT)], **changes)
    result = judge_results(results, 100.0)
    assert verdict(result) == "not judged"
    assert reason in result.rows[0].reason
    assert result.reference is None
    assert result.rows[0].fidelity is not None


def test_emulated_float16_is_never_proven(made: Make, one: One) -> None:
    result = judge_results(asked(made([one(i) for i in range(COUNT)]), emulated=True), 100.0)
    assert verdict(result) == "not judged"
    assert "computed in float32" in result.rows[0].reason


def test_a_baseline_that_fails_holds_every_verdict_back(made: Make, one: One) -> None:
    results = made([one(i, reference=i > 50, artifacts=(i > 50,)) for i in range(COUNT)])
    result = judge_results(results, 100.0)
    assert result.baseline.status == "missed"
    assert verdict(result) == "not judged"
    assert result.rows[0].reason.startswith("the baseline failed: ")
    # What it rests on is shown all the same.
    assert result.rows[0].drop is not None
    # The user may expect that.
    assert verdict(judge_results(results, 100.0, Expected("user", 89.8))) == "equivalent"


def test_nobody_vouches(made: Make, one: One) -> None:
    result = judge_results(asked(made([one(i) for i in range(COUNT)]), vouched=False), 1.0)
    assert verdict(result) == "equivalent"
    assert result.rows[0].reason.endswith("; no passport vouches for this file")


def test_a_sequential_run_is_judged_by_the_anytime_interval(made: Make, one: One) -> None:
    records = [one(i) for i in range(COUNT)]
    # One look at 500 images proves one point; any look at them needs more.
    assert verdict(judge_results(made(records), 1.0)) == "equivalent"
    result = judge_results(made(records, sequential=1.0), 1.0)
    assert verdict(result) == "undecided"
    assert "anytime interval" in result.rows[0].reason


def test_no_artifact_is_no_pass(made: Make, one: One) -> None:
    result = judge_results(made([one(i, artifacts=()) for i in range(COUNT)], artifacts=()), 1.0)
    assert not result


def test_nothing_read_and_no_such_limit(made: Make, one: One) -> None:
    with pytest.raises(DatasetError, match="not one image of digits could be read"):
        judge_results(made([]), 1.0)
    with pytest.raises(UsageError, match="largest drop of 101"):
        judge_results(made([one(0)]), 101.0)


def test_images_that_are_there_twice_are_told(made: Make, one: One) -> None:
    twin = replace_name(one(0), "9/twin.png")
    result = judge_results(made([one(0), one(1), twin], problems=("odd",)), 1.0)
    assert result.problems == (
        "odd",
        "1 images have the bytes of another one: 9/twin.png is 0/0.png",
    )


def replace_name(record: ImageRecord, name: str) -> ImageRecord:
    return ImageRecord(name, *(getattr(record, f) for f in record.__struct_fields__[1:]))


def test_disagreements_come_with_the_largest_difference_first(made: Make, one: One) -> None:
    records = [one(i, artifacts=(i % 3 > 0,), finite=i != 6) for i in range(10)]
    found = disagreements_of(records, 0)
    assert [each.name for each in found] == ["6/6.png", "0/0.png", "3/3.png", "9/9.png"]
    assert found[0].max_abs is None
    assert (found[1].label, found[1].reference, found[1].artifact) == (0, 0, 1)
