"""Whether an artifact is as accurate as its reference, from both on the same images.

Of n images, b are right for the reference only and c for the artifact only.  The drop is
d = (b - c) / n; positive means that the artifact lost.  A verdict compares an interval of d with
the largest drop allowed, m:

    high <= m       equivalent    (non-inferior: a gain is welcome)
    low  >  m       regressed
    otherwise       undecided: more images could tell

Each of the first two is wrong with probability at most (1 - confidence) / 2: closely for
``drop_interval``, which is for one look at a number of images chosen beforehand, and strictly for
``anytime_interval``, which may be looked at after every batch.  Counts are all that either needs,
so those of shards add up.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.errors import UsageError

__all__ = [
    "DropJudgement",
    "Interval",
    "SequentialDrop",
    "Verdict",
    "anytime_interval",
    "drop_interval",
    "images_needed",
    "judge_drop",
    "mcnemar_exact",
    "wilson_interval",
]

Verdict = Literal["equivalent", "regressed", "undecided"]

# Shares of the largest bet that cannot ruin. An even grid squared has steps small enough for the
# timid bets that tens of thousands of images call for; 16 points decide no later, nor do 64.
_BETS = ((np.arange(32) + 0.5) / 32) ** 2

_TOO_MANY = 10**9  # a thousand times ImageNet's training set: no advice any more


@dataclass(frozen=True)
class Interval:
    """Both ends included; percent, or percentage points of a difference."""

    low: float
    high: float


@dataclass(frozen=True)
class DropJudgement:
    """A verdict and all that it rests on.

    ``drop``, ``interval`` and ``max_drop`` are percentage points, positive for a loss. ``p_value``
    is of "no drop at all", which is another question than ``max_drop``'s. ``images_needed`` is set
    only while undecided: in all, for a sequential run. ``sentence`` says it in words.
    """

    n: int
    b: int
    c: int
    drop: float
    interval: Interval
    confidence: float
    p_value: float
    max_drop: float
    verdict: Verdict
    images_needed: int | None
    sentence: str


def _counts(b: int, c: int, n: int) -> tuple[int, int, int]:
    whole = all(float(count).is_integer() for count in (b, c, n))
    if not (whole and n >= 1 and b >= 0 and c >= 0 and b + c <= n):
        raise UsageError(
            f"{b} images right for the reference only and {c} for the artifact only, of {n}",
            hint="whole numbers, 0 or more, that sum to no more than the 1 or more images",
        )
    # An unsigned NumPy count would wrap around in b - c.
    return int(b), int(c), int(n)


def _check_levels(confidence: float, max_drop: float = 0.0) -> None:
    if not 0 < confidence < 1:
        raise UsageError(f"a confidence of {confidence}", hint="above 0 and below 1, such as 0.95")
    if not 0 <= max_drop <= 100:
        raise UsageError(f"a largest drop of {max_drop} points", hint="allowed is 0 to 100")


def _quantile(confidence: float) -> float:
    return -NormalDist().inv_cdf((1 - confidence) / 2)


def _wilson(hits: float, n: float, z: float) -> tuple[float, float]:
    share, spread = hits / n, z * z / n
    centre = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low = 0.0 if hits == 0 else (centre - half) / (1 + spread)
    high = 1.0 if hits == n else (centre + half) / (1 + spread)
    return low, high


def wilson_interval(hits: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of an accuracy, in percent, from ``hits`` right of ``n`` images.

        (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),   p = hits / n

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference",
    JASA 22; recommended by Brown, Cai & DasGupta 2001, Statistical Science 16.

    Raises:
        UsageError: ``hits`` of ``n`` is impossible, or ``confidence`` is no level.
    """
    if not (float(hits).is_integer() and float(n).is_integer() and 0 <= hits <= n and n >= 1):
        raise UsageError(f"{hits} hits of {n} images", hint="0 to all of 1 or more images")
    _check_levels(confidence)
    low, high = _wilson(hits, n, _quantile(confidence))
    return Interval(100 * low, 100 * high)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p-value of "both are equally accurate": a sign test on b + c images.

        min(1, 2 sum_{k <= min(b, c)} C(b + c, k) / 2^(b + c))

    Source: McNemar 1947, Psychometrika 12; Agresti, "Categorical Data Analysis", 3rd ed., 11.1.
    It is more cautious than ``drop_interval``, which may leave out 0 where this says 0.06.

    Raises:
        UsageError: a count is negative or not whole.
    """
    b, c, _ = _counts(b, c, max(b + c, 1))
    if b == c:
        return 1.0
    pairs, steps = b + c, np.arange(1, min(b, c) + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((pairs - steps + 1) / steps))])
    return min(1.0, 2 * float(np.exp(logs - pairs * math.log(2)).sum()))


def _square_and_add(b: float, c: float, n: float, z: float) -> tuple[float, float]:
    lost, gained = b / n, c / n
    lost_low, lost_high = _wilson(b, n, z)
    gained_low, gained_high = _wilson(c, n, z)
    # Equal to 1 where every pair is discordant: the one share is then 1 less the other.
    correlation = 1.0 if b + c == n else math.sqrt(b * c / ((n - b) * (n - c)))

    def joined(one: float, other: float) -> float:
        return math.sqrt(one * one + other * other + 2 * correlation * one * other)

    drop = lost - gained
    low = drop - joined(lost - lost_low, gained_high - gained)
    high = drop + joined(lost_high - lost, gained - gained_low)
    return max(low, -1.0), min(high, 1.0)


def drop_interval(b: int, c: int, n: int, confidence: float = 0.95) -> Interval:
    """Interval of the drop in percentage points, for one look at ``n`` images.

    Wilson limits (l, u) of the discordant shares p = b/n and q = c/n, squared and added:

        high = p - q + sqrt((u_p - p)^2 + (q - l_q)^2 + 2 r (u_p - p) (q - l_q))
        low  = p - q - sqrt((p - l_p)^2 + (u_q - q)^2 + 2 r (p - l_p) (u_q - q))
        r    = sqrt(p q / ((1 - p) (1 - q))),   minus the correlation of two multinomial shares

    Source: Zou & Donner 2008, Statistics in Medicine 27 (MOVER), after Newcombe 1998, same
    journal 17, method 10, which joins the two accuracies where this joins the discordant shares.

    Why this one: its coverage. Enumerated over n 20 to 50,000, discordant shares 0.02 % to 6 %
    and drops from none to all of the share, a 95 % interval covers at least 94.8 %; it lies below
    the drop (false equivalence) in at most 2.6 %, above it in 2.9 %, where 2.5 % is nominal. At
    n = 500 Tango's score interval (1998, Statistics in Medicine 17) falls to 93.3 %, with 4.8 % of
    false equivalence; exact limits in place of Wilson's only widen. At 90 % it is laxer if hardly
    an image gains: up to 6.7 % of false equivalence for 5 %. With b = c = 0 it is
    -+z^2 / (n + z^2), never a point. Counted by ``scripts/bench/statistics_audit.py``.

    Raises:
        UsageError: counts that cannot be, or ``confidence`` is no level.
    """
    b, c, n = _counts(b, c, n)
    _check_levels(confidence)
    low, high = _square_and_add(b, c, n, _quantile(confidence))
    return Interval(100 * low, 100 * high)


def _log_capital(b: float, c: float, n: float, limits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log capital of the bets against "the drop is at least the limit", limits (L,) in [-1, 1)."""
    limits = limits[:, None]
    stakes = _BETS / (1 - limits)
    logs = b * np.log1p(-_BETS) + c * np.log1p(stakes * (1 + limits))
    logs = logs + (n - b - c) * np.log1p(stakes * limits)
    top = logs.max(axis=1)
    capital: NDArray[np.float64] = top + np.log(np.exp(logs - top[:, None]).mean(axis=1))
    return capital


def _anytime_high(b: float, c: float, n: float, confidence: float) -> float:
    if b == n:
        return 1.0
    enough = math.log(2 / (1 - confidence))
    low, high = (b - c) / n, 1.0
    for _ in range(6):
        points = np.linspace(low, high, 66)
        kept = int((_log_capital(b, c, n, points[1:-1]) < enough).sum())
        low, high = float(points[kept]), float(points[kept + 1])
    return high


def anytime_interval(b: int, c: int, n: int, confidence: float = 0.95) -> Interval:
    """Interval of the drop in percentage points that may be looked at after any image.

    With probability ``confidence`` it holds the true drop at all looks at once, so that stopping
    at a look that pleases is fair. Each image is a bet against "the drop is m or more", with
    d_i = 1 where only the reference is right, -1 where only the artifact is, else 0:

        K(m) = mean over bets f of  prod_i (1 + f (m - d_i) / (1 - m)),   0 <= f < 1
             = mean over bets f of  (1 - f)^b (1 + f (1 + m)/(1 - m))^c (1 + f m/(1 - m))^(n-b-c)

    If the drop is m or more, K is a non-negative supermartingale from 1, and ever reaches 2/alpha
    with probability at most alpha/2 (Ville 1939). K grows with m, so high is where it gets there;
    low is the mirror image. The mean over f costs little and spares a guess of the best bet; with
    f fixed in advance K depends on the counts alone, not on the order or the size of batches.
    Source: Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting",
    JRSS B 86; mixing over bets as in Robbins 1970, Annals of Mathematical Statistics 41.

    The images must come in random order: sorted by class they are no sample until the last one. The
    drop is that of the images which the set was drawn from. For the finite set's own the draw is
    without replacement, which is ignored: each look by itself is then conservative (Hoeffding 1963,
    JASA 58, section 6), and in simulation so are all together.

    Raises:
        UsageError: counts that cannot be, or ``confidence`` is no level.
    """
    b, c, n = _counts(b, c, n)
    _check_levels(confidence)
    low, high = -_anytime_high(c, b, n, confidence), _anytime_high(b, c, n, confidence)
    return Interval(100 * low, 100 * high)


def _anytime_p_value(b: int, c: int, n: int) -> float:
    """Ville's p-value of "no drop at all", valid at any look: 1 / mean of both sides' capitals."""
    none = np.zeros(1)
    both = np.logaddexp(_log_capital(b, c, n, none), _log_capital(c, b, n, none))[0]
    return math.exp(min(0.0, math.log(2) - float(both)))


def _verdict(
    b: float, c: float, n: float, max_drop: float, confidence: float, anytime: bool
) -> Verdict:
    if not anytime:
        low, high = _square_and_add(b, c, n, _quantile(confidence))
        if 100 * high <= max_drop:
            return "equivalent"
        return "regressed" if 100 * low > max_drop else "undecided"
    if max_drop == 100:
        return "equivalent"
    limit = np.full(1, max_drop / 100)
    lost = 100 * (b - c) > max_drop * n
    capital = _log_capital(c, b, n, -limit) if lost else _log_capital(b, c, n, limit)
    if capital[0] < math.log(2 / (1 - confidence)):
        return "undecided"
    return "regressed" if lost else "equivalent"


def images_needed(
    b: int, c: int, n: int, max_drop: float, confidence: float = 0.95, *, anytime: bool = False
) -> int | None:
    """How many images in all would decide, if b/n and c/n stayed as they are.

    An estimate: the shares will move, and at that many images the verdict is about as likely to
    be out as not. ``n`` where it is out already; None where no number would do, as the drop equals
    ``max_drop``, or comes so near it that a thousand million images would not. To go on until
    ``drop_interval`` pleases is what ``anytime_interval`` is for.

    Raises:
        UsageError: counts that cannot be, ``max_drop`` outside 0 to 100, ``confidence`` no level.
    """
    b, c, n = _counts(b, c, n)
    _check_levels(confidence, max_drop)

    def decided(total: int) -> bool:
        lost, gained = b * total / n, c * total / n
        return _verdict(lost, gained, total, max_drop, confidence, anytime) != "undecided"

    many = n
    while not decided(many):
        many *= 2
        if many > _TOO_MANY:
            return None
    return n + bisect_left(range(n, many), True, key=decided)


def _sentence(
    found: str, max_drop: float, verdict: Verdict, n: int, needed: int | None, anytime: bool
) -> str:
    if verdict == "equivalent":
        return f"{found}, all within the {max_drop:.2f} allowed"
    if verdict == "regressed":
        return f"{found}, all above the {max_drop:.2f} allowed"
    spans = f"{found}, on both sides of the {max_drop:.2f} allowed"
    again = "look again with verify --sequential, as often as you like"
    again = "go on with more images" if anytime else again
    if needed is None:
        return f"{spans} and too near it to tell; {again}"
    return f"{spans}: {n:,} images are too few; {again}, about {needed:,} in all would decide"


def judge_drop(
    b: int, c: int, n: int, max_drop: float, confidence: float = 0.95, *, anytime: bool = False
) -> DropJudgement:
    """The verdict on a drop, from ``drop_interval`` or, if ``anytime``, ``anytime_interval``.

    ``p_value`` is ``mcnemar_exact``'s or, if ``anytime``, one that is valid at any look.

    While undecided, ``images_needed`` and the sentence advise ``anytime``, on more images, those
    seen included. One fixed look and then that until decided is wrong with probability at most the
    sum of both, 5 % a side at 95 %; at the boundary 2.8 to 3.7 % were counted. Fixed looks until
    decided are wrong in 7.6 to 8.8 %.

    Raises:
        UsageError: counts that cannot be, ``max_drop`` outside 0 to 100, ``confidence`` no level.
    """
    b, c, n = _counts(b, c, n)
    _check_levels(confidence, max_drop)
    interval = (anytime_interval if anytime else drop_interval)(b, c, n, confidence)
    verdict = _verdict(b, c, n, max_drop, confidence, anytime)
    undecided = verdict == "undecided"
    needed = images_needed(b, c, n, max_drop, confidence, anytime=True) if undecided else None
    drop = 100 * (b - c) / n
    found = (
        f"drop {drop:+z.2f} points, {100 * confidence:g} % {'anytime ' if anytime else ''}interval "
        f"{interval.low:+z.2f} to {interval.high:+z.2f}"
    )
    return DropJudgement(
        n=n,
        b=b,
        c=c,
        drop=drop,
        interval=interval,
        confidence=confidence,
        p_value=_anytime_p_value(b, c, n) if anytime else mcnemar_exact(b, c),
        max_drop=max_drop,
        verdict=verdict,
        images_needed=needed,
        sentence=_sentence(found, max_drop, verdict, n, needed, anytime),
    )


class SequentialDrop:
    """Counts batches and may be asked after each; stop at the first verdict.

    The images must come in random order: see ``anytime_interval``. With no drop, 0.5 % discordant
    images and 1 point allowed, half of all runs are decided within 900 images, 9 in 10 in 1,500.
    """

    def __init__(self, max_drop: float, confidence: float = 0.95) -> None:
        _check_levels(confidence, max_drop)
        self._max_drop, self._confidence = max_drop, confidence
        self._b = self._c = self._n = 0

    def add(self, reference_right: NDArray[np.bool_], artifact_right: NDArray[np.bool_]) -> None:
        """One batch: for each image whether each got it right, both (B,) bool.

        Raises:
            UsageError: the two are not (B,) bool of one length.
        """
        ours, theirs = np.asarray(artifact_right), np.asarray(reference_right)
        fit = ours.shape == theirs.shape and ours.ndim == 1
        if not (fit and ours.dtype == np.bool_ and theirs.dtype == np.bool_):
            raise UsageError(
                f"answers of {theirs.dtype} {theirs.shape} and {ours.dtype} {ours.shape}",
                hint="give right or wrong for each image: bool, one dimension, one length",
            )
        self._n += len(ours)
        self._b += int((theirs & ~ours).sum())
        self._c += int((ours & ~theirs).sum())

    def verdict(self) -> Verdict:
        """``judgement().verdict``, quick enough to ask after every batch."""
        if not self._n:
            return "undecided"
        return _verdict(self._b, self._c, self._n, self._max_drop, self._confidence, True)

    def judgement(self) -> DropJudgement:
        """The verdict on all images added, and what it rests on.

        Raises:
            UsageError: no image was added.
        """
        return judge_drop(self._b, self._c, self._n, self._max_drop, self._confidence, anytime=True)
