"""Lists the images with another top-1 answer than the reference's."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.result import Disagreement
from clipdeploy.verification.results import Results
from clipdeploy.verification.retrieval import with_retrieval

__all__ = ["disagreements_csv", "disagreements_of"]


def disagreements_of(records: Sequence[ImageRecord], lane: int) -> list[Disagreement]:
    """Return the images with different top-1 answers, the largest logit difference first."""
    found = []
    for record in records:
        outcome = record.outcomes[lane]
        theirs, ours = record.reference.first, outcome.answer.first
        if theirs != ours:
            found.append(Disagreement(record.name, record.label, theirs, ours, outcome.max_abs))
    return sorted(found, key=_by_difference)


def _by_difference(found: Disagreement) -> tuple[float, str]:
    return (float("-inf") if found.max_abs is None else -found.max_abs, found.name)


def disagreements_csv(results: Results) -> bytes:
    """Return a CSV line for every such image of every artifact; classes by name, else by number."""
    results = with_retrieval(results)
    run_key = results.run_key
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["artifact", "image", "label", "pytorch", "answer", "max_abs"])
    for lane, entry in enumerate(entry for entry in run_key.artifacts if entry.runner):
        for found in disagreements_of(results.records, lane):
            classes = (found.label, found.reference, found.artifact)
            names = [_name(run_key.class_names, index) for index in classes]
            rows.writerow([Path(entry.artifact).name, found.name, *names, found.max_abs])
    return text.getvalue().encode()


def _name(names: Sequence[str], index: int | None) -> str:
    if index is None:
        return ""
    return names[index] if index < len(names) else str(index)
