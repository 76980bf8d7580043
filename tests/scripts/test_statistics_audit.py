"""The statistical audit, drawn quickly.  Shares are percent, margins three standard deviations."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from script_module import load_script

from clipdeploy.verification.paired import Interval


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    return load_script("bench/statistics_audit")


def wald(b: int, c: int, n: int) -> Interval:
    half = 100 * 1.96 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return Interval(100 * (b - c) / n - half, 100 * (b - c) / n + half)


def test_every_bound_is_kept(audit: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(["--quick"]) == 0
    shown = capsys.readouterr().out
    assert [f"({letter})" in shown for letter in "abcdefg"] == [True] * 7
    assert shown.endswith("every bound is kept\n")
    # Seeded: the same table again.
    audit.main(["--quick"])
    assert capsys.readouterr().out == shown


def test_an_interval_that_does_not_cover_is_found_out(audit: ModuleType) -> None:
    broken = [each for line in audit.coverage(audit.QUICK, wald).lines for each in line.broken()]
    assert len(broken) >= 2
    assert any("beyond 94.80" in each for each in broken)


def test_a_bound_is_kept_broken_or_within_the_margin(audit: ModuleType) -> None:
    share = audit.Share
    for kept in ((share(2.6), 2.6), (share(3.0, 0.5), 2.6), (share(94.8), -94.8)):
        assert not list(audit.Line(("x",), (kept,)).broken())
    for broken in ((share(2.7), 2.6), (share(3.2, 0.5), 2.6), (share(94.7), -94.8)):
        assert len(list(audit.Line(("x",), (broken,)).broken())) == 1


def test_the_margin_is_that_of_the_drawing(audit: ModuleType) -> None:
    hits = np.arange(10_000) < 250
    # 3 sqrt(0.025 0.975 / 10,000) = 0.468 %.
    assert audit.drawn(hits).value == pytest.approx(2.5)
    assert audit.drawn(hits).margin == pytest.approx(0.468, abs=1e-3)
    # No hit in n: the rule of three, 3/n.
    assert audit.drawn(hits[5000:]).margin == pytest.approx(100 * 3 / 5000)


def test_the_audits_bets_are_the_products(audit: ModuleType) -> None:
    assert audit.Bets().check(np.random.default_rng(1)) == 0
    exchanged = audit.Bets()
    exchanged._factors.reverse()
    assert exchanged.check(np.random.default_rng(1)) > 30


def test_fixed_looks_until_decided_are_wrong_too_often_and_a_sequential_test_is_not(
    audit: ModuleType,
) -> None:
    sizes = replace(audit.QUICK, reruns=2000, paths=2000, longest=12_000)
    lines = audit.repeated(np.random.default_rng(2), sizes).lines
    for old, new in zip(lines[::2], lines[1::2], strict=True):
        wrong, fair = old.cells[2], new.cells[2]
        # More than one look may cost, and more than a look and a sequential test together.
        assert wrong.value - wrong.margin > 2.6
        assert wrong.value > 5.1
        assert fair.value - fair.margin <= 5.1
        assert fair.value < wrong.value


def test_errors_of_whole_batches_are_what_asking_again_is_for(audit: ModuleType) -> None:
    for line in audit.whole_batches(np.random.default_rng(3), audit.QUICK).lines:
        passed, seen = line.cells[2], line.cells[4]
        # The interval counts images: at the boundary it passes ten times as often as it says.
        assert passed.value - passed.margin > 25
        assert seen.value > 99


def test_the_baselines_power(audit: ModuleType) -> None:
    *samples, whole = audit.power().lines
    deficits = ["0.0", "0.05", "0.3", "1.0", "3.0", "5.0"]
    shares = dict(zip(deficits, samples[-1].cells[1:7], strict=True))
    # Three of four references that are 0.3 points too low pass a sample of 50,000.
    assert 20 < shares["0.3"].value < 30
    assert [share.value for share in whole.cells[1:7]] == [0, 0, 100, 100, 100, 100]
    assert samples[0].cells[7:] == ("none", "no")
