"""Chooses the Linears to run in 8 bits: the lowest cost that preserves the accuracy.

This is a knapsack problem with estimated weights: quantised alone, Linear L adds the error power
p[L] to the logits and saves the cost g[L].  Powers of small independent errors add up, so a greedy
choice in order of p[L] / g[L] is nearly optimal for a knapsack of any size (Dantzig 1957,
"Discrete-variable extremum problems").  The accuracy of a combination is evaluated, not estimated:

1. Find the longest feasible prefix of that order by bisection.
2. Try to remove each Linear that costs more in 8 bits without those that it shares a kernel with.
3. Try to add each remaining Linear, the largest saving first.
4. Try to exchange each remaining Linear for one or two of the noisiest that save less.

Steps 2 to 4 repeat until none helps.  The order of trials depends on p, g and the cost only: the
same values give the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations

__all__ = ["OutOfTimeError", "cheapest"]

# Number of the noisiest quantised Linears that step 4 tries to exchange.
_SWAPPED = 4

Combination = frozenset[str]


class OutOfTimeError(Exception):
    """Raised by ``feasible`` if the time budget is used up before an evaluation."""


def cheapest(
    power: Mapping[str, float],
    gain: Mapping[str, float],
    cost: Callable[[Combination], float],
    feasible: Callable[[Combination], bool],
) -> tuple[Combination, bool]:
    """Find the cheapest feasible combination; also return whether the search finished.

    ``power`` and ``gain`` are by Linear; Linears that save nothing are never quantised.  ``cost``
    is that of a combination: gains only order the trials.  The empty combination is assumed to be
    feasible.
    """
    order = sorted(
        (name for name in power if gain[name] > 0), key=lambda n: (power[n] / gain[n], n)
    )
    best: Combination = frozenset()

    def better(found: Combination) -> bool:
        return cost(found) < cost(best) and feasible(found)

    try:
        if order:
            for best in _prefixes(order, feasible):  # noqa: B007
                pass
        while (found := _improve(best, order, power, gain, better)) is not None:
            best = found
    except OutOfTimeError:
        return best, False
    return best, True


def _prefixes(order: list[str], feasible: Callable[[Combination], bool]) -> Iterator[Combination]:
    """Feasible prefixes of ``order``, each longer than the one before."""
    if feasible(frozenset(order)):
        yield frozenset(order)
        return
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        if feasible(frozenset(order[:middle])):
            low = middle
            yield frozenset(order[:middle])
        else:
            high = middle


def _improve(
    best: Combination,
    order: list[str],
    power: Mapping[str, float],
    gain: Mapping[str, float],
    better: Callable[[Combination], bool],
) -> Combination | None:
    """The first feasible combination that costs less; None if no move finds one."""
    moves = _moves(best, order, power, gain)
    return next((found for found in moves if better(found)), None)


def _moves(
    best: Combination, order: list[str], power: Mapping[str, float], gain: Mapping[str, float]
) -> Iterator[Combination]:
    """The combinations of steps 2 to 4, in the order in which they are tried."""
    left = sorted((n for n in order if n not in best), key=lambda n: (-gain[n], power[n], n))
    noisiest = sorted(best, key=lambda n: (-power[n], n))
    yield from (best - {name} for name in noisiest)
    yield from (best | {name} for name in left)
    for name in left:
        for count in (1, 2):
            for others in combinations(noisiest[:_SWAPPED], count):
                yield best - set(others) | {name}
