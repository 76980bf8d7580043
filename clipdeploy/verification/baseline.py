"""Is the reference itself as accurate as was published?  Else no verdict on an artifact means much.

An engine that agrees with PyTorch on wrongly prepared images, or on wrong labels, has proven
nothing.  The published accuracy has to lie within Wilson's interval of what PyTorch reaches here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipdeploy import zoo
from clipdeploy.verification.paired import Interval, wilson_interval
from clipdeploy.verification.records import Answer
from clipdeploy.verification.result import Baseline
from clipdeploy.verification.results import Question
from exporters.errors import UsageError

__all__ = ["Expected", "check_baseline", "is_hopeless"]

# A sound setup should not be held up once in twenty data sets; a wrong one is off by whole points.
_CONFIDENCE = 0.99
# Enough to stop after a first look: no sound setup is that far out. The margin in points is for
# accuracies near 100 %, where Wilson's interval promises too much.
_HOPELESS, _HOPELESS_MARGIN = 0.999999, 2.0
# Published figures have two decimals.
_ROUNDING = 0.005


@dataclass(frozen=True)
class Expected:
    """What PyTorch is to reach, in percent: the card's figures, the user's, or nothing at all.

    ``source`` is ``card``, ``user`` or ``none``.
    """

    source: str = "card"
    top1: float | None = None
    top5: float | None = None

    @classmethod
    def parse(cls, text: str) -> Expected:
        """``card``, ``none``, ``TOP1`` or ``TOP1,TOP5``.

        Raises:
            UsageError: something else.
        """
        if text in ("card", "none"):
            return cls(text)
        try:
            figures = [float(part) for part in text.split(",")]
        except ValueError:
            figures = []
        if not 1 <= len(figures) <= 2 or not all(0 <= figure <= 100 for figure in figures):
            raise UsageError(
                f"--baseline {text!r} is no accuracy", hint="card, none, or percent: 86.02,97.76"
            )
        return cls("user", figures[0], figures[1] if len(figures) == 2 else None)


def _published(question: Question, expected: Expected) -> tuple[float | None, float | None]:
    if expected.source != "card":
        return expected.top1, expected.top5
    card = zoo.find(question.model)
    own = tuple(name for name, _ in zoo.class_names(card))
    # A head with other classes is a fine-tune: nothing was published of it.
    return (card.top1, card.top5) if question.class_names == own else (None, None)


def _within(figure: float | None, interval: Interval) -> bool:
    if figure is None:
        return True
    return interval.low - _ROUNDING <= figure <= interval.high + _ROUNDING


def _intervals(answers: Sequence[Answer], confidence: float) -> tuple[Interval, Interval]:
    one, five = (
        wilson_interval(sum(answer.right(k) for answer in answers), len(answers), confidence)
        for k in (1, 5)
    )
    return one, five


def is_hopeless(answers: Sequence[Answer], question: Question, expected: Expected) -> bool:
    """Whether a first look at a sample rules out that the baseline will be confirmed."""
    top1, _ = _published(question, expected)
    if top1 is None:
        return False
    return top1 > _intervals(answers, _HOPELESS)[0].high + _HOPELESS_MARGIN


def check_baseline(
    answers: Sequence[Answer], question: Question, expected: Expected = Expected()
) -> Baseline:
    """Hold PyTorch's answers, one an image, against what is expected of them."""
    if question.random_weights or not question.labelled:
        return Baseline("skipped", "accuracy means nothing here")
    one, five = _intervals(answers, _CONFIDENCE)
    found = 100 * sum(answer.right() for answer in answers) / len(answers)
    if one.low <= 100 / question.classes:
        return Baseline(
            "implausible",
            f"PyTorch gets {found:.2f} % of {len(answers):,} images right, which is guessing "
            f"among {question.classes:,} classes: the labels or the preprocessing are not the "
            "model's",
            top1_interval=one,
            top5_interval=five,
        )
    top1, top5 = _published(question, expected)
    figures = (top1, top5, one, five)
    if expected.source == "none":
        return Baseline("skipped", "the published accuracy was not looked at", *figures)
    if top1 is None:
        return Baseline("unpublished", "no accuracy was published of these weights", *figures)
    whose = "published" if expected.source == "card" else "expected"
    shown = (
        f"PyTorch's top-1 is {found:.2f} % ({one.low:.2f} to {one.high:.2f}), "
        f"{top1:.2f} % {'is' if expected.source == 'user' else 'was'} {whose}"
    )
    if _within(top1, one) and _within(top5, five):
        return Baseline("confirmed", shown, *figures)
    if _within(top1, one):
        shown += f"; of top-5 {five.low:.2f} to {five.high:.2f}, {top5:.2f} % {whose}"
    return Baseline("missed", shown, *figures)
