"""Creates results without running a model, to test reading, merging and verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clipdeploy.core.passport import CLIP_MEAN, CLIP_STD, Preprocess, Recipe
from clipdeploy.models import cards
from clipdeploy.verification.records import Answer, ImageId, ImageRecord, Outcome
from clipdeploy.verification.repeats import Repeat
from clipdeploy.verification.results import ArtifactEntry, BatchResult, Results, RunKey

__all__ = ["GRAPH", "RUN_KEY", "again", "make_results", "record"]

REPEAT: dict[str, Any] = {
    "kind": "mixed",
    "size": 2,
    "profile": None,
    "signal": 200.0,
    "noise": 0.0,
    "worst": 0.0,
    "changed": 0,
}

GRAPH = ArtifactEntry("fp32.onnx", "graph", "fp32", "a" * 64, "ONNX Runtime (CPU)")
RUN_KEY = RunKey(
    model=cards.DEMO,
    weights="b" * 64,
    random_weights=False,
    recipe=Recipe(),
    preprocess=Preprocess(32, CLIP_MEAN, CLIP_STD),
    decoder="e" * 16,
    reference="PyTorch",
    classes=10,
    class_names=tuple("0123456789"),
    artifacts=(GRAPH,),
    images=0,
    labelled=True,
    entries="c" * 64,
    contents="f" * 64,
    problems=(),
    calibrated="",
    batch=16,
    sequential=None,
    threads=1,
    versions={"torch": "2"},
)


def answer(label: int | None, *, right: bool) -> Answer:
    """Return an answer with ``label`` first, or with another class first and it second."""
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
    """Return the record of image ``number``, right or wrong for reference and artifacts."""
    label = number % 10 if labelled else None
    metrics: tuple[Any, ...] = (0.1, 0.4, 0.04, 0.999) if finite else (None,) * 4
    outcomes = tuple(Outcome(answer(label, right=right), *metrics) for right in artifacts)
    # Grey means as of noise: of no two images are they nearly equal.
    thumbnail = np.random.default_rng(number).integers(0, 256, 64, np.uint8).tobytes()
    digest = f"{number:064x}"
    image = ImageId(f"{number % 10}/{number}.png", digest, digest[-32:], thumbnail)
    return ImageRecord(image, label, "", 100.0, answer(label, right=reference), outcomes)


def again(calls: int, **changes: Any) -> tuple[Repeat, ...]:
    """Return repeated calls of two images each with the same logits as the first time."""
    return tuple(
        Repeat(**{**REPEAT, **changes})  # type: ignore[arg-type]
        for _ in range(calls)
    )


def make_results(records: Sequence[ImageRecord], **changes: Any) -> Results:
    """Results of a whole run with these records, with the given changes of the run key.

    Every image was repeated together with another one, on each artifact.
    """
    run_key = replace(RUN_KEY, **{"images": len(records), **changes})
    size = run_key.batch
    lanes = len(records[0].outcomes) if records else 0
    batches = tuple(
        BatchResult(
            number,
            part := tuple(records[number * size : (number + 1) * size]),
            (),
            (again(len(part)),) * lanes,
        )
        for number in range(run_key.batches)
    )
    return Results(run_key, "digits", batches, "d" * 64)
