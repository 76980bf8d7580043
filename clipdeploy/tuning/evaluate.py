"""Evaluates combinations of products on the search images, each once, and saves the results.

The search picks a combination that lost few of the search images, partly by luck: it would lose
more of fresh images.  The counts are therefore compared with expected counts, derived from the size
of the error.  m[i] is the margin in image i's reference logits between its label and the largest
other class, s[i] the root mean square of its logits' error.  A difference of two logits then has
the error s sqrt(2), and the answer changes with probability

    P[i] = Phi(-|m[i]| / (s[i] sqrt(2)))

The sum over correct images is the expected number lost, over wrong images the expected number
gained.  A combination is feasible if

* its drop on the search images is proven to be within the limit, and
* it would be in nine of ten cases on fresh images: with b the larger of lost and expected lost, and
  c the smaller of gained and expected gained, both scaled to the number of fresh images,
  b + 1.28 sqrt(b + c) lost and c gained are within the limit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.passport import TensorSpec
from clipdeploy.tuning.bisection import error_db
from clipdeploy.tuning.chain import Chain, Tensor
from clipdeploy.tuning.images import Labelled
from clipdeploy.tuning.optimiser import OutOfTimeError
from clipdeploy.tuning.pareto import Evaluation
from clipdeploy.tuning.state import SearchState, save_state
from clipdeploy.verification.metrics import FidelityMeter
from clipdeploy.verification.paired import judge_drop

__all__ = ["Counter", "Evaluator", "is_feasible"]

# Images for the error power of each product alone; it only ranks the products.
_POWER_IMAGES = 64
# The 90th percentile of a normal distribution, in standard deviations.
_NINE_IN_TEN = 1.2816


@dataclass
class Counter:
    """Counts lost and gained images over batches, and the expected numbers of both."""

    meter: FidelityMeter = field(default_factory=FidelityMeter)
    expected_lost: float = 0.0
    expected_gained: float = 0.0

    def add(self, logits: Tensor, reference: Tensor, labels: NDArray[np.int64]) -> None:
        """Add a batch: logits and reference logits (B, K), labels (B,)."""
        self.meter.add(logits, reference, labels)
        ours, theirs = logits.astype(np.float64), reference.astype(np.float64)
        rows = np.arange(len(labels))
        own = theirs[rows, labels]
        others = theirs.copy()
        others[rows, labels] = -np.inf
        margin = own - others.max(axis=1)
        size = np.sqrt(np.square(ours - theirs).mean(axis=1))
        # erfc(x) / 2 = Phi(-x sqrt(2)); without any error no answer changes.
        ratios = np.abs(margin) / np.maximum(2 * size, 1e-30)
        flips = np.asarray([math.erfc(ratio) / 2 for ratio in ratios])
        self.expected_lost += float(flips[margin > 0].sum())
        self.expected_gained += float(flips[margin <= 0].sum())

    def result(self) -> Evaluation:
        """The sums so far; if any logits are not finite, all images count as lost."""
        found = self.meter.result()
        if not found.finite:
            return Evaluation(found.images, 0, found.images, error_db(found), found.images, 0.0)
        return Evaluation(
            found.lost,
            found.gained,
            found.images,
            found.sqnr_db,
            self.expected_lost,
            self.expected_gained,
        )


def is_feasible(found: Evaluation, fresh: int, max_drop: float) -> bool:
    """Whether the drop is within ``max_drop``, and would be on ``fresh`` other images."""
    if judge_drop(found.lost, found.gained, found.images, max_drop).verdict != "equivalent":
        return False
    scale = fresh / found.images
    lost = scale * max(found.lost, found.expected_lost)
    gained = scale * min(found.gained, found.expected_gained)
    lost = math.ceil(lost + _NINE_IN_TEN * math.sqrt(lost + gained) - 0.5)
    lost, gained = min(max(lost, 0), fresh), min(round(gained), fresh)
    return lost + gained <= fresh and (
        judge_drop(lost, gained, fresh, max_drop).verdict == "equivalent"
    )


class Evaluator:
    """Evaluates combinations with a chain; saves each result to the search state at once."""

    def __init__(
        self,
        chain: Chain,
        images: Sequence[Labelled],
        tensor: TensorSpec,
        scheme: str,
        state: SearchState,
        path: Path,
        deadline: float | None,
        advance: Callable[[int], None],
    ) -> None:
        self._chain, self._images, self._tensor = chain, images, tensor
        self._scheme, self._state, self._path = scheme, state, path
        self._deadline, self._advance = deadline, advance
        self._reference: list[Tensor] = []
        self._few_logits: list[Tensor] = []
        self._at, self._inputs = 0, list[Tensor]()

    def _check_time(self) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise OutOfTimeError

    def power(self, names: Collection[str]) -> dict[str, float]:
        """Error power of the logits relative to their signal, with one product quantised, by name.

        Raises:
            OutOfTimeError: the time budget is used up.
        """
        known = self._state.power.setdefault(self._scheme, {})
        for name in names:
            if name not in known:
                self._check_time()
                known[name] = self._power(name)
                save_state(self._state, self._path)
            self._advance(1)
        return {name: known[name] for name in names}

    def _power(self, name: str) -> float:
        meter = FidelityMeter()
        chain = self._chain
        index = next(i for i, s in enumerate(chain.segments) if name in s.switches)
        if not self._few_logits:
            self._few_logits = [chain.run(x, ())[-1] for x in self._few()]
        self._move_to(index)
        for x, logits in zip(self._inputs, self._few_logits, strict=True):
            meter.add(chain.rest(chain.step(index, x, {name}), (), index), logits, None)
        db = error_db(meter.result())
        return 0.0 if db is None else float(10 ** (-max(db, -30.0) / 10))

    def _move_to(self, index: int) -> None:
        """Hold the reference's inputs of segment ``index``.

        Products come in the network's order, so no segment of the reference runs twice.
        """
        if not self._inputs or index < self._at:
            self._at, self._inputs = 0, list(self._few())
        for at in range(self._at, index):
            self._inputs = [self._chain.step(at, x, ()) for x in self._inputs]
        self._at = index

    def _few(self) -> Iterator[Tensor]:
        left = _POWER_IMAGES
        for samples, _ in self._images:
            if left > 0:
                yield samples.as_input(self._tensor)[:left]
            left -= len(samples.crops)

    def evaluate(self, quantised: frozenset[str]) -> Evaluation:
        """Evaluate the network with the products ``quantised`` quantised.

        Raises:
            OutOfTimeError: the time budget is used up and the result is not saved yet.
        """
        slot = self._state.slot(self._scheme, quantised)
        if slot not in self._state.evaluations:
            self._check_time()
            self._state.evaluations[slot] = self._run(quantised)
            save_state(self._state, self._path)
        self._advance(1)
        return self._state.evaluations[slot]

    def _run(self, quantised: frozenset[str]) -> Evaluation:
        counter = Counter()
        first = not self._reference
        for index, (samples, labels) in enumerate(self._images):
            x = samples.as_input(self._tensor)
            if first:
                self._reference.append(self._chain.run(x, ())[-1])
            counter.add(self._chain.run(x, quantised)[-1], self._reference[index], labels)
        return counter.result()
