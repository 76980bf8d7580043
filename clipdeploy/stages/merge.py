"""Shards of a verification -> the verdict of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from clipdeploy import zoo
from clipdeploy.model import reload_model
from clipdeploy.stages.verify_setup import Judgement, VerifyScope, labelled_images
from clipdeploy.verification.diagnosis import diagnose
from clipdeploy.verification.disagreements import disagreements_csv
from clipdeploy.verification.reports import Evidence
from clipdeploy.verification.result import Baseline, Verification
from clipdeploy.verification.results import Results, merge_results, read_results, save_results
from clipdeploy.verification.verdicts import judge_results
from clipdeploy.workspace import Workspace
from exporters.errors import ArtifactError, ClipdeployError
from exporters.files import write_atomic
from exporters.progress import SILENT, Progress

__all__ = ["merge_verification"]


def merge_verification(
    workspace: Workspace,
    model: str,
    max_drop: float = 1.0,
    scope: VerifyScope = VerifyScope(),
    parts: Sequence[Path] = (),
    *,
    data: Path | None = None,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress = SILENT,
) -> Judgement:
    """Shards -> the verdict of one run; without ``parts``, all shards of the workspace.

    ``data`` is only needed where the baseline failed and its cause is looked for, and the images
    are not where the first shard found them.

    Raises:
        ClipdeployError: a shard is missing, damaged, or of another run.
    """
    found = parts or sorted(workspace.folder(model).glob("verification.*-of-*.jsonl"))
    results = merge_results([read_results(path) for path in found])
    if results.question.model != model:
        raise ArtifactError(
            f"the shards are of {results.question.model}, not of {model}",
            hint=f"pass --model {results.question.model}",
        )
    kept = workspace.verification(model)
    save_results(kept, results)
    result = judge_results(results, max_drop, scope.expected)
    if not result.baseline:
        result = replace(
            result,
            baseline=_diagnose_merged(
                workspace, model, results, result, scope, data, note, progress
            ),
        )
    different = workspace.disagreements(model)
    write_atomic(different, disagreements_csv(results))
    return Judgement(result, kept, different, Evidence(results))


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
        reference = reload_model(zoo.find(model), passport.weights, passport.recipe)
        return diagnose(
            result.baseline,
            reference,
            passport.preprocess,
            images,
            results.records,
            passport.class_names,
            progress,
        )
    except ClipdeployError as error:
        note(f"the cause was not looked for: {error}")
        return result.baseline
