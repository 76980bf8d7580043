"""When a sequential run may stop: as soon as every artifact has a verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from clipdeploy.verification.baseline import Expected
from clipdeploy.verification.paired import SequentialDrop
from clipdeploy.verification.results import BatchResult, Results
from clipdeploy.verification.verdicts import Limits, judge_results

__all__ = ["EarlyStop"]


class EarlyStop:
    """Whether a sequential run has every verdict that it can have."""

    def __init__(self, wanted: Results, limits: Limits) -> None:
        """``wanted`` is the run's question, without a batch yet."""
        self._results, self._limits = wanted, limits
        self._drops = [SequentialDrop(limits.top1) for _ in wanted.run_key.ran]
        self._pixels: set[str] = set()

    def add(self, batch: BatchResult) -> bool:
        """One batch more; True as soon as there is a verdict on every artifact."""
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
        # Whatever else a verdict needs may need more images than its interval.
        judged = judge_results(self._results, self._limits, Expected("none"))
        return all(row.verdict != "undecided" for row in judged.rows)
