"""Checks whether an artifact's answers are repeatable, within the tolerance of its precision.

q = noise / signal is the artifact's distance from the reference over all images, and r the rounding
of its precision. Repeated calls may differ

    over the images of calls of one kind and size      by  4 min(q, 0.0025) + r
    for any single image                               by  16 min(q, 0.0025) + 4 r

of the signal. Two results that are each within q of the reference are within 2 q of each other if
their errors are independent; a mean over few images varies by another factor of two, and the share
of a single image by more. The cap (20 dB) is for artifacts that are far from the reference.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.repeats import Repeat, excluded_share
from clipdeploy.verification.results import ArtifactEntry, Results
from exporters.metrics import BROKEN_DB, ratio_db

__all__ = ["Repeatability", "repeatability_of"]

# Rounding by precision, as noise over signal. Graphs on ONNX Runtime in float32 repeat within
# 120 dB; another program's FP32 engine may compute in TF32, which keeps 10 bits (60 dB); float16
# keeps 10 bits and kernels of another shape add in another order (50 dB); an int8 value may round
# to the neighbouring level (40 dB).
_GRAPH_FP32 = 1e-9
_ROUNDING = {"fp32": 1e-6, "fp16": 1e-5}
_EIGHT_BITS = 1e-4
_MOST_OWN = 0.0025
# A mean over fewer images adds nothing to their individual checks.
_MEAN_OF = 16


@dataclass(frozen=True)
class Repeatability:
    """The outcome of the repeated calls; true if the answers are repeatable.

    ``calls`` counts calls on different images: the first calls of the run and the repeated ones
    with other neighbours. ``sizes`` are the batch sizes and ``profiles`` the number of engine
    profiles that were tried; ``images`` counts the compared answers. ``sqnr_db`` is that of the
    calls that differ most, ``worst_db`` of the image that differs most, None if all are equal to
    the bit and -999 if one is not finite; ``changed`` counts different top-1 answers. A fault that
    affects at least ``excluded`` percent of all calls would have been detected with probability
    97.5 %, and so would one that affects at least ``excluded_large`` percent of the calls of a
    whole batch or more, and no smaller calls.
    """

    steady: bool
    calls: int
    images: int
    sizes: tuple[int, ...]
    profiles: int
    sqnr_db: float | None
    worst_db: float | None
    changed: int
    excluded: float
    excluded_large: float
    sentence: str

    def __bool__(self) -> bool:
        return self.steady


@dataclass(frozen=True)
class _Group:
    """Calls of one kind, size and profile."""

    kind: str
    size: int
    profile: int | None
    images: int
    mean: float
    worst: float

    @classmethod
    def of(cls, repeats: Sequence[Repeat]) -> _Group:
        first = repeats[0]
        broken = any(repeat.noise is None for repeat in repeats)
        noise = math.inf if broken else math.fsum(repeat.noise or 0.0 for repeat in repeats)
        signal = math.fsum(repeat.signal for repeat in repeats)
        worst = math.inf if broken else max(repeat.worst or 0.0 for repeat in repeats)
        images = sum(repeat.size for repeat in repeats)
        mean = noise / signal if signal > 0 else (math.inf if noise else 0.0)
        return cls(first.kind, first.size, first.profile, images, mean, worst)

    @property
    def condition(self) -> str:
        """How these calls were made."""
        if self.kind == "again":
            return "in the same batch again"
        if self.kind == "alone":
            return "one by one"
        if self.profile is not None:
            return f"{self.size} at once in profile {self.profile}"
        return f"{self.size} at once in another order"


def _shown(share: float) -> str:
    found = ratio_db(1.0, share)
    if found is None:
        return "equal"
    return "NaN or infinite" if found == BROKEN_DB else f"{found:.1f} dB"


def _own_share(records: Iterable[ImageRecord], lane: int) -> float:
    """Return the artifact's noise over the reference's signal, for images with finite logits."""
    pairs = [(r.signal, noise) for r in records if (noise := r.outcomes[lane].noise) is not None]
    signal = math.fsum(signal for signal, _ in pairs)
    return math.fsum(noise for _, noise in pairs) / signal if signal > 0 else 0.0


def _rounding(entry: ArtifactEntry) -> float:
    if entry.precision == "fp32" and entry.kind == "graph":
        return _GRAPH_FP32
    return _ROUNDING.get(entry.precision, _EIGHT_BITS)


def repeatability_of(results: Results, lane: int, entry: ArtifactEntry) -> Repeatability:
    """Judge the repeated calls of the artifact with index ``lane`` among those that ran."""
    own = min(_own_share(results.records, lane), _MOST_OWN)
    rounding = _rounding(entry)
    most_mean, most_worst = 4 * own + rounding, 16 * own + 4 * rounding
    kinds: dict[tuple[str, int, int], list[Repeat]] = defaultdict(list)
    repeats = results.repeats(lane)
    for repeat in repeats:
        profile = -1 if repeat.profile is None else repeat.profile
        kinds[repeat.kind, repeat.size if repeat.kind != "again" else 0, profile].append(repeat)
    groups = [_Group.of(each) for each in kinds.values()]
    bad = [
        group
        for group in groups
        if group.worst > most_worst or (group.images >= _MEAN_OF and group.mean > most_mean)
    ]
    calls = sum(bool(batch.records) for batch in results.batches)
    calls += sum(repeat.kind == "mixed" for repeat in repeats)
    mean = max((group.mean for group in groups), default=0.0)
    worst = max((group.worst for group in groups), default=0.0)
    sizes = tuple(sorted({repeat.size for repeat in repeats}))
    batch = results.run_key.batch
    large = sum(len(each.records) >= batch for each in results.batches)
    large += sum(repeat.kind == "mixed" and repeat.size >= batch for repeat in repeats)
    excluded, excluded_large = excluded_share(calls), excluded_share(large)
    samples = f"{results.run_key.tower}s"
    one = "a text" if results.run_key.tower == "text" else "an image"
    output = "embeddings" if results.run_key.task == "embedding" else "logits"
    if bad:
        group = max(bad, key=lambda each: (each.worst, each.mean))
        sentence = (
            f"not repeatable: run {group.condition}, the {output} of {one} are "
            f"{_shown(group.worst)} from the first ones, and {_shown(group.mean)} over "
            f"{group.images:,}; its precision allows {_shown(most_worst)} and {_shown(most_mean)}"
        )
    else:
        sentence = (
            f"repeatable: {len(repeats):,} repeated calls with up to {max(sizes, default=0)} "
            f"{samples} each, {_shown(worst)} at worst; faults are excluded that affect more than "
            f"{excluded:.2g} % of all calls, or {excluded_large:.2g} % of those with {batch} "
            f"{samples} or more"
        )
    return Repeatability(
        steady=not bad,
        calls=calls,
        images=sum(repeat.size for repeat in repeats),
        sizes=sizes,
        profiles=len({repeat.profile for repeat in repeats} - {None}),
        sqnr_db=ratio_db(1.0, mean),
        worst_db=ratio_db(1.0, worst),
        changed=sum(repeat.changed for repeat in repeats),
        excluded=excluded,
        excluded_large=excluded_large,
        sentence=sentence,
    )
