"""Whether an artifact's answers repeat: what was asked again, within its precision's tolerance.

With the artifact's own distance from the reference over all images, q = noise / signal, and the
rounding r of its precision, calls may differ

    over the images of calls of one kind and size      by  4 min(q, 0.0025) + r
    for any single image                               by  16 min(q, 0.0025) + 4 r

of the signal: two results that are each within q of the reference are within 2 q of each other
where their errors are independent; a mean over few images scatters by another factor of two, and an
image's own share more.  The cap (20 dB) holds for an artifact that is far from the reference to
begin with.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.repeats import Repeat, excluded_share
from clipdeploy.verification.results import Asked, Results
from exporters.metrics import BROKEN_DB, ratio_db

__all__ = ["Repeatability", "repeatability_of"]

# Rounding by precision, as noise over signal.  Graphs on ONNX Runtime in float32 repeat within
# 120 dB; an FP32 engine may compute in TF32, which keeps 10 bits (60 dB); float16 keeps 10 bits
# and kernels of another shape add in another order (50 dB); an int8 value may fall to the
# neighbouring level (40 dB).
_GRAPH_FP32 = 1e-9
_ROUNDING = {"fp32": 1e-6, "fp16": 1e-5}
_EIGHT_BITS = 1e-4
_MOST_OWN = 0.0025
# A mean over fewer images says no more than they do one by one.
_MEAN_OF = 16


@dataclass(frozen=True)
class Repeatability:
    """What asking again showed; true if the answers repeat.

    ``calls`` are those for different images, the first ones of the run and those with other
    neighbours; ``sizes`` are the batch sizes and ``profiles`` the engine's profiles that were
    tried; ``images`` how many answers were compared.
    ``sqnr_db`` is of the calls that differ most, ``worst_db`` of the image that does, None where
    all are equal to the bit and -999 where one is not finite; ``changed`` counts other first
    answers.  A fault that spoils ``excluded`` percent of all calls or more would have shown with
    probability 97.5 %, and one that spoils ``excluded_large`` percent of those of a whole batch
    and more, and no smaller ones.
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
            return "in the same batch once more"
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
    """The artifact's noise over the reference's signal, of images with finite logits."""
    pairs = [(r.signal, noise) for r in records if (noise := r.outcomes[lane].noise) is not None]
    signal = math.fsum(signal for signal, _ in pairs)
    return math.fsum(noise for _, noise in pairs) / signal if signal > 0 else 0.0


def _rounding(asked: Asked) -> float:
    if asked.precision == "fp32" and asked.kind == "graph":
        return _GRAPH_FP32
    return _ROUNDING.get(asked.precision, _EIGHT_BITS)


def repeatability_of(results: Results, lane: int, asked: Asked) -> Repeatability:
    """Whether the artifact with this number among those that ran answers alike."""
    own = min(_own_share(results.records, lane), _MOST_OWN)
    rounding = _rounding(asked)
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
    batch = results.question.batch
    large = sum(len(each.records) >= batch for each in results.batches)
    large += sum(repeat.kind == "mixed" and repeat.size >= batch for repeat in repeats)
    excluded, excluded_large = excluded_share(calls), excluded_share(large)
    if bad:
        group = max(bad, key=lambda each: (each.worst, each.mean))
        sentence = (
            f"does not repeat: asked {group.condition}, its logits are {_shown(group.worst)} from "
            f"its first ones for an image, and {_shown(group.mean)} over {group.images:,}; "
            f"{_shown(most_worst)} and {_shown(most_mean)} are its precision's"
        )
    else:
        sentence = (
            f"repeats: asked again in {len(repeats):,} calls, alone and up to "
            f"{max(sizes, default=0)} at once, {_shown(worst)} at worst; excluded are faults "
            f"that spoil more than {excluded:.2g} % of all calls, or {excluded_large:.2g} % of "
            f"those for {batch} images or more"
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
