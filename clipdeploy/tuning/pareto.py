"""Finds the Pareto front of accuracy against cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from calibration.formats import FormatName

__all__ = ["Candidate", "Evaluation", "pareto_front"]


@dataclass(frozen=True)
class Evaluation:
    """Result of a combination on the search images.

    ``lost`` and ``gained``: images that only the reference, or only the combination, classifies
    correctly.  ``sqnr_db``: SQNR of the logits in dB, None without error.  ``expected_lost`` and
    ``expected_gained``: expected numbers for an error of this size, see
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
    """An evaluated combination.

    ``format``: of the products in ``quantised``, which are Linears and the attention of blocks,
    ``blocks.N.attn``.  ``cost``: relative to everything in FP16.  ``quantised_macs``: share of the
    products' MACs in 8 bits.  ``front``: whether it is on the Pareto front.  ``recipe``: path of
    the file to rebuild it with.  ``outputs``: whether the sums of its qkv and fc1 are in 8 bits.
    """

    label: str
    format: FormatName
    quantised: tuple[str, ...]
    cost: float
    quantised_macs: float
    evaluation: Evaluation
    feasible: bool
    front: bool = False
    recipe: str = ""
    outputs: bool = False

    @property
    def drop(self) -> float:
        """Points of top-1 lost against the reference on the search images."""
        return self.evaluation.drop


def pareto_front(points: Iterable[Candidate]) -> list[Candidate]:
    """The points that no other point beats in both cost and drop, cheapest first.

    Of points with equal cost and drop, the one with the higher SQNR is kept.
    """
    front: list[Candidate] = []
    for point in sorted(points, key=lambda p: (p.cost, p.drop, -_sqnr(p))):
        if not front or point.drop < front[-1].drop:
            front.append(point)
    return front


def _sqnr(point: Candidate) -> float:
    db = point.evaluation.sqnr_db
    return float("inf") if db is None else db
