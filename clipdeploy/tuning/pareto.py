"""The front of accuracy against cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Candidate", "Evaluation", "pareto_front"]


@dataclass(frozen=True)
class Evaluation:
    """A combination on the search images: those lost, those gained, of how many; logits' dB.

    ``expected_lost`` and ``expected_gained`` are what the size of its error lets expect, see
    :mod:`clipdeploy.tuning.evaluate`.
    """

    lost: int
    gained: int
    images: int
    sqnr_db: float | None
    expected_lost: float = 0.0
    expected_gained: float = 0.0

    @property
    def drop(self) -> float:
        """Points of top-1 lost against the reference."""
        return 100 * (self.lost - self.gained) / self.images


@dataclass(frozen=True)
class Candidate:
    """A point: ``cost`` relative to all FP16, ``drop`` in points on the search images.

    ``int8_macs``: share of the Linears' MACs in INT8; ``recipe``: the file that rebuilds it.
    """

    label: str
    int8: tuple[str, ...]
    cost: float
    int8_macs: float
    evaluation: Evaluation
    feasible: bool
    front: bool = False
    recipe: str = ""

    @property
    def drop(self) -> float:
        """See :class:`Evaluation`."""
        return self.evaluation.drop


def pareto_front(points: Iterable[Candidate]) -> list[Candidate]:
    """The points that no other beats in both cost and drop, the cheapest first.

    Of points that are equal in both, the one with the cleaner logits stays.
    """
    front: list[Candidate] = []
    for point in sorted(points, key=lambda p: (p.cost, p.drop, -_clean(p))):
        if not front or point.drop < front[-1].drop:
            front.append(point)
    return front


def _clean(point: Candidate) -> float:
    db = point.evaluation.sqnr_db
    return float("inf") if db is None else db
