"""Measures the error of a candidate graph block by block and part by part.

Reference and candidate run on the same images as one :class:`clipdeploy.tuning.chain.Chain`.  With
P(e) the power of an error e and P(s) that of the reference signal, each figure is
10 log10(P(s) / P(e)) in dB:

    grown      output of each block, with the whole network taken from the candidate
    own        output of one part, with only that part from the candidate, on the reference's input
    alone      logits, with only one part from the candidate
    restored   logits, with only one part from the reference

``share`` is a part's P(e) of ``alone`` divided by the sum over all parts.  Powers of small
independent errors add up, so a share is what the part adds.  ``restored`` includes interactions: it
rises by 10 log10(1 / (1 - share)) if the errors are independent.

A run that differs from an earlier one only in block k starts at block k.  ``restored`` runs the
candidate through the rest of the network, which is slow where float16 is emulated: in a large
network only the blocks and the parts with the largest shares are restored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.tuning.chain import Chain, Tensor
from clipdeploy.tuning.segments import Segment
from clipdeploy.verification.metrics import Fidelity, FidelityMeter
from exporters.metrics import BROKEN_DB, ratio_db

__all__ = ["Batch", "BlockError", "Measurement", "PartError", "measure"]

Labels = NDArray[np.int64]

# Networks with at most _FEW_PARTS parts in their blocks (the demo has at most 36) have all of them
# restored, larger ones the _RESTORED_PARTS with the largest shares.
_FEW_PARTS, _RESTORED_PARTS = 40, 12


@dataclass(frozen=True)
class Batch:
    """Images in the reference's input format, (B, ...), and their labels (B,), None without."""

    images: Tensor
    labels: Labels | None


@dataclass(frozen=True)
class PartError:
    """Errors of one part: a Linear, attention, ``patch_embed``, ``head`` or a block's other nodes.

    dB as in the module docstring: None without any error, ``BROKEN_DB`` if the output is not
    finite.  ``alone_drop`` and ``restored_drop``: points of top-1 lost against the reference in the
    two runs, or percent of answers changed if there are no labels.  ``cost``: what restoring the
    part gains.  ``restored_db``, ``restored_drop`` and ``cost`` are None if it was not restored.
    """

    name: str
    block: str
    own_db: float | None
    alone_db: float | None
    restored_db: float | None
    share: float
    alone_drop: float
    restored_drop: float | None
    cost: float | None


@dataclass(frozen=True)
class BlockError:
    """Errors of a whole segment, see :class:`PartError`; ``grown_db`` is that of its output."""

    name: str
    grown_db: float | None
    alone_db: float | None
    restored_db: float | None
    alone_drop: float
    restored_drop: float


@dataclass(frozen=True)
class Measurement:
    """All errors over ``images`` images; ``fidelity`` is that of the whole candidate."""

    images: int
    fidelity: Fidelity
    parts: tuple[PartError, ...]
    blocks: tuple[BlockError, ...]

    @property
    def drop(self) -> float:
        """Points of top-1 lost, or percent of answers changed without labels."""
        return lost_points(self.fidelity)


def lost_points(fidelity: Fidelity) -> float:
    """Points of top-1 lost, or percent of answers changed without labels."""
    return 100.0 - fidelity.agreement if fidelity.drop is None else fidelity.drop


class _Power:
    """Power of a tensor and of its error, summed over batches."""

    def __init__(self) -> None:
        self._signal = self._error = 0.0

    def add(self, reference: Tensor, found: Tensor) -> None:
        self._signal += float(np.square(reference).sum(dtype=np.float64))
        self._error += float(np.square(found - reference).sum(dtype=np.float64))

    @property
    def db(self) -> float | None:
        return ratio_db(self._signal, self._error)


def _groups(segment: Segment) -> dict[str, frozenset[str]]:
    """Sets of switches to measure: each switch alone, then all switches of the segment."""
    groups = {switch: frozenset((switch,)) for switch in segment.switches}
    return groups | {segment.name: frozenset(segment.switches)}


class _Runs:
    """One meter for each run of the network and for each compared tensor."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        keys = [key for segment in chain.segments for key in _groups(segment)]
        self.whole = FidelityMeter()
        self.alone = {key: FidelityMeter() for key in keys}
        self.restored: dict[str, FidelityMeter] = {}
        self.grown = {segment.name: _Power() for segment in chain.segments}
        self.own = {key: _Power() for key in keys}

    @property
    def count(self) -> int:
        """Number of evaluations of each batch, over both passes."""
        return len(self.alone) + len(self._blocks) + self._restored_parts

    @property
    def _blocks(self) -> list[str]:
        return [segment.name for segment in self._chain.segments]

    @property
    def _restored_parts(self) -> int:
        parts = len(self.alone.keys() - set(self._blocks))
        return parts if parts <= _FEW_PARTS else min(parts, _RESTORED_PARTS)

    def add(self, batch: Batch, advance: Callable[[int], None]) -> None:
        """Evaluate one batch with each part alone from the candidate."""
        chain = self._chain
        reference = [batch.images, *chain.run(batch.images, ())]
        candidate = [batch.images, *chain.run(batch.images, chain.everything)]
        logits, labels = reference[-1], batch.labels
        self.whole.add(candidate[-1], logits, labels)
        for index, segment in enumerate(chain.segments):
            self.grown[segment.name].add(reference[index + 1], candidate[index + 1])
            expected = chain.parts(index, reference[index], (), segment.outputs)
            for key, switches in _groups(segment).items():
                found = chain.parts(index, reference[index], switches, segment.outputs)
                own = segment.first_output(switches) if key in switches else segment.output
                at = segment.outputs.index(own)
                self.own[key].add(expected[at], found[at])
                self.alone[key].add(chain.rest(found[-1], (), index), logits, labels)
                advance(1)

    def to_restore(self) -> tuple[str, ...]:
        """The blocks, and the parts with the largest shares."""
        blocks = self._blocks
        powers = {key: _power(meter.result()) for key, meter in self.alone.items()}
        parts = sorted((key for key in powers if key not in blocks), key=lambda key: -powers[key])
        return (*blocks, *parts[: self._restored_parts])

    def restore(
        self, batch: Batch, chosen: Collection[str], advance: Callable[[int], None]
    ) -> None:
        """Evaluate one batch of the candidate with each of ``chosen`` from the reference."""
        chain = self._chain
        candidate = [batch.images, *chain.run(batch.images, chain.everything)]
        logits = chain.run(batch.images, ())[-1]
        for index, segment in enumerate(chain.segments):
            for key, switches in _groups(segment).items():
                if key not in chosen:
                    continue
                left = chain.step(index, candidate[index], chain.everything - switches)
                left = chain.rest(left, chain.everything, index)
                meter = self.restored.setdefault(key, FidelityMeter())
                meter.add(left, logits, batch.labels)
                advance(1)


def measure(
    chain: Chain, batches: Iterable[Batch], count: int, progress: Progress = SILENT
) -> Measurement:
    """Measure all errors over ``count`` batches of images, which are kept in memory.

    Raises:
        GraphError: ONNX Runtime fails to run a segment.
    """
    runs = _Runs(chain)
    held = []
    # One task for both passes: the remaining time is known from the first evaluation on.
    with progress.task("bisect", count * runs.count) as advance:
        for batch in batches:
            runs.add(batch, advance)
            held.append(batch)
        chosen = runs.to_restore()
        for batch in held:
            runs.restore(batch, chosen, advance)
    images = sum(len(batch.images) for batch in held)
    alone = {key: meter.result() for key, meter in runs.alone.items()}
    restored = {key: meter.result() for key, meter in runs.restored.items()}
    whole = runs.whole.result()
    switches = [(s, segment.name) for segment in chain.segments for s in segment.switches]
    powers = {switch: _power(alone[switch]) for switch, _ in switches}
    summed = sum(powers.values())
    parts = tuple(
        PartError(
            name=switch,
            block=block,
            own_db=runs.own[switch].db,
            alone_db=error_db(alone[switch]),
            share=powers[switch] / summed if summed > 0 else 0.0,
            alone_drop=lost_points(alone[switch]),
            **_restored(restored.get(switch), whole),
        )
        for switch, block in switches
    )
    blocks = tuple(
        BlockError(
            name=name,
            grown_db=runs.grown[name].db,
            alone_db=error_db(alone[name]),
            restored_db=error_db(restored[name]),
            alone_drop=lost_points(alone[name]),
            restored_drop=lost_points(restored[name]),
        )
        for name in (segment.name for segment in chain.segments)
    )
    return Measurement(images, whole, parts, blocks)


def _restored(found: Fidelity | None, whole: Fidelity) -> dict[str, float | None]:
    if found is None:
        return {"restored_db": None, "restored_drop": None, "cost": None}
    drop = lost_points(found)
    return {
        "restored_db": error_db(found),
        "restored_drop": drop,
        "cost": lost_points(whole) - drop,
    }


def error_db(fidelity: Fidelity) -> float | None:
    """SQNR of the logits in dB: None without error, ``BROKEN_DB`` if they are not finite."""
    return fidelity.sqnr_db if fidelity.finite else BROKEN_DB


def _power(fidelity: Fidelity) -> float:
    """Error power of the logits relative to their signal; 1000 if they are not finite."""
    db = error_db(fidelity)
    return 0.0 if db is None else 10 ** (-max(db, -30.0) / 10)
