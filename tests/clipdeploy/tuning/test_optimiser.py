"""The choice is compared with all combinations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, combinations

import numpy as np
import pytest

from clipdeploy.tuning.optimiser import OutOfTimeError, cheapest

NAMES = tuple("abcdefgh")


def every(names: tuple[str, ...]) -> list[frozenset[str]]:
    sizes = (combinations(names, size) for size in range(len(names) + 1))
    return [frozenset(chosen) for chosen in chain.from_iterable(sizes)]


def problem(seed: int) -> tuple[dict[str, float], dict[str, float], float]:
    generator = np.random.default_rng(seed)
    power = dict(zip(NAMES, np.exp(generator.normal(0, 1.5, len(NAMES))).tolist(), strict=True))
    gain = dict(zip(NAMES, generator.choice([1.0, 3.0, 4.0], len(NAMES)).tolist(), strict=True))
    return power, gain, float(generator.uniform(0.2, 0.9)) * sum(power.values())


def found_by(
    power: dict[str, float],
    gain: dict[str, float],
    feasible: Callable[[frozenset[str]], bool],
) -> tuple[frozenset[str], bool]:
    """The choice if costs add up."""
    return cheapest(power, gain, lambda chosen: -sum(gain[n] for n in chosen), feasible)


@pytest.mark.parametrize("seed", range(40))
def test_nearly_as_cheap_as_the_cheapest(seed: int) -> None:
    power, gain, limit = problem(seed)
    # Errors interact: pairs of neighbours add more than their sum.
    extra = np.random.default_rng(seed + 100).exponential(0.3, len(NAMES))

    def feasible(chosen: frozenset[str]) -> bool:
        pairs = sum(e for e, a, b in zip(extra, NAMES, NAMES[1:], strict=False) if {a, b} <= chosen)
        return sum(power[name] for name in chosen) + pairs <= limit

    found, finished = found_by(power, gain, feasible)
    assert finished
    assert not found or feasible(found)
    best = max(sum(gain[n] for n in c) for c in every(NAMES) if not c or feasible(c))
    whole = 2.0 * sum(gain.values())
    # INT8 halves a Linear's cost, so all FP16 costs twice the gains.
    assert whole - sum(gain[n] for n in found) <= 1.05 * (whole - best)


def test_everything_that_helps_if_all_is_feasible() -> None:
    power, gain, _ = problem(0)
    asked: list[frozenset[str]] = []

    def feasible(chosen: frozenset[str]) -> bool:
        asked.append(chosen)
        return True

    found, _ = found_by(power, gain | {"a": -1.0}, feasible)
    assert found == frozenset(NAMES) - {"a"}
    assert len(asked) == 1


def test_nothing_if_nothing_is_feasible() -> None:
    power, gain, _ = problem(1)
    assert found_by(power, gain, lambda chosen: not chosen) == (frozenset(), True)


def test_out_of_time_keeps_the_best_so_far() -> None:
    power, gain, limit = problem(2)
    calls = 0

    def feasible(chosen: frozenset[str]) -> bool:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OutOfTimeError
        return sum(power[name] for name in chosen) <= limit

    found, finished = found_by(power, gain, feasible)
    assert not finished
    assert sum(power[name] for name in found) <= limit


@pytest.mark.parametrize("seed", range(20))
def test_pairs_that_share_a_kernel(seed: int) -> None:
    """Alone, a Linear of a pair costs more in INT8; both together cost less."""
    power, gain, limit = problem(seed)
    pairs = [frozenset("ab"), frozenset("cd"), frozenset("ef")]

    def cost(chosen: frozenset[str]) -> float:
        # 6 for the kernel that either of the two needs, of which each gain has half.
        shared = sum(6.0 for pair in pairs if pair & chosen)
        return shared - sum(gain[name] + 3.0 * any(name in p for p in pairs) for name in chosen)

    def feasible(chosen: frozenset[str]) -> bool:
        return sum(power[name] for name in chosen) <= limit

    found, _ = cheapest(power, gain, cost, feasible)
    assert feasible(found)
    # Nothing is left in INT8 that costs more than it saves.
    assert all(cost(found) <= cost(found - {name}) for name in found)
    assert cost(found) <= 0
