"""What a verification rests on: files by their hashes, choices, versions."""

from __future__ import annotations

import math
from collections.abc import Iterator

from clipdeploy.verification.results import Question, Results

__all__ = ["provenance"]


def provenance(results: Results) -> tuple[tuple[str, str], ...]:
    """Pairs of what and which, in the order of a report."""
    return (*_files(results), *_choices(results.question), *results.question.versions.items())


def _files(results: Results) -> Iterator[tuple[str, str]]:
    question = results.question
    yield "model", question.model
    yield "weights", _hash(question.weights)
    for asked in question.artifacts:
        hashed = f", {_hash(asked.sha256)}" if asked.sha256 else ""
        yield f"{asked.precision} {asked.kind}", f"{asked.artifact}{hashed}"
    yield "images", f"{results.data}, {question.images:,} of them"
    yield "names and classes", _hash(question.entries)
    yield "sizes and samples", _hash(question.contents)
    yield "calibration images", _hash(question.calibrated) if question.calibrated else "none"


def _choices(question: Question) -> Iterator[tuple[str, str]]:
    recipe, spec = question.recipe, question.preprocess
    yield "recipe", f"numerics {recipe.numerics}, resize {recipe.resize}"
    edges = "both edges" if spec.crop_mode == "squash" else "short edge"
    exif = "honoured" if spec.exif_orientation else "ignored"
    resized = f"{edges} to {math.floor(spec.size / spec.crop_pct)}"
    crop = f"centre crop of {spec.size} pixels"
    yield "preprocessing", f"{resized}, {crop}, EXIF orientation {exif}"
    yield "mean and std", f"{_channels(spec.mean)} and {_channels(spec.std)}"
    yield "reference", question.reference
    yield "batch", str(question.batch)
    if question.sequential is not None:
        yield "sequential", f"stops once a drop of {question.sequential:g} points is decided"


def _channels(values: tuple[float, float, float]) -> str:
    return "/".join(f"{value:g}" for value in values)


def _hash(text: str) -> str:
    return text if text.startswith("random:") else f"SHA-256 {text}"
