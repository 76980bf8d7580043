"""Which Linears run in INT8: least cost with the accuracy kept.

A knapsack whose weights are guesses: quantised alone, Linear L adds the error power p[L] to the
logits and saves g[L].  Small independent errors add up in power, so that sorting by p[L] / g[L]
fills the knapsack of any size nearly as well as possible (Dantzig 1957, "Discrete-variable extremum
problems").  Whether a combination keeps the accuracy is not guessed but evaluated:

1. bisection for the longest beginning of that order that is feasible,
2. each Linear left out is tried on top, the one that saves most first,
3. each Linear left out is tried in place of one, or of the two noisiest, that save less together.

2 and 3 are repeated until neither helps.  The order of trials depends on p and g alone, so that the
same figures give the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations

__all__ = ["OutOfTimeError", "cheapest"]

# In place of one Linear left out, so many of the noisiest quantised ones are tried.
_SWAPPED = 4

Combination = frozenset[str]


class OutOfTimeError(Exception):
    """Raised by ``feasible`` when no further evaluation may start."""


def cheapest(
    power: Mapping[str, float],
    gain: Mapping[str, float],
    feasible: Callable[[Combination], bool],
) -> tuple[Combination, bool]:
    """The cheapest feasible combination that was found, and whether the search came to its end.

    No Linear at all is taken for feasible.  ``power`` and ``gain`` are by Linear; one that saves
    nothing is left out.
    """
    order = sorted(
        (name for name in power if gain[name] > 0), key=lambda n: (power[n] / gain[n], n)
    )
    best: Combination = frozenset()
    try:
        for best in _beginnings(order, feasible):  # noqa: B007
            pass
        while (better := _improve(best, order, power, gain, feasible)) is not None:
            best = better
    except OutOfTimeError:
        return best, False
    return best, True


def _beginnings(order: list[str], feasible: Callable[[Combination], bool]) -> Iterator[Combination]:
    """Ever longer feasible beginnings of ``order``."""
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
    feasible: Callable[[Combination], bool],
) -> Combination | None:
    """The first feasible combination that costs less, None if no move leads to one."""
    left = sorted((n for n in order if n not in best), key=lambda n: (-gain[n], power[n], n))
    for name in left:
        if feasible(best | {name}):
            return best | {name}
    noisiest = sorted(best, key=lambda n: (-power[n], n))[:_SWAPPED]
    for name in left:
        for count in (1, 2):
            for others in combinations(noisiest, count):
                if sum(gain[other] for other in others) >= gain[name]:
                    continue
                swapped = best - set(others) | {name}
                if feasible(swapped):
                    return swapped
    return None
