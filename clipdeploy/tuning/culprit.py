"""Which parts stand out, and what about them can be seen.

A Linear stands out if both hold:

* its own error is out of line with the other Linears': more than ``_OUT_OF_LINE`` robust standard
  deviations (1.4826 times the median absolute deviation, Iglewicz & Hoaglin 1993) above their
  median in dB.  3.5 is their usual bound for one value; with up to 48 Linears, and errors in dB
  that have longer tails than a normal distribution, 6 leaves healthy models alone.  Linears of one
  network differ by a dB or so where each is as good as INT8 allows: no deviation below 1 dB is
  believed.
* it matters: its share of the logits' error is at least a quarter, so that restoring it gains
  10 log10(1 / (1 - 1/4)) = 1.2 dB or more.

What lies between the Linears is held against its like in the other blocks.  ``patch_embed`` and
``head`` have no like: they stand out with nine tenths of the error, so that restoring one gains
10 dB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clipdeploy.tuning.bisection import Measurement, PartError
from clipdeploy.tuning.linears import LinearFacts

__all__ = ["Culprit", "find_culprits", "verdict"]

_OUT_OF_LINE = 6.0
_LEAST_SPREAD_DB = 1.0
_SHARE, _SHARE_WITHOUT_PEERS = 0.25, 0.9
# Beyond this an error cannot be told from that of the comparison itself, float32's.
_NO_ERROR_DB = 120.0

# What makes a sentence: a weight further from the reference's than the median Linear's, a range
# that cuts off so much, a channel so far above the median channel.
_WEIGHT_DB, _CLIPPED, _PEAK = 10.0, 0.01, 10.0


@dataclass(frozen=True)
class Culprit:
    """A part that stands out, what restoring it gives back, and why, as far as can be seen.

    ``deviations`` is None for a part that has no peers.
    """

    name: str
    deviations: float | None
    share: float
    cost: float
    gain_db: float | None
    reason: str


def _db(value: float | None) -> float:
    return _NO_ERROR_DB if value is None else max(min(value, _NO_ERROR_DB), -30.0)


def _deviations(parts: Sequence[PartError]) -> dict[str, float]:
    """How many robust standard deviations each part's own error lies above its peers' median."""
    own = np.asarray([_db(part.own_db) for part in parts])
    median = float(np.median(own))
    spread = max(1.4826 * float(np.median(np.abs(own - median))), _LEAST_SPREAD_DB)
    return {
        part.name: (median - value) / spread
        for part, value in zip(parts, own.tolist(), strict=True)
    }


def _stand_out(parts: Sequence[PartError]) -> list[tuple[PartError, float | None]]:
    rest = [part for part in parts if part.name.endswith(".rest")]
    single = [part for part in parts if part.name == part.block]
    linears = [part for part in parts if part not in rest and part not in single]
    found: list[tuple[PartError, float | None]] = [
        (part, None) for part in single if part.share >= _SHARE_WITHOUT_PEERS
    ]
    for peers in (linears, rest):
        deviations = _deviations(peers) if peers else {}
        found += [
            (part, deviations[part.name])
            for part in peers
            if deviations[part.name] > _OUT_OF_LINE and part.share >= _SHARE
        ]
    return sorted(found, key=lambda item: -item[0].share)


def find_culprits(measured: Measurement, facts: Mapping[str, LinearFacts]) -> tuple[Culprit, ...]:
    """The parts that stand out, the worst first."""
    whole = measured.fidelity.sqnr_db
    return tuple(
        Culprit(
            name=part.name,
            deviations=deviations,
            share=part.share,
            cost=part.cost or 0.0,
            gain_db=None if whole is None else _db(part.restored_db) - whole,
            reason=_reason(part.name, facts),
        )
        for part, deviations in _stand_out(measured.parts)
    )


def _reason(name: str, facts: Mapping[str, LinearFacts]) -> str:
    if name not in facts:
        return ""
    fact = facts[name]
    weights = [_db(other.weight_db) for other in facts.values()]
    if _db(fact.weight_db) < float(np.median(weights)) - _WEIGHT_DB:
        if not 0.5 < fact.weight_ratio < 2:
            return f"its weight is {fact.weight_ratio:.3g} times the reference's"
        if fact.weight_levels:
            return f"its weight takes only {fact.weight_levels} of 255 levels"
        return f"its weight is {_db(fact.weight_db):.0f} dB away from the reference's"
    if fact.clipped > _CLIPPED:
        return (
            f"its range ends at {fact.limit:.3g} and cuts off {100 * fact.clipped:.0f} % "
            f"of an input that reaches {fact.peak:.3g}"
        )
    if fact.median_peak > 0 and fact.peak > _PEAK * fact.median_peak:
        channels = "one channel" if fact.outliers == 1 else f"{fact.outliers} channels"
        return (
            f"its input has {channels} at {fact.peak:.3g}, the median one at {fact.median_peak:.3g}"
        )
    return ""


def verdict(measured: Measurement, culprits: Sequence[Culprit], *, labelled: bool) -> str:
    """The finding in one plain sentence for each culprit, or one that says there is none."""
    whole = measured.fidelity
    if whole.sqnr_db is None and whole.finite:
        return "Nothing to find: the logits are equal to the reference's."
    if not culprits:
        worst = max(measured.parts, key=lambda part: part.share)
        return (
            f"No block stands out: {_loss(measured, labelled)}, and {worst.name}, the largest "
            f"part, adds {100 * worst.share:.0f} % of the error."
        )
    return " ".join(_sentence(measured, culprit, labelled) for culprit in culprits)


def _loss(measured: Measurement, labelled: bool) -> str:
    sqnr = _db(measured.fidelity.sqnr_db)
    if labelled:
        return f"the graph loses {measured.drop:.1f} points and has {sqnr:.1f} dB"
    return f"{measured.drop:.1f} % of the answers change, at {sqnr:.1f} dB"


def _sentence(measured: Measurement, culprit: Culprit, labelled: bool) -> str:
    unit = "points" if labelled else "percent of changed answers"
    shown = f"{culprit.cost:.1f} of the {measured.drop:.1f} {unit}"
    if measured.drop <= 0 or culprit.cost <= 0 or not measured.fidelity.finite:
        gain = (
            ""
            if culprit.gain_db is None
            else f": restored, the logits gain {culprit.gain_db:.1f} dB"
        )
        shown = f"{100 * culprit.share:.0f} % of the error{gain}"
    reason = f"; {culprit.reason}" if culprit.reason else ""
    return f"{culprit.name} costs {shown}{reason}."
