"""Lists the provenance of a verification: files by their hashes, settings, versions."""

from __future__ import annotations

import math
from collections.abc import Iterator

from clipdeploy.verification.results import Results, RunKey
from clipdeploy.workspace.proof import ReferenceProof

__all__ = ["provenance"]


def provenance(
    results: Results, proof: ReferenceProof | None = None
) -> tuple[tuple[str, str], ...]:
    """Return pairs of name and value, in the order of a report; ``proof`` is the reference's."""
    proven = [("reference's proof", proof.sentence)] if proof is not None else []
    choices = (*_choices(results.run_key), *proven)
    return (*_files(results), *choices, *results.run_key.versions.items())


def _files(results: Results) -> Iterator[tuple[str, str]]:
    run_key = results.run_key
    yield "model", run_key.model
    yield "weights", _hash(run_key.weights)
    for entry in run_key.artifacts:
        hashed = f", {_hash(entry.sha256)}" if entry.sha256 else ""
        yield f"{entry.precision} {entry.kind}", f"{entry.artifact}{hashed}"
    yield "images", f"{results.data}, {run_key.images:,} of them"
    yield "names and classes", _hash(run_key.entries)
    yield "sizes and samples", _hash(run_key.contents)
    yield "calibration images", _hash(run_key.calibrated) if run_key.calibrated else "none"


def _choices(run_key: RunKey) -> Iterator[tuple[str, str]]:
    recipe, spec = run_key.recipe, run_key.preprocess
    yield "recipe", f"numerics {recipe.numerics}, resize {recipe.resize}"
    edges = "both edges" if spec.crop_mode == "squash" else "short edge"
    exif = "honoured" if spec.exif_orientation else "ignored"
    resized = f"{edges} to {math.floor(spec.size / spec.crop_pct)} ({spec.interpolation})"
    crop = f"centre crop of {spec.size} pixels"
    yield "preprocessing", f"{resized}, {crop}, EXIF orientation {exif}"
    yield "mean and std", f"{_channels(spec.mean)} and {_channels(spec.std)}"
    yield "reference", run_key.reference
    yield "batch", str(run_key.batch)
    if run_key.sequential is not None:
        yield "sequential", f"stops once a drop of {run_key.sequential:g} points is decided"


def _channels(values: tuple[float, float, float]) -> str:
    return "/".join(f"{value:g}" for value in values)


def _hash(text: str) -> str:
    return text if text.startswith("random:") else f"SHA-256 {text}"
