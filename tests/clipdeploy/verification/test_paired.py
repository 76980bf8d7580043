from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import optimize, stats

from clipdeploy.core.errors import UsageError
from clipdeploy.verification.paired import (
    Interval,
    SequentialDrop,
    anytime_interval,
    drop_interval,
    images_needed,
    judge_drop,
    mcnemar_exact,
    wilson_interval,
)

Method = Callable[[int, int, int], Interval]


def wald(b: int, c: int, n: int) -> Interval:
    """The textbook interval, which fails if there are few discordant images."""
    half = 100 * 1.96 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return Interval(100 * (b - c) / n - half, 100 * (b - c) / n + half)


def tango(b: int, c: int, n: int) -> Interval:
    """Tango 1998: the drops that the score test does not reject at 5 %."""

    def score(drop: float) -> float:
        linear = (2 * n - b + c) * drop - b - c
        gained = (math.sqrt(linear**2 + 8 * n * c * drop * (1 - drop)) - linear) / (4 * n)
        return (b - c - n * drop) / math.sqrt(n * (2 * gained + drop * (1 - drop)))

    drop, z = (b - c) / n, 1.959964
    low = optimize.brentq(lambda d: score(d) - z, -0.999, drop - 1e-12)
    high = optimize.brentq(lambda d: score(d) + z, drop + 1e-12, 0.999)
    return Interval(100 * low, 100 * high)


def misses(method: Method, n: int, lost: float, gained: float) -> tuple[float, float]:
    """Exact probabilities that the interval lies below and above the true drop.

    Counts more than 7 standard deviations and 9 images away weigh under 1e-9 together.
    """
    ranges = []
    for share in (lost, gained):
        reach = 7 * math.sqrt(n * share) + 9
        ranges.append(range(max(0, int(n * share - reach)), min(n, int(n * share + reach)) + 1))
    below = above = 0.0
    drop = 100 * (lost - gained)
    for b in ranges[0]:
        first = stats.binom.pmf(b, n, lost)
        second = stats.binom.pmf(ranges[1], n - b, gained / (1 - lost))
        for c, chance in zip(ranges[1], first * second, strict=True):
            if chance < 1e-12:
                continue
            interval = method(b, c, n)
            below += chance * (interval.high < drop - 1e-9)
            above += chance * (interval.low > drop + 1e-9)
    return below, above


SCORES = [
    (round(share * n), n, confidence)
    for n in (1, 10, 500, 50_000)
    for share in (0, 0.003, 0.5, 0.81, 1)
    for confidence in (0.5, 0.9, 0.95, 0.999)
]
PAIRS = list(itertools.product((0, 1, 2, 5, 20, 300, 2000), repeat=2))


def test_the_wilson_interval_is_that_of_scipy() -> None:
    for hits, n, confidence in SCORES:
        got = wilson_interval(hits, n, confidence)
        want = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
        # Percent in float64; only the order of operations differs.
        assert (got.low, got.high) == pytest.approx((100 * want.low, 100 * want.high), abs=1e-10)


def test_interval_and_p_value_are_those_of_statsmodels() -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    for hits, n, confidence in SCORES:
        got = wilson_interval(hits, n, confidence)
        low, high = proportion.proportion_confint(hits, n, 1 - confidence, method="wilson")
        assert (got.low, got.high) == pytest.approx((100 * low, 100 * high), abs=1e-10)
    for b, c in PAIRS[1:]:
        other = tables.mcnemar([[0, b], [c, 0]], exact=True).pvalue
        assert mcnemar_exact(b, c) == pytest.approx(other, rel=1e-9, abs=1e-300)


def test_the_wilson_interval_by_hand_and_at_its_ends() -> None:
    # z^2 = 3.8415: 0 of 100 ends at 3.8415 / 103.8415.
    assert wilson_interval(0, 100).high == pytest.approx(3.6994, abs=1e-4)
    assert wilson_interval(0, 100).low == 0
    assert wilson_interval(100, 100).high == 100


def test_the_exact_p_value_is_that_of_scipy() -> None:
    for b, c in [*PAIRS[1:], (32_000, 32_500)]:
        want = stats.binomtest(b, b + c).pvalue
        # A sum of up to 64,500 logarithms in float64.
        assert mcnemar_exact(b, c) == pytest.approx(want, rel=1e-9, abs=1e-300)
    assert mcnemar_exact(0, 0) == 1
    assert mcnemar_exact(6, 0) == pytest.approx(2 / 64)


@pytest.mark.parametrize(
    ("n", "share"),
    [*itertools.product((500, 5000), (0.002, 0.01, 0.05)), (50_000, 0.002)],
)
def test_the_drop_interval_covers(n: int, share: float) -> None:
    for split in (0.5, 0.75, 1.0):
        below, above = misses(drop_interval, n, share * split, share * (1 - split))
        # 94.8 % is what the docstring promises; 2.6 % and 2.9 % its two sides.
        assert below + above <= 0.052, split
        assert below <= 0.026, split
        assert above <= 0.029, split


def test_the_drop_interval_covers_at_any_confidence_and_with_many_discordant_images() -> None:
    generator = np.random.default_rng(0)
    shares = np.asarray([0.028, 0.022, 0.95])
    counts = generator.multinomial(50_000, shares, 6000)[:, :2].tolist()
    for confidence in (0.9, 0.95, 0.99):
        intervals = [drop_interval(b, c, 50_000, confidence) for b, c in counts]
        covered = sum(i.low <= 0.6 <= i.high for i in intervals)
        # Four standard deviations of 6000 draws either way: neither too short nor too long.
        slack = 4 * math.sqrt(confidence * (1 - confidence) / 6000)
        assert covered / 6000 == pytest.approx(confidence, abs=slack)


def test_the_enumeration_finds_out_an_interval_that_does_not_cover() -> None:
    below, _ = misses(wald, 500, 0.005, 0.0)
    # No loss: Wald's interval is the point 0, with false certainty. e^-2.5 = 8 %.
    assert below > 0.08
    below, above = misses(tango, 500, 0.011 * 0.15, 0.011 * 0.85)
    assert max(below, above) > 0.04


def test_the_drop_interval_is_near_tangos_where_that_holds() -> None:
    for b, c, n in ((20, 20, 500), (40, 20, 5000), (30, 60, 5000), (1300, 1200, 50_000)):
        got, want = drop_interval(b, c, n), tango(b, c, n)
        width = want.high - want.low
        # Both are score intervals and differ by a few hundredths of the width.
        assert got.low == pytest.approx(want.low, abs=0.02 * width)
        assert got.high == pytest.approx(want.high, abs=0.02 * width)


def test_the_drop_interval_mirrors_contains_the_drop_and_is_never_a_point() -> None:
    for b, c, rest in itertools.product((0, 1, 2, 7, 100), (0, 1, 2, 7, 100), (0, 1, 50, 9999)):
        n = b + c + rest
        if n == 0:
            continue
        for method in (drop_interval, anytime_interval):
            got, mirror = method(b, c, n), method(c, b, n)
            # An end of the anytime interval is found by bisection to 1e-11 of its range.
            assert (got.low, got.high) == pytest.approx((-mirror.high, -mirror.low), abs=1e-8)
            assert -100 <= got.low <= 100 * (b - c) / n <= got.high <= 100
            assert got.low < got.high
    assert drop_interval(0, 0, 500).high == pytest.approx(100 * 3.8415 / 503.8415, abs=1e-4)


def test_with_only_discordant_images_the_drop_is_a_proportion() -> None:
    for b, c in ((10, 0), (7, 3), (0, 4), (120, 80)):
        share = wilson_interval(b, b + c)
        got = drop_interval(b, c, b + c)
        assert (got.low, got.high) == pytest.approx((2 * share.low - 100, 2 * share.high - 100))


def test_a_judgement_says_what_it_rests_on() -> None:
    good = judge_drop(120, 100, 50_000, 1.0)
    assert good.verdict == "equivalent"
    assert good.drop == pytest.approx(0.04)
    assert good.p_value == mcnemar_exact(120, 100)
    assert good.interval == drop_interval(120, 100, 50_000)
    assert good.images_needed is None
    assert good.sentence == (
        "drop +0.04 points, 95 % interval -0.02 to +0.10, all within the 1.00 allowed"
    )
    bad = judge_drop(30, 10, 500, 1.0)
    assert bad.verdict == "regressed"
    assert "all above the 1.00 allowed" in bad.sentence
    open_ = judge_drop(3, 1, 500, 1.0)
    assert open_.verdict == "undecided"
    assert f"about {open_.images_needed:,} in total" in open_.sentence
    assert "anytime" in judge_drop(3, 1, 500, 1.0, anytime=True).sentence


@pytest.mark.parametrize(("b", "c", "n"), [(3, 1, 500), (0, 0, 1), (60, 20, 5000), (5, 0, 500)])
def test_an_undecided_look_is_to_be_followed_by_a_sequential_one(b: int, c: int, n: int) -> None:
    """More fixed looks until one decides are wrong too often: scripts/bench/statistics_audit.py."""
    fixed, anytime = (judge_drop(b, c, n, 1.0, anytime=each) for each in (False, True))
    assert fixed.verdict == anytime.verdict == "undecided"
    assert "repeat with verify --sequential" in fixed.sentence
    # A sequential run needs no such advice.
    assert "--sequential" not in anytime.sentence
    assert "add more images" in anytime.sentence
    assert fixed.images_needed == anytime.images_needed
    assert fixed.images_needed == images_needed(b, c, n, 1.0, anytime=True)
    for counts in ((0, 0, 5000), (400, 0, 5000)):
        for each in (False, True):
            decided = judge_drop(*counts, 1.0, anytime=each)
            assert decided.verdict != "undecided"
            assert not any(word in decided.sentence for word in ("--sequential", "add", "repeat"))


@pytest.mark.parametrize("anytime", [False, True])
def test_the_verdict_is_what_the_interval_says(anytime: bool) -> None:
    seen = set()
    for b, c, n in itertools.product(range(0, 120, 4), (0, 5, 60), (300, 3000)):
        got = judge_drop(b, c, n, 1.0, anytime=anytime)
        above, below = got.interval.low > 1, got.interval.high <= 1
        want = "regressed" if above else "equivalent" if below else "undecided"
        assert got.verdict == want, (b, c, n)
        seen.add(want)
    assert len(seen) == 3


def test_counts_of_any_integer_type_give_plain_numbers() -> None:
    got = judge_drop(np.uint8(3), np.uint8(9), np.int64(500), 1.0)  # type: ignore[arg-type]
    assert got == judge_drop(3, 9, 500, 1.0)
    assert all(type(count) is int for count in (got.b, got.c, got.n))


def test_a_gain_is_equivalent_and_a_loss_at_once_regressed() -> None:
    assert judge_drop(0, 400, 1000, 0.0).verdict == "equivalent"
    assert judge_drop(400, 0, 1000, 0.0).verdict == "regressed"
    assert judge_drop(400, 0, 1000, 100.0).verdict == "equivalent"


@pytest.mark.parametrize("anytime", [False, True])
def test_few_images_without_a_difference_prove_nothing(anytime: bool) -> None:
    enough = images_needed(0, 0, 1, 1.0, anytime=anytime)
    assert enough is not None
    # Chances of missing a share of 1 % in that many images are 0.99^n, to be under 2.5 %.
    assert 0.99**enough < 0.025
    for n in (1, 2, 10, 100, enough - 1):
        assert judge_drop(0, 0, n, 1.0, anytime=anytime).verdict == "undecided"
    assert judge_drop(0, 0, enough, 1.0, anytime=anytime).verdict == "equivalent"
    if not anytime:
        # z^2 / (n + z^2) <= 1 %.
        assert enough == math.ceil(99 * stats.norm.ppf(0.975) ** 2)


@pytest.mark.parametrize("anytime", [False, True])
@pytest.mark.parametrize(("b", "c"), [(2, 1), (4, 4), (6, 7), (9, 1)])
def test_the_images_needed_are_the_first_that_decide(b: int, c: int, anytime: bool) -> None:
    needed = images_needed(b, c, 500, 1.0, anytime=anytime)
    assert needed is not None
    assert needed > 500
    # Whole multiples keep the shares, so that the verdict can be had for real.
    before, after = needed // 500, -(-needed // 500)
    few = judge_drop(before * b, before * c, before * 500, 1.0, anytime=anytime)
    many = judge_drop(after * b, after * c, after * 500, 1.0, anytime=anytime)
    assert few.verdict == "undecided"
    # The advice is of a sequential run, whatever the look was.
    if anytime:
        assert few.images_needed == needed
    else:
        assert few.images_needed is not None
        assert few.images_needed > needed
    assert many.verdict == ("regressed" if b == 9 else "equivalent")


@pytest.mark.parametrize("anytime", [False, True])
def test_a_drop_at_the_limit_is_never_decided(anytime: bool) -> None:
    for b, c, n, limit in ((5, 0, 500, 1.0), (7, 7, 700, 0.0), (3, 0, 1000, 0.3)):
        got = judge_drop(b, c, n, limit, anytime=anytime)
        assert (got.verdict, got.images_needed) == ("undecided", None)
        assert "too close to it" in got.sentence
    decided = judge_drop(400, 0, 1000, 1.0, anytime=anytime)
    assert (decided.verdict, decided.images_needed) == ("regressed", None)
    assert images_needed(400, 0, 1000, 1.0, anytime=anytime) == 1000


def test_the_anytime_interval_is_where_the_bets_have_won_enough() -> None:
    answers = np.random.default_rng(1).choice([1, -1, 0], 2000, p=[0.012, 0.008, 0.98])
    b, c = int((answers == 1).sum()), int((answers == -1).sum())
    bets = ((np.arange(32) + 0.5) / 32) ** 2

    def capital(limit: float, losses: np.ndarray) -> float:
        won = np.ones(32)
        for loss in losses:
            won = won * (1 + bets * (limit - loss) / (1 - limit))
        return float(won.mean())

    got = anytime_interval(b, c, 2000)
    # 2 / alpha = 40; products of 2000 factors of float64.
    assert capital(got.high / 100, answers) == pytest.approx(40, rel=1e-6)
    assert capital(-got.low / 100, -answers) == pytest.approx(40, rel=1e-6)


def test_the_anytime_interval_pays_for_its_looks_with_width() -> None:
    for b, c, n in ((0, 0, 500), (3, 1, 500), (120, 100, 50_000), (10, 40, 2000)):
        fixed, anytime = drop_interval(b, c, n), anytime_interval(b, c, n)
        assert anytime.low < fixed.low
        assert fixed.high < anytime.high
        # Wider, but less than twice as wide.
        assert anytime.high - anytime.low < 2 * (fixed.high - fixed.low)


def test_the_anytime_p_value_agrees_with_the_interval_about_no_drop() -> None:
    for b in range(0, 60, 3):
        got = judge_drop(b, 5, 2000, 50.0, anytime=True)
        # The mean of both sides' capitals is at least half of the larger.
        assert (got.p_value <= 0.05) >= (not got.interval.low <= 0 <= got.interval.high)
        assert got.p_value >= min(1.0, mcnemar_exact(b, 5))
    assert judge_drop(60, 0, 2000, 50.0, anytime=True).p_value < 1e-6


def answers(
    generator: np.random.Generator, images: int, lost: float, gained: float
) -> tuple[np.ndarray, np.ndarray]:
    """Seeded answers of a reference and an artifact, each (images,) bool, in random order."""
    draw = generator.random(images)
    reference = generator.random(images) < 0.8
    artifact = np.where(draw < lost + gained, draw >= lost, reference)
    reference = np.where(draw < lost + gained, draw < lost, reference)
    return reference, artifact


def first_verdict(
    reference: np.ndarray, artifact: np.ndarray, limit: float, look: int
) -> tuple[str, int]:
    sequential = SequentialDrop(limit)
    for start in range(0, len(reference), look):
        stop = start + look
        sequential.add(reference[start:stop], artifact[start:stop])
        if sequential.verdict() != "undecided":
            return sequential.verdict(), stop
    return "undecided", len(reference)


def naive_verdict(reference: np.ndarray, artifact: np.ndarray, limit: float, look: int) -> str:
    lost = np.cumsum(reference & ~artifact)
    gained = np.cumsum(artifact & ~reference)
    for stop in range(look, len(reference) + 1, look):
        got = drop_interval(int(lost[stop - 1]), int(gained[stop - 1]), stop)
        if got.high <= limit or got.low > limit:
            return "equivalent" if got.high <= limit else "regressed"
    return "undecided"


RUNS = 400
# 2.5 % a side, and three standard deviations of 400 runs: 2.5 + 2.4 %.
TOO_OFTEN = round(RUNS * (0.025 + 3 * math.sqrt(0.025 * 0.975 / RUNS)))


def test_looking_often_is_fair_sequentially_and_not_with_the_fixed_interval() -> None:
    generator = np.random.default_rng(2)
    wrong = naive = 0
    for _ in range(RUNS):
        # True drop 1.02 points, 1.00 allowed.
        reference, artifact = answers(generator, 5000, 0.0201, 0.0099)
        wrong += first_verdict(reference, artifact, 1.0, 100)[0] == "equivalent"
        naive += naive_verdict(reference, artifact, 1.0, 100) == "equivalent"
    assert wrong <= TOO_OFTEN
    assert naive > 2 * TOO_OFTEN


def finite_set() -> tuple[np.ndarray, np.ndarray]:
    """Exactly 101 of 5000 lost and 50 gained, a drop of 1.02 points; the losses come last."""
    return np.arange(5000) >= 50, np.arange(5000) < 5000 - 101


def test_drawing_a_finite_set_to_its_end_is_fair_too() -> None:
    generator = np.random.default_rng(3)
    reference, artifact = finite_set()
    wrong = 0
    for _ in range(RUNS):
        order = generator.permutation(5000)
        wrong += first_verdict(reference[order], artifact[order], 1.0, 100)[0] == "equivalent"
    assert wrong <= TOO_OFTEN


def test_sorted_images_break_the_promise_as_documented() -> None:
    assert first_verdict(*finite_set(), 1.0, 100)[0] == "equivalent"


def test_no_drop_is_proved_in_a_few_thousand_images_and_a_large_one_found() -> None:
    generator = np.random.default_rng(4)
    runs = [first_verdict(*answers(generator, 5000, 0.0025, 0.0025), 1.0, 32) for _ in range(100)]
    assert all(verdict == "equivalent" for verdict, _ in runs)
    # The docstring's 900 and 1,500, with room for 100 runs.
    assert np.median([images for _, images in runs]) < 1100
    assert np.quantile([images for _, images in runs], 0.9) < 2000
    runs = [first_verdict(*answers(generator, 5000, 0.04, 0.01), 1.0, 32) for _ in range(50)]
    assert sum(verdict == "regressed" for verdict, _ in runs) >= 45


def test_batches_and_shards_add_up_to_one() -> None:
    reference, artifact = answers(np.random.default_rng(5), 50_000, 0.003, 0.002)
    whole, parts = SequentialDrop(1.0), SequentialDrop(1.0)
    whole.add(reference, artifact)
    for start in range(0, 50_000, 999):
        parts.add(reference[start : start + 999], artifact[start : start + 999])
    assert whole.judgement() == parts.judgement()
    b, c = int((reference & ~artifact).sum()), int((artifact & ~reference).sum())
    assert whole.judgement() == judge_drop(b, c, 50_000, 1.0, anytime=True)
    assert whole.verdict() == whole.judgement().verdict == "equivalent"


def test_before_the_first_image_nothing_is_decided() -> None:
    empty = SequentialDrop(100.0)
    assert empty.verdict() == "undecided"
    with pytest.raises(UsageError, match="of 0"):
        empty.judgement()
    empty.add(np.ones(0, bool), np.ones(0, bool))
    assert empty.verdict() == "undecided"


@pytest.mark.parametrize(
    ("reference", "artifact"),
    [
        (np.ones(3, bool), np.ones(4, bool)),
        (np.ones((2, 2), bool), np.ones((2, 2), bool)),
        (np.ones(3), np.ones(3, bool)),
    ],
)
def test_answers_that_are_not_right_or_wrong_are_refused(
    reference: np.ndarray, artifact: np.ndarray
) -> None:
    with pytest.raises(UsageError, match="bool"):
        SequentialDrop(1.0).add(reference, artifact)


@pytest.mark.parametrize(
    ("b", "c", "n"),
    [(-1, 0, 5), (0, -1, 5), (3, 3, 5), (0, 0, 0), (1.5, 0, 5), (math.nan, 0, 5), (0, 0, math.inf)],
)
def test_counts_that_cannot_be_are_refused_with_their_value(b: int, c: int, n: int) -> None:
    for call in (drop_interval, anytime_interval, lambda *x: judge_drop(*x, 1.0)):
        with pytest.raises(UsageError, match=rf"{b} images .* {c} for .* of {n}") as caught:
            call(b, c, n)
        assert "whole numbers" in caught.value.hint
    with pytest.raises(UsageError):
        images_needed(b, c, n, 1.0)


def test_hits_and_pairs_that_cannot_be_are_refused() -> None:
    for hits, n in ((-1, 5), (6, 5), (0, 0), (math.nan, 5), (2.5, 5)):
        with pytest.raises(UsageError, match=f"{hits} hits of {n}"):
            wilson_interval(hits, n)  # type: ignore[arg-type]
    for b, c in ((-1, 3), (3, -1), (math.nan, 1), (0.5, 0.5)):
        with pytest.raises(UsageError, match=f"{b} images"):
            mcnemar_exact(b, c)  # type: ignore[arg-type]


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.5, 95.0, math.nan])
def test_a_confidence_that_is_no_level_is_refused(confidence: float) -> None:
    for call in (
        lambda: wilson_interval(1, 2, confidence),
        lambda: drop_interval(1, 0, 2, confidence),
        lambda: anytime_interval(1, 0, 2, confidence),
        lambda: judge_drop(1, 0, 2, 1.0, confidence),
        lambda: SequentialDrop(1.0, confidence),
    ):
        with pytest.raises(UsageError, match=f"confidence of {confidence}") as caught:
            call()
        assert "0.95" in caught.value.hint


@pytest.mark.parametrize("limit", [-0.1, 100.1, math.nan, math.inf])
def test_a_largest_drop_outside_0_to_100_is_refused(limit: float) -> None:
    for call in (
        lambda: judge_drop(1, 0, 2, limit),
        lambda: images_needed(1, 0, 2, limit),
        lambda: SequentialDrop(limit),
    ):
        with pytest.raises(UsageError, match=f"{limit} points") as caught:
            call()
        assert "0 to 100" in caught.value.hint
