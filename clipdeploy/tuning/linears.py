"""What can be seen about each Linear of a candidate without comparing any output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from clipdeploy.tuning.chain import Chain
from clipdeploy.tuning.coordinates import weight_pair
from clipdeploy.tuning.taps import InputPeaks
from exporters.metrics import sqnr_db

__all__ = ["LinearFacts", "linear_facts"]

# A channel within this factor of the largest one is one of the outliers.
_NEAR_THE_LARGEST = 2.0


@dataclass(frozen=True)
class LinearFacts:
    """A Linear's input and weight, in the candidate's own coordinates.

    ``peak`` and ``median_peak``: |x| of the largest and of the median channel; ``outliers``: how
    many come near the largest; ``clipped``: the share of values outside the range that ends at
    ``limit``, None where the input is not quantised.  ``weight_db``: the reference's weight over
    the difference, None where there is none; ``weight_ratio``: the candidate's norm over the
    reference's; ``weight_levels``: how many int8 levels it uses, 0 if it is no int8.
    """

    name: str
    peak: float
    median_peak: float
    outliers: int
    limit: float | None
    clipped: float
    weight_db: float | None
    weight_ratio: float
    weight_levels: int


def linear_facts(chain: Chain, name: str, peaks: InputPeaks) -> LinearFacts:
    """The facts of the Linear ``name``.

    Raises:
        GraphError: a graph has no such Linear.
    """
    expected, found = weight_pair(chain.reference, chain.candidate, chain.bridges, name)
    largest = float(peaks.peaks.max(initial=0.0))
    integers = chain.candidate.integers(name)
    return LinearFacts(
        name=name,
        peak=largest,
        median_peak=float(np.median(peaks.peaks)),
        outliers=int((peaks.peaks * _NEAR_THE_LARGEST > largest).sum()),
        limit=peaks.limit if math.isfinite(peaks.limit) else None,
        clipped=peaks.clipped,
        weight_db=sqnr_db(expected, found),
        weight_ratio=float(np.linalg.norm(found)) / max(float(np.linalg.norm(expected)), 1e-30),
        weight_levels=0 if integers is None else len(np.unique(integers)),
    )
