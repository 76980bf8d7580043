"""The tolerance of each precision, and the sentence about repeated calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from made_results import GRAPH, again

from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.repeatability import Repeatability, repeatability_of
from clipdeploy.verification.results import Results

Make = Callable[..., Results]
One = Callable[..., ImageRecord]
# The noise of every made-up record, 0.04 of 100: 34 dB.
OWN = 0.0004


def found(
    made: Make, one: One, precision: str = "fp32", of: str = "graph", **call: Any
) -> Repeatability:
    """The result of one call over 16 images, besides 500 calls with equal answers.

    The artifact is a graph or an engine (``of``).
    """
    entry = replace(GRAPH, precision=precision, kind=of)
    results = made([one(i) for i in range(64)], artifacts=(entry,))
    odd = again(1, **{"signal": 1600.0, "size": 16, "kind": "mixed", **call})
    first, *rest = results.batches
    batches = (replace(first, repeats=((*again(500), *odd),)), *rest)
    return repeatability_of(replace(results, batches=batches), 0, entry)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-cpu"])
def test_differences_of_the_artifacts_own_size_are_its_precision(
    precision: str, made: Make, one: One
) -> None:
    assert found(made, one, precision, noise=4 * OWN * 1600, worst=16 * OWN)
    assert not found(made, one, precision, noise=5 * OWN * 1600, worst=16 * OWN)
    assert not found(made, one, precision, noise=4 * OWN * 1600, worst=18 * OWN)


@pytest.mark.parametrize(
    ("precision", "kind", "rounding"),
    [
        ("fp32", "graph", 1e-9),
        ("fp32", "engine", 1e-6),
        ("fp16", "graph", 1e-5),
        ("int8", "", 1e-4),
    ],
)
def test_an_exact_artifact_still_rounds(
    precision: str, kind: str, rounding: float, made: Make, one: One
) -> None:
    def exact(number: int, **options: Any) -> ImageRecord:
        record = one(number, **options)
        outcome = type(record.outcomes[0])(record.outcomes[0].answer, 0.0, 0.0, 0.0, 1.0)
        return type(record)(
            record.image, record.label, "", record.signal, record.reference, (outcome,)
        )

    assert found(made, exact, precision, kind, noise=0.9 * rounding * 1600, worst=3.9 * rounding)
    assert not found(made, exact, precision, kind, noise=1.1 * rounding * 1600, worst=rounding)
    assert not found(made, exact, precision, kind, noise=0.0, worst=4.1 * rounding)


def test_a_bad_artifact_is_no_excuse(made: Make, one: One) -> None:
    """At 3 dB from the reference: a call may still differ by no more than 20 dB."""

    def bad(number: int, **options: Any) -> ImageRecord:
        record = one(number, **options)
        outcome = type(record.outcomes[0])(record.outcomes[0].answer, 9.0, 9.0, 50.0, 0.1)
        return type(record)(
            record.image, record.label, "", record.signal, record.reference, (outcome,)
        )

    assert found(made, bad, "int8", noise=0.01 * 1600, worst=0.02)
    assert not found(made, bad, "int8", noise=0.03 * 1600, worst=0.03)


def test_what_is_said(made: Make, one: One) -> None:
    good = found(made, one, "int8", noise=0.0016, worst=1e-6)
    assert good
    assert good.calls == 4 + 500 + 1 + 48
    assert good.sizes == (2, 16)
    assert good.worst_db == pytest.approx(60.0)
    assert good.sentence == (
        "repeatable: 549 repeated calls with up to 16 images each, 60.0 dB at worst; "
        "faults are excluded that affect more than 0.66 % of all calls, or 52 % of those with "
        "16 images or more"
    )
    bad = found(made, one, "int8", noise=160.0, worst=0.5)
    assert not bad
    assert bad.sentence.startswith(
        "not repeatable: run 16 at once in another order, the logits of an image are 3.0 dB from "
        "the first ones, and 10.0 dB over 16;"
    )
    for call, shown in (
        ({"kind": "again"}, "run in the same batch again"),
        ({"kind": "alone", "size": 1}, "run one by one"),
        ({"kind": "profile", "profile": 2, "size": 8}, "run 8 at once in profile 2"),
    ):
        unsteady = found(made, one, noise=160.0, worst=0.5, **call)
        assert shown in unsteady.sentence
