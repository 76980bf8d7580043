"""The result of a bisection."""

from __future__ import annotations

from dataclasses import dataclass

from clipdeploy.core.display import Renderable, Shown
from clipdeploy.tuning.bisection import Measurement
from clipdeploy.tuning.culprit import Culprit
from clipdeploy.tuning.linears import LinearFacts

__all__ = ["Bisection"]


@dataclass(frozen=True)
class Bisection(Shown):
    """What was compared, the figures, and what they say.

    ``labelled``: drops are points of top-1; otherwise they are percent of answers changed.
    ``culprits`` stand out, worst first; ``sentence`` says it in words.
    """

    model: str
    reference: str
    candidate: str
    precision: str
    data: str
    labelled: bool
    random_weights: bool
    measured: Measurement
    linears: tuple[LinearFacts, ...]
    culprits: tuple[Culprit, ...]
    sentence: str

    def __rich__(self) -> Renderable:
        from clipdeploy.tuning.tables import bisection_table

        return bisection_table(self)
