"""Counts how often verdicts are wrong, by exact enumeration or seeded simulation.

    python scripts/bench/statistics_audit.py [--quick] [--seed 0]

Tests the functions that ``clipdeploy verify`` calls.  "At the boundary" an artifact loses exactly
--max-drop, here 1 point, where a wrong verdict is most likely.  Simulated values have a margin of
three standard deviations (+-).  If a bound is violated it is printed and the exit code is 1.  Takes
minutes on two CPU cores; --quick simulates less and takes seconds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipdeploy.verification.baseline import (
    CONFIRMING,
    excluded_deficit,
    passing_hits,
    whole_set_status,
)
from clipdeploy.verification.paired import Interval, SequentialDrop, drop_interval, images_needed

Counts = NDArray[np.int64]
Reals = NDArray[np.float64]
Method = Callable[[int, int, int], Interval]

LIMIT = 1.0
BATCH = 16
IMAGENET = 50_000
# Calls with other images: this number with two images, and one of each size from 2 to 32, see
# clipdeploy/verification/repeats.py.
TWOS, BATCH_SIZES = 340, 31
EQUIVALENT, REGRESSED, UNDECIDED = 1, -1, 0


@dataclass(frozen=True)
class Sizes:
    """Sizes: runs with fixed looks, runs and images of sequential tests, enumerated n."""

    runs: int = 40_000
    paths: int = 8_000
    reruns: int = 8_000
    longest: int = IMAGENET
    enumerated: tuple[int, ...] = (20, 100, 500, 1_000, 5_000, IMAGENET)


QUICK = Sizes(4_000, 400, 400, 8_000, (100, 500))


@dataclass(frozen=True)
class Share:
    """Percent and three standard deviations of the simulation, 0 if enumerated."""

    value: float
    margin: float = 0.0

    def __str__(self) -> str:
        return f"{self.value:.2f}" + (f" +-{self.margin:.2f}" if self.margin else "")


@dataclass(frozen=True)
class Line:
    """A row of a section with the upper bound of its shares (lower bound if negative)."""

    cells: tuple[object, ...]
    bounds: tuple[tuple[Share, float], ...] = ()

    def broken(self) -> Iterator[str]:
        """Return a sentence for each violated bound, allowing the margin of the simulation."""
        for share, bound in self.bounds:
            beyond = share.value - bound if bound >= 0 else -bound - share.value
            if beyond > share.margin:
                yield f"{' '.join(map(str, self.cells))}: {share} beyond {abs(bound):.2f}"


@dataclass(frozen=True)
class Section:
    """A titled table."""

    title: str
    header: tuple[str, ...]
    lines: tuple[Line, ...]

    def __str__(self) -> str:
        rows = [self.header, *(tuple(map(str, line.cells)) for line in self.lines)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join([self.title, *(f"  {line}" for line in lines), ""])


def drawn(hits: NDArray[np.bool_]) -> Share:
    """Return the share of runs in percent and its margin."""
    share = float(hits.mean())
    # Without a hit in n runs the share is at most 3/n (rule of three).
    spread = max(share * (1 - share), 1 / len(hits))
    return Share(100 * share, 300 * math.sqrt(spread / len(hits)))


def log_factorials(n: int) -> Reals:
    """Return log k! for k = 0 to n."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])


def misses(method: Method, n: int, lost: float, gained: float) -> tuple[float, float]:
    """Return the exact probabilities, in percent, of an interval below and above the true drop.

    Counts more than 6 standard deviations and 9 images away have a probability below 1e-8.
    """
    factorials = log_factorials(n)
    b, c = (
        np.arange(max(0, int(n * p - reach)), min(n, int(n * p + reach)) + 1)
        for p, reach in ((s, 6 * math.sqrt(n * s) + 9) for s in (lost, gained))
    )
    b, c = (each.ravel() for each in np.meshgrid(b, c if gained else np.zeros(1, np.int64)))
    b, c = b[b + c <= n], c[b + c <= n]
    logs = factorials[n] - factorials[b] - factorials[c] - factorials[n - b - c]
    logs = logs + b * math.log(lost) + (n - b - c) * math.log1p(-lost - gained)
    logs = logs + (c * math.log(gained) if gained else 0.0)
    likely = logs > math.log(1e-13)
    drop, below, above = 100 * (lost - gained), 0.0, 0.0
    columns = (each.tolist() for each in (b[likely], c[likely], np.exp(logs[likely])))
    for own, other, chance in zip(*columns, strict=True):
        interval = method(own, other, n)
        below += chance * (interval.high < drop - 1e-9)
        above += chance * (interval.low > drop + 1e-9)
    return 100 * below, 100 * above


def coverage(sizes: Sizes, method: Method = drop_interval) -> Section:
    """(a) The least coverage of the interval for one look, enumerated."""
    lines = []
    for n in sizes.enumerated:
        found = [
            (*misses(method, n, share * split, share * (1 - split)), share, split)
            for share in (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.06)
            for split in (0.5, 0.625, 0.75, 0.875, 1.0)
        ]
        below, above, share, split = max(found, key=lambda row: row[0] + row[1])
        least = Share(100 - below - above)
        worst = Share(max(row[0] for row in found)), Share(max(row[1] for row in found))
        cells = (f"{n:,}", f"{100 * share:g}", f"{100 * share * (2 * split - 1):g}", least, *worst)
        lines.append(Line(cells, ((least, -94.8), (worst[0], 2.6), (worst[1], 2.9))))
    header = ("images", "worst at discordant %", "drop", "coverage %", "below %", "above %")
    return Section("(a) 95 % interval for one look: least coverage", header, tuple(lines))


def boundary(sizes: Sizes) -> Section:
    """(b) The fixed verdict at the boundary, enumerated."""
    lines = []
    for n in sizes.enumerated:
        for limit in (0.5, 1.0, 2.0):
            gains = (0.0, 0.001, 0.005, 0.02)
            found = [misses(drop_interval, n, limit / 100 + gain, gain) for gain in gains]
            wrong, alarm = (Share(max(row[side] for row in found)) for side in (0, 1))
            lines.append(Line((f"{n:,}", limit, wrong, alarm), ((wrong, 2.6), (alarm, 2.9))))
    header = ("images", "max-drop", "EQUIVALENT %", "REGRESSED %")
    title = "(b) one look, true drop = max-drop: the most false verdicts (gained 0 to 2 %)"
    return Section(title, header, tuple(lines))


def fixed(b: Counts, c: Counts, n: int) -> Counts:
    """Return verdicts of one look at n images; each pair of counts is evaluated once."""
    pairs, where = np.unique(np.stack([b, c], axis=1), axis=0, return_inverse=True)
    return np.asarray([_fixed(own, other, n) for own, other in pairs.tolist()])[where.ravel()]


def _fixed(b: int, c: int, n: int) -> int:
    interval = drop_interval(b, c, n)
    return (interval.high <= LIMIT) - (interval.low > LIMIT)


class Bets:
    """SequentialDrop's capital for many runs at once; ``check`` compares it with SequentialDrop."""

    def __init__(self, limit: float = LIMIT) -> None:
        bets = ((np.arange(32) + 0.5) / 32) ** 2
        self._limit = limit / 100
        self._factors = [self._logs(bets, side * self._limit) for side in (1, -1)]

    @staticmethod
    def _logs(bets: Reals, m: float) -> Reals:
        stakes = bets / (1 - m)
        return np.log1p(np.stack([-bets, stakes * (1 + m), stakes * m]))

    def __call__(self, b: Counts, c: Counts, n: int) -> Counts:
        """Return the verdict of each run after n images."""
        lost = b - c > self._limit * n
        first, second = np.where(lost, c, b), np.where(lost, b, c)
        counts = np.stack([first, second, n - b - c], axis=1).astype(np.float64)
        equal, worse = (counts @ factors for factors in self._factors)
        capital = np.exp(np.where(lost[:, None], worse, equal)).mean(axis=1)
        return np.where(capital < 40, UNDECIDED, np.where(lost, REGRESSED, EQUIVALENT))

    def check(self, generator: np.random.Generator) -> int:
        """Compare with SequentialDrop on 300 counts; return the number of differences."""
        names = {EQUIVALENT: "equivalent", REGRESSED: "regressed", UNDECIDED: "undecided"}
        differing = 0
        for _ in range(300):
            n = int(generator.integers(1, 5000))
            b, c = (int(count) for count in generator.binomial(n, generator.uniform(0, 0.03, 2)))
            product = SequentialDrop(100 * self._limit)
            outcome = np.arange(n)
            lost, gained = outcome < b, (outcome >= b) & (outcome < b + c)
            product.add(~gained, ~lost)
            own = self(np.asarray([b]), np.asarray([c]), n)
            differing += names[int(own[0])] != product.verdict()
        return differing


def sequential(
    generator: np.random.Generator, shares: tuple[float, float], sizes: Sizes, look_at: int = 0
) -> tuple[Counts, Counts]:
    """Return final verdicts of ``paths`` runs tested after every batch, and at ``look_at`` only.

    A run ends with a verdict, at the latest after ``longest`` images.
    """
    b, c = np.zeros((2, sizes.paths), np.int64)
    verdict, first = np.zeros((2, sizes.paths), np.int64)
    bets, rest = Bets(), 1 - sum(shares)
    for n in range(BATCH, sizes.longest + 1, BATCH):
        open_ = np.flatnonzero(verdict == UNDECIDED) if n > look_at else np.arange(sizes.paths)
        if not len(open_):
            break
        new = generator.multinomial(BATCH, (*shares, rest), len(open_))
        b[open_] += new[:, 0]
        c[open_] += new[:, 1]
        asked = open_[verdict[open_] == UNDECIDED]
        verdict[asked] = bets(b[asked], c[asked], n)
        if n == look_at:
            first = fixed(b, c, n)
    return verdict, first


def looks(generator: np.random.Generator, sizes: Sizes) -> Section:
    """(c) The sequential test at the boundary, evaluated after every batch."""
    lines = []
    for gained in (0.0, 0.002, 0.01):
        verdict, _ = sequential(generator, (LIMIT / 100 + gained, gained), sizes)
        wrong, alarm = drawn(verdict == EQUIVALENT), drawn(verdict == REGRESSED)
        cells = (f"{LIMIT + 100 * gained:g}", f"{100 * gained:g}", wrong, alarm)
        lines.append(Line(cells, ((wrong, 2.5), (alarm, 2.5))))
    header = ("lost %", "gained %", "EQUIVALENT %", "REGRESSED %")
    title = f"(c) --sequential, a look every {BATCH} images to {sizes.longest:,}, drop = max-drop"
    return Section(title, header, tuple(lines))


def several(generator: np.random.Generator, sizes: Sizes) -> Section:
    """(d) m artifacts tested together; common: share of images with equal answers of all."""
    n, lost, gained = 5_000, 0.015, 0.005
    at, level = (lost, gained, 1 - lost - gained), (gained, gained, 1 - 2 * gained)
    lines = []
    for m, common in ((1, 0.0), (2, 0.0), (3, 0.0), (5, 0.0), (3, 0.9), (5, 0.9), (5, 1.0)):
        together = generator.binomial(n, common, sizes.runs)
        shared = generator.multinomial(together, at)
        every = np.ones((2, sizes.runs), bool)
        any_ = np.zeros(sizes.runs, bool)
        for number in range(m):
            own = shared + generator.multinomial(n - together, at)
            passed = fixed(own[:, 0], own[:, 1], n) == EQUIVALENT
            any_ |= passed
            every[1] &= passed
            if number:
                own = generator.multinomial(n, level, sizes.runs)
                passed = fixed(own[:, 0], own[:, 1], n) == EQUIVALENT
            every[0] &= passed
        one, all_, some = drawn(every[0]), drawn(every[1]), drawn(any_)
        bounds = ((one, 2.6), (all_, 2.6), (some, 100 * (1 - (1 - 0.026) ** m)))
        lines.append(Line((m, f"{100 * common:g}", one, all_, some), bounds))
    header = ("artifacts", "in common %", "one at it, all pass %", "all at it, all pass %", "any %")
    title = (
        f"(d) several artifacts on {n:,} images at the boundary: overall EQUIVALENT, and any row"
    )
    return Section(title, header, tuple(lines))


def _rerun(generator: np.random.Generator, start: int, shares: Sequence[float], most: int) -> int:
    n, b, c = start, 0, 0
    more = start
    while True:
        new = generator.multinomial(more, shares)
        b, c = b + int(new[0]), c + int(new[1])
        verdict = _fixed(b, c, n)
        needed = images_needed(b, c, n, LIMIT) if verdict == UNDECIDED else None
        if needed is None or needed > most:
            return verdict
        n, more = needed, needed - n


def repeated(generator: np.random.Generator, sizes: Sizes) -> Section:
    """(e) Repeated looks until decided: fixed looks at the advised number, or --sequential."""
    lines, shares = [], (0.015, 0.005)
    for start in (512, 2_000):
        chances, most = (*shares, 1 - sum(shares)), sizes.longest
        runs = (_rerun(generator, start, chances, most) for _ in range(sizes.reruns))
        old = np.fromiter(runs, np.int64)
        verdict, first = sequential(generator, shares, sizes, look_at=start)
        new = np.where(first == UNDECIDED, verdict, first)
        wrong, alarm = drawn(old == EQUIVALENT), drawn(old == REGRESSED)
        lines.append(Line((f"{start:,}", "fixed looks until decided", wrong, alarm)))
        wrong, alarm = drawn(new == EQUIVALENT), drawn(new == REGRESSED)
        cells = (f"{start:,}", "one look, then --sequential", wrong, alarm)
        # The sum of one look and one sequential test: 2.6 + 2.5 and 2.9 + 2.5.
        lines.append(Line(cells, ((wrong, 5.1), (alarm, 5.4))))
    header = ("first look at", "then", "EQUIVALENT %", "REGRESSED %")
    title = f"(e) looking again until decided, to {sizes.longest:,} images, true drop = max-drop"
    return Section(title, header, tuple(lines))


def whole_batches(generator: np.random.Generator, sizes: Sizes) -> Section:
    """(f) A share of batches is entirely wrong, which no interval over images covers."""
    lines, accuracy = [], 0.86
    share = LIMIT / 100 / accuracy
    for n in (512, 5_120, IMAGENET):  # whole batches
        bad = generator.binomial(n // BATCH, share, sizes.runs)
        lost = generator.binomial(bad * BATCH, accuracy)
        passed = drawn(fixed(lost, np.zeros_like(lost), n) == EQUIVALENT)
        calls = -(-n // BATCH) + min(n, TWOS) + BATCH_SIZES
        seen = Share(100 * (1 - (1 - share) ** calls))
        cells = (f"{n:,}", f"{100 * share:.2f}", passed, f"{calls:,}", seen)
        lines.append(Line(cells, ((seen, -95.0),)))
    header = ("images", "bad batches %", "EQUIVALENT %", "calls C", "1-(1-p)^C %")
    title = (
        f"(f) batches of {BATCH} entirely wrong, true drop = max-drop; a fault in one of C calls"
    )
    return Section(title, header, tuple(lines))


def _missed(published: float, n: int, deficit: float) -> float:
    """Return the exact probability, in percent, that a worse reference is detected on n images."""
    least, most = passing_hits(published, n)
    share = (published - deficit) / 100
    hits = np.arange(least, most + 1)
    factorials = log_factorials(n)
    logs = factorials[n] - factorials[hits] - factorials[n - hits]
    logs = logs + hits * math.log(share) + (n - hits) * math.log1p(-share)
    return 100 * (1 - float(np.exp(logs).sum()))


DEFICITS = (0.0, 0.05, 0.3, 1.0, 3.0, 5.0)


def power(published: float = 86.0) -> Section:
    """(g) How often the check of PyTorch's accuracy detects a deficit, enumerated."""
    lines = []
    for n in (1, 10, 100, 500, 1_000, 5_000, IMAGENET):
        chances = [Share(_missed(published, n, deficit)) for deficit in DEFICITS]
        excludes = excluded_deficit(published, n)
        confirms = "yes" if excludes is not None and excludes <= CONFIRMING else "no"
        shown = "none" if excludes is None else f"{excludes:.2f}"
        bounds = [(Share(_missed(published, n, excludes)), -95.0)] if excludes else []
        cells = (f"{n:,}", *chances, shown, confirms)
        lines.append(Line(cells, (*bounds, (chances[0], 2.5))))
    whole = [whole_set_status(deficit) for deficit in DEFICITS]
    chances = [Share(100.0 * (status == "missed")) for status in whole]
    bounds = [(chance, -95.0) for chance, gap in zip(chances, DEFICITS, strict=True) if gap > 0.1]
    cells = ("the whole set", *chances, "0.10", "to 0.005 points")
    lines.append(Line(cells, ((chances[0], 2.5), *bounds)))
    header = ("sample of", *map(str, DEFICITS), "excludes", "confirms")
    title = f"(g) the baseline, {published:g} % published: % missed at a deficit of so many points"
    return Section(title, header, tuple(lines))


def sections(sizes: Sizes, seed: int) -> Iterable[Section]:
    """Return all sections in order."""
    generator = np.random.default_rng(seed)
    if differing := Bets().check(generator):
        raise SystemExit(f"the audit's bets differ from SequentialDrop on {differing} counts")
    yield coverage(sizes)
    yield boundary(sizes)
    for section in (looks, several, repeated, whole_batches):
        yield section(generator, sizes)
    yield power()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; return 1 if a bound is violated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="draw less: seconds")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    broken: list[str] = []
    for section in sections(QUICK if chosen.quick else Sizes(), chosen.seed):
        print(section, flush=True)
        broken += [
            f"{section.title[:3]} {each}" for line in section.lines for each in line.broken()
        ]
    print("\n".join(broken) if broken else "every bound is kept")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
