"""Results that no model was run for, to be told apart and judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from clipdeploy import zoo
from clipdeploy.verification.records import Answer, ImageRecord, Outcome
from clipdeploy.verification.results import Asked, BatchResult, Question, Results
from exporters.artifact import CLIP_MEAN, CLIP_STD, Preprocess, Recipe

MakeResults = Callable[..., Results]

GRAPH = Asked("clip-vit-demo.fp32.onnx", "graph", "fp32", "a" * 64, "ONNX Runtime (CPU)")
QUESTION = Question(
    model=zoo.DEMO,
    weights="b" * 64,
    random_weights=False,
    recipe=Recipe(),
    preprocess=Preprocess(32, CLIP_MEAN, CLIP_STD),
    reference="PyTorch",
    classes=10,
    class_names=tuple("0123456789"),
    artifacts=(GRAPH,),
    images=0,
    labelled=True,
    entries="c" * 64,
    problems=(),
    calibrated="",
    batch=16,
    sequential=None,
    threads=1,
    versions={"torch": "2"},
)


def answer(label: int | None, *, right: bool) -> Answer:
    """An answer that is right about ``label``, or off by one with the label in the second place."""
    label, known = label or 0, label is not None
    first = label if right else (label + 1) % 10
    top = (first, *(each for each in ((label + i) % 10 for i in range(10)) if each != first))
    return Answer(top[:5], (0 if right else 1) if known else None)


def record(
    number: int,
    *,
    reference: bool = True,
    artifacts: Sequence[bool] = (True,),
    finite: bool = True,
    labelled: bool = True,
) -> ImageRecord:
    """Image ``number``, right or wrong for the reference and for each artifact."""
    label = number % 10 if labelled else None
    figures: tuple[Any, ...] = (0.1, 0.4, 0.04, 0.999) if finite else (None,) * 4
    outcomes = tuple(Outcome(answer(label, right=right), *figures) for right in artifacts)
    name, digest = f"{number % 10}/{number}.png", f"{number:064x}"
    return ImageRecord(name, digest, label, False, 100.0, answer(label, right=reference), outcomes)


def make_results(records: Sequence[ImageRecord], **changes: Any) -> Results:
    """Results of a whole run with these records, the question changed as given."""
    question = replace(QUESTION, **{"images": len(records), **changes})
    size = question.batch
    batches = tuple(
        BatchResult(number, tuple(records[number * size : (number + 1) * size]))
        for number in range(question.batches)
    )
    return Results(question, "digits", batches, "d" * 64)


@pytest.fixture(scope="session")
def made() -> MakeResults:
    """``made(records, **changes of the question)``."""
    return make_results


@pytest.fixture(scope="session")
def one() -> Callable[..., ImageRecord]:
    """``one(number, reference=True, artifacts=(True,), finite=True, labelled=True)``."""
    return record
