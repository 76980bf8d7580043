"""PyTorch's own accuracy against what was published, or is expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from clipdeploy.verification.baseline import Expected, check_baseline, is_hopeless
from clipdeploy.verification.records import Answer, ImageRecord
from clipdeploy.verification.results import Question, Results
from exporters.errors import UsageError

Make = Callable[..., Results]
One = Callable[..., ImageRecord]


@pytest.fixture
def question(made: Make) -> Question:
    return made([]).question


@pytest.fixture
def answers(one: One) -> Callable[[int, int], list[Answer]]:
    """So many answers, so many of which are wrong."""
    return lambda count, wrong: [one(i, reference=i >= wrong).reference for i in range(count)]


Answers = Callable[[int, int], Sequence[Answer]]


# The demo's card says 99.4 % of its 500 images.
@pytest.mark.parametrize(
    ("wrong", "status"),
    [(0, "confirmed"), (3, "confirmed"), (9, "missed"), (100, "missed"), (440, "implausible")],
)
def test_the_cards_accuracy(wrong: int, status: str, question: Question, answers: Answers) -> None:
    baseline = check_baseline(answers(500, wrong), question)
    assert baseline.status == status
    assert bool(baseline) == (status == "confirmed")
    assert f"{100 - wrong / 5:.2f} %" in baseline.sentence
    assert baseline.top1_interval is not None
    assert baseline.top1_interval.low <= 100 - wrong / 5 <= baseline.top1_interval.high


def test_few_images_miss_nothing(question: Question, answers: Answers) -> None:
    """2 of 100 wrong: 99.4 % is well within what so few images can say."""
    assert check_baseline(answers(100, 2), question).status == "confirmed"


def test_too_good_is_a_miss_too(question: Question, answers: Answers) -> None:
    baseline = check_baseline(answers(500, 3), question, Expected("user", 90.0))
    assert baseline.status == "missed"
    assert "90.00 % is expected" in baseline.sentence


def test_top5_counts_too(question: Question, answers: Answers) -> None:
    """Wrong answers here have the label in second place: top-5 is 100 %."""
    expected = Expected("user", 99.4, 90.0)
    baseline = check_baseline(answers(500, 3), question, expected)
    assert baseline.status == "missed"
    assert "top-5" in baseline.sentence


def test_nothing_to_compare_with(made: Make, answers: Answers) -> None:
    right = answers(500, 3)
    fine_tuned = made([], classes=3, class_names=("cat", "dog", "owl")).question
    assert check_baseline(right, fine_tuned).status == "unpublished"
    assert check_baseline(right, fine_tuned)
    for changes in ({"labelled": False}, {"random_weights": True}):
        baseline = check_baseline(right, made([], **changes).question)
        assert (baseline.status, bool(baseline)) == ("skipped", True)


def test_guessing_is_implausible_whatever_is_expected(
    made: Make, question: Question, answers: Answers
) -> None:
    guesses = answers(500, 450)
    for expected in (Expected(), Expected("none"), Expected("user", 10.0)):
        assert check_baseline(guesses, question, expected).status == "implausible"
    fine_tuned = made([], class_names=("a",) * 10).question
    assert check_baseline(guesses, fine_tuned).status == "implausible"


def test_none_skips_the_comparison(question: Question, answers: Answers) -> None:
    baseline = check_baseline(answers(500, 100), question, Expected("none"))
    assert (baseline.status, bool(baseline)) == ("skipped", True)


def test_only_the_hopeless_ends_a_first_look(question: Question, answers: Answers) -> None:
    assert not is_hopeless(answers(256, 2), question, Expected())
    # A miss, but one in a few hundred such samples of a sound set: not yet hopeless.
    assert check_baseline(answers(256, 5), question).status == "missed"
    assert not is_hopeless(answers(256, 5), question, Expected())
    assert is_hopeless(answers(256, 60), question, Expected())
    assert not is_hopeless(answers(256, 60), question, Expected("none"))
    assert not is_hopeless(answers(256, 60), question, Expected("user", 80.0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("card", Expected("card")),
        ("none", Expected("none")),
        ("86.02", Expected("user", 86.02)),
        ("86.02,97.76", Expected("user", 86.02, 97.76)),
        ("0", Expected("user", 0.0)),
    ],
)
def test_what_can_be_expected(text: str, expected: Expected) -> None:
    assert Expected.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "cards", "101", "-1", "86,97,99", "86;97", "nan", "86,", "inf"]
)
def test_what_cannot(text: str) -> None:
    with pytest.raises(UsageError, match="is no accuracy"):
        Expected.parse(text)
