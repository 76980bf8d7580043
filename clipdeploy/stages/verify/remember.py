"""Remembers that PyTorch has reached its accuracy, and forgets it when a verification contradicts.

    baseline confirmed             the accuracy is recorded in reference.json
    baseline contradicts a record  the record is removed
    otherwise                      an earlier record stays

The judgement is the baseline's of :mod:`clipdeploy.verification.baseline`, nothing weaker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from clipdeploy.core.errors import ClipdeployError
from clipdeploy.core.passport import Passport
from clipdeploy.core.printable import printable
from clipdeploy.core.version import __version__
from clipdeploy.models.cards import TOP1_ROUNDING
from clipdeploy.verification.baseline import Expected
from clipdeploy.verification.result import Baseline, Verification
from clipdeploy.verification.results import Results, RunKey
from clipdeploy.workspace.folder import Workspace
from clipdeploy.workspace.proof import (
    AccuracyProof,
    ReferenceProof,
    decides_reference,
    reference_proof,
    remove_proof,
    save_proof,
)

__all__ = ["with_proof"]


def with_proof(
    workspace: Workspace,
    results: Results,
    verification: Verification,
    expected: Expected,
    note: Callable[[str], object],
) -> Verification:
    """The verification with the proof of its reference, which it may record or remove.

    Raises:
        FileError: the proof cannot be written.
    """
    run_key = results.run_key
    try:
        graph, passport = workspace.source(run_key.model)
    except ClipdeployError:
        # Shards may be merged where the graph is not.
        return verification
    if not _is_of(run_key, passport):
        return verification
    proof = reference_proof(graph, passport)
    if passport.embeds or verification.random_weights:
        return replace(verification, reference_proof=proof)
    baseline, known = verification.baseline, proof.accuracy
    if known is not None and (why := _contradiction(baseline, known, results)):
        remove_proof(graph)
        note(f"the reference is no longer proven: {why}")
        by = tuple(means for means in proof.by if means == "probe")
        return replace(verification, reference_proof=ReferenceProof(by, problem=why))
    # A published accuracy is the stronger proof.
    published = known is not None and known.source == "published"
    if baseline.status == "confirmed" and not (published and expected.source == "user"):
        _record(graph, passport, results, baseline, expected)
        proof = reference_proof(graph, passport)
    return replace(verification, reference_proof=proof)


def _is_of(run_key: RunKey, passport: Passport) -> bool:
    """Whether the reference of the records is that of the workspace's graph."""
    # Without names of its own, the model has those of the images' labels.
    names = passport.class_names or run_key.class_names
    return (run_key.weights, run_key.recipe, run_key.preprocess, run_key.classes) == (
        passport.weights.identity,
        passport.recipe,
        passport.preprocess,
        passport.classes,
    ) and names == run_key.class_names


def _contradiction(baseline: Baseline, known: AccuracyProof, results: Results) -> str:
    """Why a baseline contradicts a recorded accuracy, as a sentence; empty if it does not."""
    interval = baseline.top1_interval
    if interval is None or baseline.top1 is None or baseline.images is None:
        return ""
    missed = baseline.status == "missed" and baseline.published_top1 == known.stated_top1
    below = (
        interval.high + TOP1_ROUNDING < known.stated_top1
        # The accuracy over some of the classes is another one.
        and not results.run_key.partial_classes
    )
    if not (missed or below or baseline.status == "implausible"):
        return ""
    return (
        f"top-1 is {baseline.top1:.2f} % of {baseline.images:,} images of "
        f"{printable(results.data)} (99 % interval {interval.low:.2f} to {interval.high:.2f}), "
        f"which contradicts the {known.stated_top1:.2f} % confirmed on {known.date}"
    )


def _record(
    graph: Path, passport: Passport, results: Results, baseline: Baseline, expected: Expected
) -> None:
    run_key, interval = results.run_key, baseline.top1_interval
    assert interval is not None
    assert baseline.top1 is not None
    assert baseline.images is not None
    assert baseline.published_top1 is not None
    # Shards may have run on machines with other versions: theirs decided the logits.
    same_code = run_key.versions.get("clipdeploy") == __version__
    decides = decides_reference(passport) | {
        "image decoder": run_key.decoder,
        "PyTorch": run_key.versions.get("torch", ""),
        **({} if same_code else {"code": ""}),
    }
    proof = AccuracyProof(
        source="published" if expected.source == "card" else "expected",
        stated_top1=baseline.published_top1,
        top1=baseline.top1,
        interval=(interval.low, interval.high),
        images=baseline.images,
        data=printable(results.data),
        entries=run_key.entries,
        decides=decides,
        date=datetime.now(UTC).date().isoformat(),
    )
    save_proof(graph, proof)
