"""Inspects the input range and weight of each Linear of a candidate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from clipdeploy.tuning.chain import Chain
from clipdeploy.tuning.coordinates import weight_pair
from clipdeploy.tuning.taps import InputPeaks
from exporters.metrics import sqnr_db

__all__ = ["LinearFacts", "linear_facts"]

# A channel within this factor of the largest one counts as an outlier.
_NEAR_THE_LARGEST = 2.0


@dataclass(frozen=True)
class LinearFacts:
    """Facts about a Linear's input and weight, in the candidate's coordinates.

    ``peak`` and ``median_peak``: max |x| of the largest and of the median channel.  ``outliers``:
    number of channels within a factor of two of the largest.  ``limit``: end of the input's range,
    None if the input is not quantised; ``clipped``: share of values outside the range.
    ``weight_db``: SQNR of the weight, None if it equals the reference's.  ``weight_ratio``: norm of
    the candidate's weight over the reference's.  ``weight_levels``: number of int8 levels that the
    weight uses, 0 if it is not int8.
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
    """Inspect the Linear ``name``; ``peaks`` are those of its input.

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
