"""Every row of the table in the docstring of ``verdicts``, and their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from made_results import again

from clipdeploy.core.errors import DatasetError, UsageError
from clipdeploy.verification.baseline import Expected
from clipdeploy.verification.disagreements import disagreements_of
from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.repeats import Repeat
from clipdeploy.verification.result import Verification, verdict_line
from clipdeploy.verification.results import Results
from clipdeploy.verification.verdicts import Limits, judge_results

Make = Callable[..., Results]
One = Callable[..., ImageRecord]
# 500 images without a difference prove a drop below 0.8 points.
COUNT = 500


def with_entry(results: Results, **changes: Any) -> Results:
    """The same results with changes of the artifact's entry."""
    (graph,) = results.run_key.artifacts
    run_key = replace(results.run_key, artifacts=(replace(graph, **changes),))
    return replace(results, run_key=run_key)


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
    # The same records with a larger allowed drop.
    assert verdict(judge_results(made(records), 50.0, Expected("none"))) == "equivalent"


def test_one_logit_that_is_no_number_is_enough(made: Make, one: One) -> None:
    results = made([one(i, finite=i != 77) for i in range(COUNT)])
    result = judge_results(results, 100.0)
    assert verdict(result) == "regressed"
    assert result.rows[0].reason == "logits are NaN or infinite"
    # First of all: neither random weights nor missing labels excuse it.
    for excuse in ({"random_weights": True}, {"labelled": False}):
        spoilt = replace(results, run_key=replace(results.run_key, **excuse))
        assert verdict(judge_results(spoilt, 100.0)) == "regressed"


def test_what_did_not_run(made: Make, one: One) -> None:
    results = with_entry(
        made([one(i, artifacts=()) for i in range(COUNT)]), runner="", why_not="no GPU"
    )
    result = judge_results(results, 100.0)
    assert verdict(result) == "not executed"
    assert result.rows[0].reason == "no GPU"
    assert result.rows[0].fidelity is None


def test_lanes_are_those_that_ran(made: Make, one: One) -> None:
    """The artifact in the middle did not run: the last one has its own metrics."""
    results = made([one(i, artifacts=(True, False)) for i in range(COUNT)])
    (graph,) = results.run_key.artifacts
    three = (graph, replace(graph, runner="", why_not="no GPU"), graph)
    results = replace(results, run_key=replace(results.run_key, artifacts=three))
    result = judge_results(results, 1.0)
    assert [row.verdict for row in result.rows] == ["equivalent", "not executed", "regressed"]
    assert not result


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"random_weights": True}, "random weights"),
        ({"labelled": False}, "the images have no labels"),
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
    result = judge_results(with_entry(made([one(i) for i in range(COUNT)]), emulated=True), 100.0)
    assert verdict(result) == "not judged"
    assert "computed in float32" in result.rows[0].reason


def test_a_baseline_that_fails_holds_every_verdict_back(made: Make, one: One) -> None:
    results = made([one(i, reference=i > 50, artifacts=(i > 50,)) for i in range(COUNT)])
    result = judge_results(results, 100.0)
    assert result.baseline.status == "missed"
    assert verdict(result) == "not judged"
    assert result.rows[0].reason.startswith("the baseline failed: ")
    # Its drop is shown all the same.
    assert result.rows[0].drop is not None
    # The user may expect this accuracy.
    assert verdict(judge_results(results, 100.0, Expected("user", 89.8))) == "equivalent"


def test_nobody_vouches(made: Make, one: One) -> None:
    result = judge_results(with_entry(made([one(i) for i in range(COUNT)]), vouched=False), 1.0)
    assert verdict(result) == "equivalent"
    assert result.rows[0].reason.endswith("; this file has no passport")


def test_a_sequential_run_is_judged_by_the_anytime_interval(made: Make, one: One) -> None:
    records = [one(i) for i in range(COUNT)]
    # A single look at 500 images proves one point; a sequential test needs more.
    assert verdict(judge_results(made(records), 1.0)) == "equivalent"
    result = judge_results(made(records, sequential=1.0), 1.0)
    assert verdict(result) == "undecided"
    assert "anytime interval" in result.rows[0].reason


def test_no_artifact_is_no_pass(made: Make, one: One) -> None:
    result = judge_results(made([one(i, artifacts=()) for i in range(COUNT)], artifacts=()), 1.0)
    assert not result


def test_nothing_read_and_no_such_limit(made: Make, one: One) -> None:
    with pytest.raises(DatasetError, match="no image of digits could be read"):
        judge_results(made([]), 1.0)
    with pytest.raises(UsageError, match=r"invalid value 101\.0 for --max-drop"):
        judge_results(made([one(0)]), 101.0)


def test_images_that_are_there_twice_are_told(made: Make, one: One) -> None:
    twin = replace_name(one(0), "9/twin.png")
    result = judge_results(made([one(0), one(1), twin], problems=("odd",)), 1.0)
    assert result.problems == (
        "odd",
        "1 images have the same bytes as another one: 9/twin.png is 0/0.png",
        "1 images have the same pixels as another one and are counted once",
    )


def of_image(record: ImageRecord, **changes: Any) -> ImageRecord:
    """The record with changes of its image."""
    image = msgspec.structs.replace(record.image, **changes)
    return msgspec.structs.replace(record, image=image)


def replace_name(record: ImageRecord, name: str) -> ImageRecord:
    return of_image(record, name=name)


@pytest.mark.parametrize("saved_again", [False, True])
def test_ten_images_copied_fifty_times_are_ten(saved_again: bool, made: Make, one: One) -> None:
    """By their bytes, or by their pixels in files of other bytes."""
    records = []
    for number in range(COUNT):
        copy = replace_name(one(number % 10), f"{number}.png")
        records.append(of_image(copy, sha256=f"{number:064x}") if saved_again else copy)
    result = judge_results(made(records), 1.0, Expected("none"))
    assert (result.images, result.copies, result.listed) == (10, 490, COUNT)
    assert verdict(result) == "undecided"
    assert any("490 images have the same pixels as another one" in each for each in result.problems)
    drop = result.rows[0].drop
    assert drop is not None
    assert drop.n == 10
    # In contrast, as many different images are enough.
    assert verdict(judge_results(made([one(i) for i in range(COUNT)]), 1.0)) == "equivalent"


def test_near_copies_prove_nothing_by_themselves(made: Make, one: One) -> None:
    """Saved again with loss: their pixels and answers are their own, their thumbnails are not."""
    records = []
    for number in range(COUNT):
        thumbnail = bytearray(one(number % 10).image.thumbnail)
        thumbnail[number % 64] ^= 1
        records.append(of_image(one(number), thumbnail=bytes(thumbnail)))
    result = judge_results(made(records), 1.0, Expected("none"))
    assert (result.images, result.copies, result.near_copies) == (COUNT, 0, 490)
    assert verdict(result) == "undecided"
    assert "only 10 images do not look almost like another" in result.rows[0].reason
    # A few of them change nothing.
    few = [*records[:30], *(one(i) for i in range(30, COUNT))]
    result = judge_results(made(few), 1.0, Expected("none"))
    assert result.near_copies == 20
    assert verdict(result) == "equivalent"
    assert any("20 images look almost like another one" in each for each in result.problems)


def with_repeats(results: Results, repeats: tuple[Repeat, ...]) -> Results:
    """The same results, with other repeated calls in the first batch, and none later."""
    first, *rest = results.batches
    batches = [replace(first, repeats=(repeats,)), *(replace(b, repeats=((),)) for b in rest)]
    return replace(results, batches=tuple(batches))


def test_what_does_not_repeat_has_no_verdict(made: Make, one: One) -> None:
    results = made([one(i) for i in range(COUNT)])
    odd = again(1, kind="mixed", size=8, signal=800.0, noise=80.0, worst=0.5)
    result = judge_results(with_repeats(results, (*again(500), *odd)), 100.0)
    assert verdict(result) == "not judged"
    reason = result.rows[0].reason
    assert reason.startswith("not repeatable: run 8 at once in another order")
    assert verdict_line(result) == "NOT JUDGED: the answers of fp32 graph are not repeatable"
    repeats = result.rows[0].repeats
    assert repeats is not None
    assert not repeats
    assert repeats.worst_db == pytest.approx(3.01, abs=0.01)
    # Neither missing labels nor random weights override it.
    for changes in ({"labelled": False}, {"random_weights": True}):
        spoilt = replace(results, run_key=replace(results.run_key, **changes))
        found = judge_results(with_repeats(spoilt, odd), 100.0)
        assert found.rows[0].reason.startswith("not repeatable")
    # A logit that is NaN in one of two calls.
    broken = again(1, noise=None, worst=None)
    found = judge_results(with_repeats(results, (*again(500), *broken)), 100.0)
    assert verdict(found) == "not judged"
    assert "NaN or infinite" in found.rows[0].reason


def test_too_few_calls_do_not_exclude_faults_of_whole_calls(made: Make, one: One) -> None:
    results = made([one(i) for i in range(COUNT)])
    # 32 batches and 300 calls more: (1 - 0.011)^332 = 0.025.
    result = judge_results(with_repeats(results, again(300)), 1.0)
    assert verdict(result) == "undecided"
    assert "of 332 different calls 1.1 % could be wrong undetected" in result.rows[0].reason
    assert verdict(judge_results(with_repeats(results, again(300)), 1.2)) == "equivalent"
    assert verdict(judge_results(with_repeats(results, again(400)), 1.0)) == "equivalent"


def test_top5_is_judged_where_a_limit_is_given(made: Make, one: One) -> None:
    """The artifact loses 20 labels from its top 5, of images whose top-1 is wrong."""
    records = []
    for number in range(COUNT):
        wrong = number < 20
        record = one(number, reference=not wrong, artifacts=(not wrong,))
        if wrong:
            (outcome,) = record.outcomes
            answer = msgspec.structs.replace(outcome.answer, rank=7)
            outcome = msgspec.structs.replace(outcome, answer=answer)
            record = msgspec.structs.replace(record, outcomes=(outcome,))
        records.append(record)
    results, none = made(records), Expected("none")
    result = judge_results(results, 1.0, none)
    assert verdict(result) == "equivalent"
    assert "top-5 is proven to drop, by 2.41 to 6.10 points" in result.rows[0].reason
    found = result.rows[0].drop_top5
    assert found is not None
    assert (found.b, found.c, found.drop) == (20, 0, 4.0)
    for limit, expected in ((1.0, "regressed"), (4.0, "undecided"), (7.0, "equivalent")):
        judged = judge_results(results, Limits(1.0, limit), none)
        assert verdict(judged) == expected
        assert judged.max_drop_top5 == limit
        assert "top-5: drop +4.00 points" in judged.rows[0].reason
    with pytest.raises(UsageError, match="invalid value -1 for --max-top5-drop"):
        Limits(1.0, -1)


@pytest.mark.parametrize(
    ("calibration", "leaked", "near"), [("", 0, 0), ("a" * 64, 2, 1), (None, None, None)]
)
def test_leaks_count_for_what_was_calibrated(
    calibration: str | None, leaked: int | None, near: int | None, made: Make, one: One
) -> None:
    leaks = {3: "same", 5: "same", 8: "near"}
    records = [msgspec.structs.replace(one(i), leak=leaks.get(i, "")) for i in range(COUNT)]
    result = judge_results(with_entry(made(records), calibration=calibration), 1.0)
    assert (result.leaked, result.near_leaked) == (leaked, near)
    assert result.rows[0].calibrated == (None if calibration is None else bool(calibration))
    assert any("1 images look almost like one" in each for each in result.problems) == bool(near)


def test_engines_that_were_not_judged_are_in_the_headline(
    made: Make, one: One, tmp_path: Path
) -> None:
    graph = tmp_path / "model.int8.onnx"
    results = with_entry(made([one(i) for i in range(COUNT)]), artifact=str(graph))
    line = "EQUIVALENT: 1 graph loses no more than 1.00 points of top-1"
    assert verdict_line(judge_results(results, 1.0)) == line
    graph.with_suffix(".engine").write_bytes(b"")
    result = judge_results(results, 1.0)
    assert result.left_out == (str(graph.with_suffix(".engine")),)
    assert verdict_line(result) == f"{line}; 1 engine not executed and not judged"


def test_disagreements_come_with_the_largest_difference_first(made: Make, one: One) -> None:
    records = [one(i, artifacts=(i % 3 > 0,), finite=i != 6) for i in range(10)]
    found = disagreements_of(records, 0)
    assert [each.name for each in found] == ["6/6.png", "0/0.png", "3/3.png", "9/9.png"]
    assert found[0].max_abs is None
    assert (found[1].label, found[1].reference, found[1].artifact) == (0, 0, 1)
