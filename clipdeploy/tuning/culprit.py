"""Finds the parts whose error is an outlier, and reports the likely cause.

A Linear is an outlier if both conditions hold:

* Its own error exceeds the median of all Linears by more than ``_OUTLIER`` robust standard
  deviations in dB (1.4826 times the median absolute deviation; Iglewicz & Hoaglin 1993).  Their
  usual bound for one value is 3.5.  With up to 48 Linears, and errors in dB whose tails are longer
  than a normal distribution's, 6 gives no false alarm on healthy models.  The Linears of a healthy
  network differ by about 1 dB, so the deviation is taken to be at least 1 dB.
* Its share of the logits' error is at least a quarter, so that restoring it gains at least
  10 log10(1 / (1 - 1/4)) = 1.2 dB.

The attention of a block, and the other nodes between its Linears, are compared with those of the
other blocks.
``patch_embed`` and ``head`` have no peers: they are outliers if they cause nine tenths of the
error, so that restoring one gains 10 dB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clipdeploy.tuning.bisection import Measurement, PartError
from clipdeploy.tuning.linears import LinearFacts

__all__ = ["Culprit", "find_culprits", "verdict"]

_OUTLIER = 6.0
_LEAST_SPREAD_DB = 1.0
_SHARE, _SHARE_WITHOUT_PEERS = 0.25, 0.9
# Errors beyond this are float32 rounding of the comparison itself.
_NO_ERROR_DB = 120.0

# Thresholds for naming a cause: dB of the weight below the median Linear's, share of clipped input
# values, largest channel over the median channel.
_WEIGHT_DB, _CLIPPED, _PEAK = 10.0, 0.01, 10.0


@dataclass(frozen=True)
class Culprit:
    """A part whose error is an outlier.

    ``deviations``: robust standard deviations above the median, None for a part without peers.
    ``cost`` and ``gain_db``: points of top-1 and dB that restoring it gains.  ``reason``: the
    likely cause, empty if unknown.
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
    """Robust standard deviations of each part's own error above the median of ``parts``."""
    own = np.asarray([_db(part.own_db) for part in parts])
    median = float(np.median(own))
    spread = max(1.4826 * float(np.median(np.abs(own - median))), _LEAST_SPREAD_DB)
    return {
        part.name: (median - value) / spread
        for part, value in zip(parts, own.tolist(), strict=True)
    }


def _outliers(parts: Sequence[PartError]) -> list[tuple[PartError, float | None]]:
    rest = [part for part in parts if part.name.endswith(".rest")]
    single = [part for part in parts if part.name == part.block]
    attention = [part for part in parts if part.name.endswith(".attn")]
    linears = [part for part in parts if part not in (*rest, *single, *attention)]
    found: list[tuple[PartError, float | None]] = [
        (part, None) for part in single if part.share >= _SHARE_WITHOUT_PEERS
    ]
    for peers in (linears, attention, rest):
        deviations = _deviations(peers) if peers else {}
        found += [
            (part, deviations[part.name])
            for part in peers
            if deviations[part.name] > _OUTLIER and part.share >= _SHARE
        ]
    return sorted(found, key=lambda item: -item[0].share)


def find_culprits(measured: Measurement, facts: Mapping[str, LinearFacts]) -> tuple[Culprit, ...]:
    """The parts whose error is an outlier, largest share first."""
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
        for part, deviations in _outliers(measured.parts)
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
    """One sentence for each culprit, or one that there is none."""
    whole = measured.fidelity
    if whole.sqnr_db is None and whole.finite:
        return "No error: the logits equal the reference's."
    if not culprits:
        worst = max(measured.parts, key=lambda part: part.share)
        return (
            f"No block stands out: {_loss(measured, labelled)}; the largest part, {worst.name}, "
            f"adds {100 * worst.share:.0f} % of the error."
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
