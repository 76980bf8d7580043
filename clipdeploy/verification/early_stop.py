"""Stops a sequential run as soon as every artifact has a verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from clipdeploy.verification.baseline import Expected
from clipdeploy.verification.paired import SequentialDrop
from clipdeploy.verification.results import BatchResult, Results
from clipdeploy.verification.verdicts import Limits, judge_results

__all__ = ["EarlyStop"]


class EarlyStop:
    """Decides after each batch whether a sequential run has every verdict."""

    def __init__(self, wanted: Results, limits: Limits) -> None:
        """``wanted`` has the run key of the run, and no batch yet."""
        self._results, self._limits = wanted, limits
        self._drops = [SequentialDrop(limits.top1) for _ in wanted.run_key.ran]
        self._pixels: set[str] = set()

    def add(self, batch: BatchResult) -> bool:
        """Add a batch; return True as soon as every artifact has a verdict."""
        batches = (*self._results.batches, batch)
        self._results = replace(self._results, batches=batches)
        fresh = []
        for record in batch.records:
            if record.image.pixels not in self._pixels:
                self._pixels.add(record.image.pixels)
                fresh.append(record)
        right = np.asarray([record.reference.right() for record in fresh], bool)
        for number, drop in enumerate(self._drops):
            ours = [record.outcomes[number].answer.right() for record in fresh]
            drop.add(right, np.asarray(ours, bool))
        if not self._drops or any(drop.verdict() == "undecided" for drop in self._drops):
            return False
        # Other conditions of a verdict may need more images than its interval.
        judged = judge_results(self._results, self._limits, Expected("none"))
        return all(row.verdict != "undecided" for row in judged.rows)
