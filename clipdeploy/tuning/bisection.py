"""Where a graph leaves its reference: the error as it grows, and what each part adds by itself.

Both run on the same images as one :class:`clipdeploy.tuning.chain.Chain`.  With P(e) the power of
an error e and P(s) that of the reference, all in dB as 10 log10(P(s) / P(e)):

    grown      behind each block, the whole network being the candidate's
    own        behind one part, it alone being the candidate's, on the reference's input
    alone      of the logits, one part alone being the candidate's
    restored   of the logits, one part alone being the reference's

``share`` is a part's P(e) of ``alone`` over the sum of all parts'.  Powers of small independent
errors add up, so shares are what each part adds by itself; ``restored`` is the check that takes
interactions in: it rises by 10 log10(1 / (1 - share)) where they are independent.

A run that differs from an earlier one in block k only starts at block k.  ``restored`` runs take
the candidate through the rest of the network, which is slow where halves are emulated: in a large
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

# Up to so many parts all are restored, the demo's 32 among them; of more, these.
_FEW_PARTS, _RESTORED_PARTS = 40, 12


@dataclass(frozen=True)
class Batch:
    """Images as the reference takes them, (B, ...), and their labels (B,) if there are any."""

    images: Tensor
    labels: Labels | None


@dataclass(frozen=True)
class PartError:
    """One switch: a Linear, ``patch_embed``, ``head`` or what lies between a block's Linears.

    dB as in the module's docstring, None where there is no error at all and ``BROKEN_DB`` where
    there is no finite output.  ``alone_drop`` and ``restored_drop`` are points of top-1 lost
    against the reference in the two runs, or percent of answers changed without labels; ``cost``
    is what restoring it gives back.  The last two, and ``restored_db``, are None where the part
    was not restored.
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
    """A segment as a whole; see :class:`PartError`.  ``grown_db`` is of its output."""

    name: str
    grown_db: float | None
    alone_db: float | None
    restored_db: float | None
    alone_drop: float
    restored_drop: float


@dataclass(frozen=True)
class Measurement:
    """All that was measured over ``images``; ``fidelity`` is of the candidate as a whole."""

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
    """Signal and error of a tensor, summed over batches."""

    def __init__(self) -> None:
        self._signal = self._error = 0.0

    def add(self, reference: Tensor, found: Tensor) -> None:
        self._signal += float(np.square(reference).sum(dtype=np.float64))
        self._error += float(np.square(found - reference).sum(dtype=np.float64))

    @property
    def db(self) -> float | None:
        return ratio_db(self._signal, self._error)


def _groups(segment: Segment) -> dict[str, frozenset[str]]:
    """What is switched together: each switch by itself, then the segment as a whole."""
    groups = {switch: frozenset((switch,)) for switch in segment.switches}
    return groups | {segment.name: frozenset(segment.switches)}


class _Runs:
    """A meter for each run of the network, and one for each tensor that is compared."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        keys = [key for segment in chain.segments for key in _groups(segment)]
        self.whole = FidelityMeter()
        self.alone = {key: FidelityMeter() for key in keys}
        self.restored: dict[str, FidelityMeter] = {}
        self.grown = {segment.name: _Power() for segment in chain.segments}
        self.own = {key: _Power() for key in keys}

    def add(self, batch: Batch, advance: Callable[[int], None]) -> None:
        """The runs of one batch with the reference but for one part."""
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
        """The blocks, and the parts that are worth it."""
        blocks = [segment.name for segment in self._chain.segments]
        powers = {key: _power(meter.result()) for key, meter in self.alone.items()}
        parts = sorted((key for key in powers if key not in blocks), key=lambda key: -powers[key])
        return (*blocks, *(parts if len(powers) <= _FEW_PARTS else parts[:_RESTORED_PARTS]))

    def restore(
        self, batch: Batch, wanted: Collection[str], advance: Callable[[int], None]
    ) -> None:
        """The runs of one batch with the candidate but for one part of those ``wanted``."""
        chain = self._chain
        candidate = [batch.images, *chain.run(batch.images, chain.everything)]
        logits = chain.run(batch.images, ())[-1]
        for index, segment in enumerate(chain.segments):
            for key, switches in _groups(segment).items():
                if key not in wanted:
                    continue
                left = chain.step(index, candidate[index], chain.everything - switches)
                left = chain.rest(left, chain.everything, index)
                meter = self.restored.setdefault(key, FidelityMeter())
                meter.add(left, logits, batch.labels)
                advance(1)


def measure(
    chain: Chain, batches: Iterable[Batch], count: int, progress: Progress = SILENT
) -> Measurement:
    """Run everything over ``count`` batches of images, which are held in memory.

    Raises:
        GraphError: ONNX Runtime fails inside a graph.
    """
    runs = _Runs(chain)
    held = []
    with progress.task("bisect: each part alone", count * len(runs.alone)) as advance:
        for batch in batches:
            runs.add(batch, advance)
            held.append(batch)
    wanted = runs.to_restore()
    with progress.task("bisect: parts restored", count * len(wanted)) as advance:
        for batch in held:
            runs.restore(batch, wanted, advance)
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
    """The logits' signal over error in dB: None without error, ``BROKEN_DB`` if not finite."""
    return fidelity.sqnr_db if fidelity.finite else BROKEN_DB


def _power(fidelity: Fidelity) -> float:
    """The logits' error over their signal; what is not finite counts as a thousand signals."""
    db = error_db(fidelity)
    return 0.0 if db is None else 10 ** (-max(db, -30.0) / 10)
