"""Judges the accuracy drop of an artifact against its reference on the same images.

Of n images, the reference alone is right on b and the artifact alone on c. The drop is
d = (b - c) / n; a positive drop is a loss. The verdict compares an interval of d with m, the
largest drop allowed:

    high <= m       equivalent    (non-inferiority: a gain is accepted)
    low  >  m       regressed
    otherwise       undecided: more images may decide

Each of the first two verdicts is wrong with probability at most (1 - confidence) / 2:
approximately for ``drop_interval``, which is for one look at a number of images chosen in advance,
and exactly for ``anytime_interval``, which is valid after every batch. Both need only counts, so
the counts of shards add up.
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

# Bets, as fractions of the largest bet with bounded loss. The square of an even grid has the small
# steps that tens of thousands of images need; 16 or 64 points decide equally early.
_BETS = ((np.arange(32) + 0.5) / 32) ** 2

_TOO_MANY = 10**9  # a thousand times ImageNet's training set: not useful as advice


@dataclass(frozen=True)
class Interval:
    """A closed interval, in percent or in percentage points of a difference."""

    low: float
    high: float


@dataclass(frozen=True)
class DropJudgement:
    """A verdict and the statistics behind it.

    ``drop``, ``interval`` and ``max_drop`` are percentage points, positive for a loss. ``p_value``
    tests the hypothesis "no drop", not "a drop of at most ``max_drop``". ``images_needed`` is set
    only while undecided: the total number of images for a sequential run. ``sentence`` is a
    summary.
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
            hint="pass whole numbers of 0 or more whose sum is at most the number of images",
        )
    # An unsigned NumPy count would wrap around in b - c.
    return int(b), int(c), int(n)


def _check_levels(confidence: float, max_drop: float = 0.0) -> None:
    if not 0 < confidence < 1:
        raise UsageError(f"a confidence of {confidence}", hint="between 0 and 1, such as 0.95")
    if not 0 <= max_drop <= 100:
        raise UsageError(f"a largest drop of {max_drop} points", hint="pass a value from 0 to 100")


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
    """Return the score interval of an accuracy, in percent, for ``hits`` right of ``n`` images.

        (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),   p = hits / n

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference",
    JASA 22; recommended by Brown, Cai & DasGupta 2001, Statistical Science 16.

    Raises:
        UsageError: ``hits`` is not from 0 to ``n``, or ``confidence`` is not between 0 and 1.
    """
    if not (float(hits).is_integer() and float(n).is_integer() and 0 <= hits <= n and n >= 1):
        raise UsageError(f"{hits} hits of {n} images", hint="pass 0 to n hits of 1 or more images")
    _check_levels(confidence)
    low, high = _wilson(hits, n, _quantile(confidence))
    return Interval(100 * low, 100 * high)


def mcnemar_exact(b: int, c: int) -> float:
    """Return the two-sided exact p-value of "equally accurate": a sign test on b + c images.

        min(1, 2 sum_{k <= min(b, c)} C(b + c, k) / 2^(b + c))

    Source: McNemar 1947, Psychometrika 12; Agresti, "Categorical Data Analysis", 3rd ed., 11.1.
    It is more conservative than ``drop_interval``, which may exclude 0 where this returns 0.06.

    Raises:
        UsageError: a count is negative or not a whole number.
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
    # 1 if every pair is discordant: each share is then 1 minus the other.
    correlation = 1.0 if b + c == n else math.sqrt(b * c / ((n - b) * (n - c)))

    def joined(one: float, other: float) -> float:
        return math.sqrt(one * one + other * other + 2 * correlation * one * other)

    drop = lost - gained
    low = drop - joined(lost - lost_low, gained_high - gained)
    high = drop + joined(lost_high - lost, gained - gained_low)
    return max(low, -1.0), min(high, 1.0)


def drop_interval(b: int, c: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the interval of the drop in percentage points, for one look at ``n`` images.

    Wilson limits (l, u) of the discordant shares p = b/n and q = c/n, squared and added:

        high = p - q + sqrt((u_p - p)^2 + (q - l_q)^2 + 2 r (u_p - p) (q - l_q))
        low  = p - q - sqrt((p - l_p)^2 + (u_q - q)^2 + 2 r (p - l_p) (u_q - q))
        r    = sqrt(p q / ((1 - p) (1 - q))),   minus the correlation of two multinomial shares

    Source: Zou & Donner 2008, Statistics in Medicine 27 (MOVER), after Newcombe 1998, same
    journal 17, method 10, which combines the two accuracies instead of the discordant shares.

    Chosen for its coverage. Enumerated for n from 20 to 50,000, discordant shares from 0.02 % to
    6 % and drops from none to the whole share, a 95 % interval covers at least 94.8 %; it is below
    the drop (false equivalence) in at most 2.6 % and above it in 2.9 %, where 2.5 % is nominal. At
    n = 500 Tango's score interval (1998, Statistics in Medicine 17) falls to 93.3 %, with 4.8 %
    false equivalence; exact limits instead of Wilson's only widen it. At 90 % it is less strict if
    almost no image gains: up to 6.7 % false equivalence instead of 5 %. With b = c = 0 it is
    -+z^2 / (n + z^2), never a point. Counted by ``scripts/bench/statistics_audit.py``.

    Raises:
        UsageError: the counts are impossible, or ``confidence`` is not between 0 and 1.
    """
    b, c, n = _counts(b, c, n)
    _check_levels(confidence)
    low, high = _square_and_add(b, c, n, _quantile(confidence))
    return Interval(100 * low, 100 * high)


def _log_capital(b: float, c: float, n: float, limits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the log capital of bets against "the drop is at least the limit".

    ``limits`` is (L,) with values in [-1, 1).
    """
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
        last = int((_log_capital(b, c, n, points[1:-1]) < enough).sum())
        low, high = float(points[last]), float(points[last + 1])
    return high


def anytime_interval(b: int, c: int, n: int, confidence: float = 0.95) -> Interval:
    """Return an interval of the drop in percentage points that is valid after every image.

    With probability ``confidence`` it contains the true drop at all looks at once. Each image is a
    bet against "the drop is m or more", with d_i = 1 if only the reference is right, -1 if only the
    artifact is right, else 0:

        K(m) = mean over bets f of  prod_i (1 + f (m - d_i) / (1 - m)),   0 <= f < 1
             = mean over bets f of  (1 - f)^b (1 + f (1 + m)/(1 - m))^c (1 + f m/(1 - m))^(n-b-c)

    If the drop is m or more, K is a non-negative supermartingale that starts at 1 and ever reaches
    2/alpha with probability at most alpha/2 (Ville 1939). K grows with m: ``high`` is the m at
    which it reaches 2/alpha; ``low`` is the mirror image. The mean over f costs little and avoids
    choosing one bet; with f fixed in advance K depends only on the counts, not on the order or the
    size of batches. Source: Waudby-Smith & Ramdas 2024, "Estimating means of bounded random
    variables by betting", JRSS B 86; mixing over bets: Robbins 1970, Ann. Math. Statistics 41.

    The images must come in random order: images sorted by class are not a random sample. The drop
    is that of the population the images were drawn from. For the drop of the finite set the draw is
    without replacement, which is ignored: each single look is then conservative (Hoeffding 1963,
    JASA 58, section 6), and so are all looks together in simulation.

    Raises:
        UsageError: the counts are impossible, or ``confidence`` is not between 0 and 1.
    """
    b, c, n = _counts(b, c, n)
    _check_levels(confidence)
    low, high = -_anytime_high(c, b, n, confidence), _anytime_high(b, c, n, confidence)
    return Interval(100 * low, 100 * high)


def _anytime_p_value(b: int, c: int, n: int) -> float:
    """Return Ville's p-value of "no drop", valid at any look: 1 / mean capital of both sides."""
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
    """Estimate how many images in total would decide, if b/n and c/n stayed the same.

    The shares will change: at that number about half of all runs are still undecided. Returns ``n``
    if it is decided already, None if not even 10^9 images would decide. To add images until the run
    is decided, use ``anytime_interval``, not ``drop_interval``.

    Raises:
        UsageError: impossible counts, ``max_drop`` outside 0 to 100, ``confidence`` outside 0 to 1.
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
    found: str, max_drop: float, verdict: Verdict, few: str, again: str, needed: int | None
) -> str:
    if verdict == "equivalent":
        return f"{found}, all within the {max_drop:.2f} allowed"
    if verdict == "regressed":
        return f"{found}, all above the {max_drop:.2f} allowed"
    spans = f"{found}, on both sides of the {max_drop:.2f} allowed"
    if needed is None:
        return f"{spans} and too close to it to decide; {again}"
    return f"{spans}: {few} are too few; {again}, about {needed:,} in total would decide"


def judge_drop(
    b: int,
    c: int,
    n: int,
    max_drop: float,
    confidence: float = 0.95,
    *,
    anytime: bool = False,
    samples: str = "",
) -> DropJudgement:
    """Judge a drop by ``drop_interval`` or, if ``anytime``, by ``anytime_interval``.

    ``p_value`` is that of ``mcnemar_exact`` or, if ``anytime``, one valid at any look. While
    undecided, ``images_needed`` and the sentence recommend ``anytime`` on more images, those
    already seen included. One fixed look followed by that is wrong with probability at most the sum
    of both, 5 % a side at 95 %; 2.8 to 3.7 % were counted at the boundary. Repeating the fixed look
    until it decides is wrong in 7.6 to 8.8 %. ``samples`` names what is judged if that is not
    images of a classifier, which alone can be judged at any look.

    Raises:
        UsageError: impossible counts, ``max_drop`` outside 0 to 100, ``confidence`` outside 0 to 1.
    """
    b, c, n = _counts(b, c, n)
    _check_levels(confidence, max_drop)
    interval = (anytime_interval if anytime else drop_interval)(b, c, n, confidence)
    verdict = _verdict(b, c, n, max_drop, confidence, anytime)
    undecided = verdict == "undecided"
    needed = images_needed(b, c, n, max_drop, confidence, anytime=True) if undecided else None
    drop = 100 * (b - c) / n
    again = f"add more {samples or 'images'}"
    if not anytime and not samples:
        again = "add images and repeat with verify --sequential"
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
        sentence=_sentence(found, max_drop, verdict, f"{n:,} {samples or 'images'}", again, needed),
    )


class SequentialDrop:
    """Accumulates batches and gives a verdict after each; stop at the first that is decided.

    The images must come in random order: see ``anytime_interval``. With no drop, 0.5 % discordant
    images and 1 point allowed, half of all runs are decided within 900 images, 9 in 10 in 1,500.
    """

    def __init__(self, max_drop: float, confidence: float = 0.95) -> None:
        _check_levels(confidence, max_drop)
        self._max_drop, self._confidence = max_drop, confidence
        self._b = self._c = self._n = 0

    def add(self, reference_right: NDArray[np.bool_], artifact_right: NDArray[np.bool_]) -> None:
        """Add a batch: whether reference and artifact are right on each image, both (B,) bool.

        Raises:
            UsageError: the two are not (B,) bool of the same length.
        """
        ours, theirs = np.asarray(artifact_right), np.asarray(reference_right)
        fit = ours.shape == theirs.shape and ours.ndim == 1
        if not (fit and ours.dtype == np.bool_ and theirs.dtype == np.bool_):
            raise UsageError(
                f"answers of {theirs.dtype} {theirs.shape} and {ours.dtype} {ours.shape}",
                hint="pass two one-dimensional bool arrays of the same length",
            )
        self._n += len(ours)
        self._b += int((theirs & ~ours).sum())
        self._c += int((ours & ~theirs).sum())

    def verdict(self) -> Verdict:
        """Return ``judgement().verdict``, fast enough to call after every batch."""
        if not self._n:
            return "undecided"
        return _verdict(self._b, self._c, self._n, self._max_drop, self._confidence, True)

    def judgement(self) -> DropJudgement:
        """Return the verdict on all images added, with its statistics.

        Raises:
            UsageError: no image was added.
        """
        return judge_drop(self._b, self._c, self._n, self._max_drop, self._confidence, anytime=True)
