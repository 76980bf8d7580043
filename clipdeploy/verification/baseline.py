"""Checks that the reference itself reaches its published accuracy before artifacts are judged.

An engine that agrees with PyTorch on wrongly preprocessed images, or on wrong labels, proves
nothing. On a sample, the published accuracy must be within Wilson's interval of the measured one.
With few images it is within that interval whatever PyTorch does, so the result also states which
deficit the check can exclude. On the whole validation set there is no sampling error: the two
accuracies must be equal.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import Recipe
from clipdeploy.core.spans import ACCURACY, check_numbers
from clipdeploy.models import cards
from clipdeploy.models.cards import TOP1_ROUNDING
from clipdeploy.models.clip.prompts import IMAGENET, TEMPLATES, read_prompts
from clipdeploy.models.clips import clip_named
from clipdeploy.verification.paired import Interval, wilson_interval
from clipdeploy.verification.records import Answer
from clipdeploy.verification.result import Baseline, BaselineStatus
from clipdeploy.verification.results import RunKey

__all__ = [
    "CONFIRMING",
    "Expected",
    "check_baseline",
    "excluded_deficit",
    "passing_hits",
    "rules_out_baseline",
    "whole_set_status",
]

# Points. A check confirms only if it detects a reference this much worse. On every card of the zoo
# one image of each of ImageNet's 1000 classes is enough (4.7 to 5.4 points).
CONFIRMING = 5.5
# Probability of the detection: 19 in 20.
_POWER = 0.95
# At 95 % a correct setup would fail on one data set in twenty; a wrong one is off by whole points.
_CONFIDENCE = 0.99
# To stop after a first look; no correct setup is that far off. The margin in points is for
# accuracies near 100 %, where Wilson's interval is too narrow.
_RULED_OUT, _RULED_OUT_MARGIN = 0.999999, 2.0
# Points, 50 images of the whole set. Other versions of decoder and kernels change the answers to
# some dozens of images, about as many to the right one as away from it.
_DRIFT = 0.1
# Float64 rounding of a sum of two decimals; one image of the whole set is 0.002 points.
_TINY = 1e-9
# ImageNet's validation set: https://www.image-net.org/challenges/LSVRC/2012/
_CLASSES, _PER_CLASS = 1000, 50


@dataclass(frozen=True)
class Expected:
    """The accuracy that PyTorch should reach, in percent: the card's, the user's, or none.

    ``source`` is ``card``, ``user`` or ``none``.

    Raises:
        UsageError: the source is none of these, or a percentage is outside 0 to 100.
    """

    source: str = "card"
    top1: float | None = None
    top5: float | None = None

    def __post_init__(self) -> None:
        if self.source not in ("card", "user", "none"):
            raise UsageError(
                f"{self.source!r} is not a source of an accuracy", hint="pass card, user or none"
            )
        check_numbers(self, top1=ACCURACY.or_none, top5=ACCURACY.or_none)

    @classmethod
    def parse(cls, text: str) -> Expected:
        """Parse ``card``, ``none``, ``TOP1`` or ``TOP1,TOP5``.

        Raises:
            UsageError: something else.
        """
        if text in ("card", "none"):
            return cls(text)
        try:
            percents = [float(part) for part in text.split(",")]
        except ValueError:
            percents = []
        if not 1 <= len(percents) <= 2 or not all(0 <= each <= 100 for each in percents):
            raise UsageError(
                f"--baseline {text!r} is not an accuracy",
                hint="pass card, none, or percent such as 86.02,97.76",
            )
        return cls("user", percents[0], percents[1] if len(percents) == 2 else None)


def _published(run_key: RunKey, expected: Expected) -> tuple[float | None, float | None]:
    if expected.source != "card":
        return expected.top1, expected.top5
    if _is_part(run_key):
        return None, None
    if run_key.clip is not None:
        return _published_zero_shot(run_key), None
    card = cards.find(run_key.model)
    own = tuple(name for name, _ in cards.class_names(card))
    # A head with other classes was fine-tuned: its accuracy is not published.
    return (card.top1, card.top5) if run_key.class_names == own else (None, None)


def _published_zero_shot(run_key: RunKey) -> float | None:
    clip = clip_named(run_key.clip or "")
    return clip.top1 if clip and run_key.prompts == _published_prompts() else None


@cache
def _published_prompts() -> str:
    """The hash of the class texts and templates with which the CLIPs' accuracies were measured."""
    return read_prompts(IMAGENET, TEMPLATES[0]).sha256


def _why_unpublished(run_key: RunKey) -> str:
    if run_key.clip is None:
        return "no accuracy is published for these weights"
    if clip_named(run_key.clip) is None:
        return "no zero-shot accuracy is published for this CLIP"
    return (
        f"the zero-shot accuracy of {run_key.clip} is published for ImageNet's classes with "
        "OpenAI's templates, not for these texts"
    )


def _is_part(run_key: RunKey) -> bool:
    """Return whether the images cover too few classes to compare with the published accuracy.

    An accuracy p over K classes, of which m have no image, is between (K p - m) / (K - m) and
    K p / (K - m) over the others: m / (K - m) apart. If that is less than the deficit that a check
    detects, the published accuracy is compared all the same.
    """
    present = run_key.partial_classes
    return bool(present) and 100 * (run_key.classes - present) / present > CONFIRMING


@dataclass(frozen=True)
class _Comparison:
    """The published top-1 and top-5 in percent, if any, and the measured intervals.

    ``found`` is the measured top-1 in percent of ``images`` images.
    """

    top1: float | None
    top5: float | None
    one: Interval
    five: Interval
    found: float
    images: int

    def baseline(
        self, status: BaselineStatus, sentence: str, excludes: float | None = None
    ) -> Baseline:
        return Baseline(
            status,
            sentence,
            self.top1,
            self.top5,
            self.one,
            self.five,
            excludes=excludes,
            top1=self.found,
            images=self.images,
        )


def _within(published: float | None, interval: Interval) -> bool:
    if published is None:
        return True
    return interval.low - TOP1_ROUNDING <= published <= interval.high + TOP1_ROUNDING


def _intervals(answers: Sequence[Answer], confidence: float) -> tuple[Interval, Interval]:
    one, five = (
        wilson_interval(sum(answer.right(k) for answer in answers), len(answers), confidence)
        for k in (1, 5)
    )
    return one, five


def rules_out_baseline(answers: Sequence[Answer], run_key: RunKey, expected: Expected) -> bool:
    """Return whether a first look at a sample rules out that the baseline will be confirmed."""
    top1, _ = _published(run_key, expected)
    if top1 is None:
        return False
    return top1 > _intervals(answers, _RULED_OUT)[0].high + _RULED_OUT_MARGIN


def passing_hits(published: float, n: int) -> tuple[int, int]:
    """Return the fewest and the most right answers of ``n`` images that are not a miss.

    ``published`` is in percent. The first is greater than the second if no number passes.

    Raises:
        UsageError: ``n`` is less than 1.
    """

    def interval(hits: int) -> Interval:
        return wilson_interval(hits, n, _CONFIDENCE)

    numbers = range(n + 1)
    fewest = bisect_left(numbers, published, key=lambda hits: interval(hits).high + TOP1_ROUNDING)
    beyond = bisect_left(
        numbers, True, key=lambda hits: interval(hits).low - TOP1_ROUNDING > published
    )
    return fewest, beyond - 1


def excluded_deficit(published: float, n: int) -> float | None:
    """Return the smallest deficit, in points of top-1, that ``n`` images detect with 95 % power.

    Fewer than m right answers (``passing_hits``) are a miss. A reference that is d points worse
    than the ``published`` percentage is a miss with the exact probability

        P(X < m) = P(n - X > n - m),    X ~ Binomial(n, (published - d) / 100)

    which grows with d; the result is the d at which it reaches 95 %. None if it never does, because
    no number of right answers is a miss. Images drawn without replacement from a finite set vary
    less, so that the detection is at least as probable.

    Raises:
        UsageError: ``n`` is less than 1.
    """
    fewest, _ = passing_hits(published, n)
    if fewest == 0:
        return None
    wrong = np.arange(n - fewest + 1)
    # log C(n, k), k up to the most wrong answers that pass.
    ways = np.concatenate([[0.0], np.cumsum(np.log((n + 1 - wrong[1:]) / wrong[1:]))])

    def passes(share: float) -> float:
        logs = ways + wrong * math.log1p(-share) + (n - wrong) * math.log(share)
        return float(np.exp(logs).sum())

    noticed, unnoticed = 0.0, published / 100
    # 40 halvings of 100 points: 1e-10.
    for _ in range(40):
        share = (noticed + unnoticed) / 2
        noticed, unnoticed = (share, unnoticed) if passes(share) <= 1 - _POWER else (noticed, share)
    return published - 100 * noticed


def _is_whole(n: int, run_key: RunKey, expected: Expected, per_class: Sequence[int]) -> bool:
    """Return whether these are all images of the card's published accuracy, prepared alike.

    The accuracies of CLIPs were measured by another program, with texts' embeddings of its own.
    """
    even = len(per_class) == run_key.classes == _CLASSES and set(per_class) == {_PER_CLASS}
    return (
        expected.source == "card"
        and run_key.clip is None
        and run_key.recipe == Recipe()
        and even
        and n == run_key.images == _CLASSES * _PER_CLASS
    )


def whole_set_status(gap: float) -> BaselineStatus:
    """Return the status for a difference of ``gap`` points on the whole validation set."""
    if gap <= TOP1_ROUNDING + _TINY:
        return "confirmed"
    return "unconfirmed" if gap <= _DRIFT + _TINY else "missed"


def _of_the_whole(answers: Sequence[Answer], comparison: _Comparison) -> Baseline:
    pairs = [
        (k, 100 * sum(answer.right(k) for answer in answers) / len(answers), published)
        for k, published in ((1, comparison.top1), (5, comparison.top5))
        if published is not None
    ]
    gap = max(abs(found - published) for _, found, published in pairs)
    shown = " and ".join(
        f"top-{k} is {found:.3f} %, {published:.2f} % was published"
        for k, found, published in pairs
    )
    status = whole_set_status(gap)
    noticed = f"a reference {_DRIFT:g} points worse would have been noticed"
    meaning = {
        "confirmed": f"equal after rounding; {noticed}",
        "unconfirmed": f"{gap:.3f} points apart: other versions of decoder and kernels change some "
        f"dozens of answers; {noticed}",
        "missed": f"{gap:.3f} points apart, too far for chance: the images, the preprocessing or "
        "the weights differ from the published ones",
    }
    sentence = f"PyTorch's {shown}, on the whole validation set; {meaning[status]}"
    return comparison.baseline(status, sentence, _DRIFT)


def _of_a_sample(
    found: str, n: int, top1: float, comparison: _Comparison, source: str, guessing: str
) -> Baseline:
    excludes = excluded_deficit(top1, n)
    shown = f"{found}, {top1:.2f} % {source}"
    if not _within(comparison.top5, comparison.five):
        five = comparison.five
        shown += (
            f"; of top-5 the 99 % interval is {five.low:.2f} to {five.high:.2f}, "
            f"{comparison.top5:.2f} % {source}"
        )
    # Rounded up: a smaller deficit is not excluded.
    worse = 0.0 if excludes is None else math.ceil(10 * excludes - _TINY) / 10
    noticed = f"a reference {worse:.1f} points worse would have been noticed 19 times in 20"
    if excludes is None:
        noticed = "a worse reference would not have been noticed"
    if not (_within(comparison.top1, comparison.one) and _within(comparison.top5, comparison.five)):
        return comparison.baseline("missed", f"{shown}; {noticed}", excludes)
    if guessing:
        return comparison.baseline("unconfirmed", f"{shown}; {guessing}; {noticed}", excludes)
    if excludes is None or excludes > CONFIRMING:
        few = f"too few images to confirm it: {'only ' if excludes else ''}{noticed}"
        return comparison.baseline("unconfirmed", f"{shown}; {few}", excludes)
    return comparison.baseline("confirmed", f"{shown}; {noticed}", excludes)


def check_baseline(
    answers: Sequence[Answer],
    run_key: RunKey,
    expected: Expected = Expected(),
    *,
    per_class: Sequence[int] = (),
    different: Sequence[Answer] | None = None,
) -> Baseline:
    """Compare PyTorch's answers, one per image, with the expected accuracy.

    ``per_class`` counts the images of each class that has any, in any order. 50 in each of 1000
    classes, all of them read and preprocessed as for the published accuracy, are ImageNet's whole
    validation set: the accuracies must be equal. Without it, any set is a sample. ``different`` are
    the answers without those of copies; in a sample only they count, since a copy is no new
    evidence, while the whole set is judged as published. Without it, there are no copies.

    Raises:
        UsageError: no answers.
    """
    if run_key.random_weights or not run_key.labelled:
        return Baseline("skipped", "random weights or no labels: there is no accuracy to compare")
    whole = _is_whole(len(answers), run_key, expected, per_class)
    if different is not None and not whole:
        answers = different
    one, five = _intervals(answers, _CONFIDENCE)
    n, hits = len(answers), sum(answer.right() for answer in answers)
    found = (
        f"PyTorch's top-1 is {100 * hits / n:.2f} % of {n:,} image{'' if n == 1 else 's'} "
        f"(99 % interval {one.low:.2f} to {one.high:.2f})"
    )
    comparison = _Comparison(*_published(run_key, expected), one, five, 100 * hits / n, n)
    guess, guessing = 100 / run_key.classes, ""
    if one.low <= guess:
        guessing = f"guessing among {run_key.classes:,} classes"
        # Without a published accuracy: half way from guessing to perfect.
        if one.high + TOP1_ROUNDING < max(comparison.top1 or 0.0, (100 + guess) / 2):
            return comparison.baseline(
                "implausible",
                f"{found}, no better than {guessing}: the labels or the preprocessing do not match "
                "the model",
            )
        guessing = f"too few images to distinguish it from {guessing}"
    if comparison.top1 is not None:
        if whole:
            return _of_the_whole(answers, comparison)
        source = "was published" if expected.source == "card" else "is expected"
        return _of_a_sample(found, n, comparison.top1, comparison, source, guessing)
    if guessing:
        return comparison.baseline("unconfirmed", f"{found}: {guessing}")
    if expected.source == "none":
        return comparison.baseline("skipped", "the published accuracy was not compared")
    if _is_part(run_key):
        return comparison.baseline(
            "unpublished",
            f"{found}, of {run_key.partial_classes:,} of the {run_key.classes:,} classes; "
            "the published accuracy is over all of them",
        )
    return comparison.baseline("unpublished", _why_unpublished(run_key))
