"""Merges the shards of a verification and returns the verdict of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from clipdeploy.core.errors import ArtifactError, ClipdeployError, DatasetError
from clipdeploy.core.files import file_errors, write_atomic
from clipdeploy.core.locks import sole_writer
from clipdeploy.core.paths import StrPath, as_path, as_paths
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.imaging import ImageFolder, Labelling, open_images
from clipdeploy.imaging.labelled import open_labelled
from clipdeploy.models import cards
from clipdeploy.models.cards import takes_any_name
from clipdeploy.models.load import reload_model
from clipdeploy.stages.verify.on_disk import check_against_disk, check_artifacts, check_labels
from clipdeploy.stages.verify.remember import with_proof
from clipdeploy.stages.verify.setup import (
    Judgement,
    VerifyScope,
    labelled_images,
    refuse_for_embeddings,
)
from clipdeploy.verification.clipping import with_clipping
from clipdeploy.verification.diagnosis import diagnose
from clipdeploy.verification.disagreements import disagreements_csv
from clipdeploy.verification.reports import Evidence
from clipdeploy.verification.result import Baseline, Verification
from clipdeploy.verification.results import Results, merge_results, read_results, save_results
from clipdeploy.verification.retrieval import with_retrieval
from clipdeploy.verification.verdicts import Limits, judge_results
from clipdeploy.workspace.folder import Workspace

__all__ = ["merge_verification"]


@takes_any_name
def merge_verification(
    workspace: Workspace,
    model: str,
    limits: float | Limits = Limits(),
    scope: VerifyScope = VerifyScope(),
    parts: StrPath | Iterable[StrPath] = (),
    *,
    data: StrPath | None = None,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress = SILENT,
) -> Judgement:
    """Merge shards and return the verdict; without ``parts``, all shards of the workspace.

    ``limits`` as a number are points of top-1. The artifacts must be the files that the shards
    judged, and every image the file of its record; labels named in ``scope`` must be those that the
    shards were judged by. ``data`` is the location of the images, if it is not that of the first
    shard; if the images are missing, the result notes that they were not compared. Merged shards
    are removed.

    Raises:
        ClipdeployError: a shard is missing, damaged, or of another run, or an artifact or an image
            has changed since.
    """
    parts = as_paths(parts)
    data = as_path(data)
    found = parts or sorted(workspace.folder(model).glob("verification.*-of-*.jsonl"))
    results = merge_results([read_results(path) for path in found])
    if results.run_key.model != model:
        raise ArtifactError(
            f"the shards are of {results.run_key.model}, not of {model}",
            hint=f"pass --model {results.run_key.model}",
        )
    limits = limits if isinstance(limits, Limits) else Limits(limits)
    if results.run_key.task == "embedding":
        refuse_for_embeddings(limits, scope)
    images = data or Path(results.data)
    if scope.labelling != Labelling():
        _, passport = workspace.source(model)
        check_labels(results, open_labelled(images, passport, scope.labelling, note))
    found_images, missing = _compare_with_disk(results, images, progress)
    saved = workspace.verification(model)
    with sole_writer(saved, "clipdeploy verify merge"):
        save_results(saved, results)
    for path in found:
        if path.resolve() != saved.resolve():
            with file_errors("remove", path):
                path.unlink(missing_ok=True)
    results = with_retrieval(results)
    result = judge_results(results, limits, scope.expected)
    result = replace(result, problems=(*result.problems, *missing))
    calibration = workspace.calibration(model)
    result = with_clipping(result, results.run_key, found_images, calibration, progress)
    if not result.baseline and result.task == "classification":
        result = replace(
            result,
            baseline=_diagnose_merged(
                workspace, model, results, result, scope, data, note, progress
            ),
        )
    result = with_proof(workspace, results, result, scope.expected, note)
    different = workspace.disagreements(model)
    write_atomic(different, disagreements_csv(results))
    return Judgement(result, saved, different, Evidence(results))


def _compare_with_disk(
    results: Results, data: Path, progress: Progress
) -> tuple[ImageFolder | None, tuple[str, ...]]:
    """Compare the records with the files; return the images, or a sentence if they are missing.

    Raises:
        ArtifactError, DatasetError, FileError: an artifact or an image has changed.
    """
    check_artifacts(results)
    try:
        images = open_images(data)
    except DatasetError as error:
        return None, (f"the images were not compared with the records: {error.message}",)
    check_against_disk(results, images, progress)
    return _verified(results, images), ()


def _verified(results: Results, images: ImageFolder) -> ImageFolder:
    """Return the images that were verified, with their labels."""
    labels = {record.name: record.label for record in results.records}
    entries = (replace(e, label=labels[e.name]) for e in images.entries if e.name in labels)
    return ImageFolder(images.root, tuple(entries))


def _diagnose_merged(
    workspace: Workspace,
    model: str,
    results: Results,
    result: Verification,
    scope: VerifyScope,
    data: Path | None,
    note: Callable[[str], object],
    progress: Progress,
) -> Baseline:
    _, passport = workspace.source(model)
    where = data or Path(results.data)
    try:
        images = labelled_images(where, passport, scope, note)
        reference = reload_model(cards.find(model), passport.weights, passport.recipe)
        return diagnose(
            result.baseline,
            reference,
            passport.preprocess,
            images,
            results.records,
            results.run_key.class_names,
            progress,
        )
    except ClipdeployError as error:
        note(f"possible causes were not tried: {error}")

        return result.baseline
