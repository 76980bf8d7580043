"""Artifacts against PyTorch: every one of a model, or the files that were named."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from calibration.table import load_table
from clipdeploy import zoo
from clipdeploy.cluster import ClusterConfig, Shard, ShardJob, shards_on_cluster
from clipdeploy.imaging import ImageFolder, look_over, open_images, select, survey
from clipdeploy.imaging.layouts import LayoutName
from clipdeploy.imaging.survey import Few
from clipdeploy.model import LoadedModel, reload_model
from clipdeploy.verification.baseline import Expected, is_hopeless
from clipdeploy.verification.diagnosis import diagnose
from clipdeploy.verification.reports import Evidence
from clipdeploy.verification.result import Baseline, Verification
from clipdeploy.verification.results import (
    Asked,
    Question,
    Results,
    merge_results,
    read_results,
    save_results,
)
from clipdeploy.verification.targets import Target, named_targets, workspace_targets
from clipdeploy.verification.verdicts import disagreements_of, judge_results
from clipdeploy.verification.verifier import VerifyConfig, run_verification
from clipdeploy.workspace import Workspace
from exporters.artifact import Passport
from exporters.errors import ArtifactError, ClipdeployError, DatasetError, UsageError
from exporters.files import sha256_file, write_atomic
from exporters.progress import SILENT, Progress

__all__ = ["Judgement", "VerifyScope", "merge_verification", "verify_model"]

# A first look before a long run, and how many images make a run long.
_PROBE = 256
_LONG = 1024


@dataclass(frozen=True)
class VerifyScope:
    """Which images and which artifacts.

    ``artifacts`` are files; without any, every graph of the model and, unless ``graphs_only``,
    every engine.  ``limit`` draws so many images, spread over the classes.  ``allow_leak`` counts
    calibration images instead of refusing them.  ``expected`` is what PyTorch is to reach.
    """

    artifacts: tuple[Path, ...] = ()
    graphs_only: bool = False
    limit: int | None = None
    layout: LayoutName = "auto"
    labels: Path | None = None
    allow_leak: bool = False
    expected: Expected = field(default_factory=Expected)


@dataclass(frozen=True)
class Judgement:
    """A verification, and the files that hold its records: None where nothing was kept.

    A shard alone has no ``verification``.  ``evidence`` is what a report shows beside it.
    """

    verification: Verification | None
    results: Path | None
    disagreements: Path | None = None
    evidence: Evidence | None = None

    def __bool__(self) -> bool:
        return self.verification is None or bool(self.verification)


@dataclass(frozen=True)
class _Bench:
    """A reference and what it is to judge."""

    model: LoadedModel
    passport: Passport
    targets: tuple[Target, ...]
    images: ImageFolder
    seen: frozenset[str] | None

    def run(
        self, config: VerifyConfig, scope: VerifyScope, keep: Path, progress: Progress, force: bool
    ) -> Results:
        return run_verification(
            self.model,
            self.passport,
            self.targets,
            self.images,
            config,
            seen=self.seen,
            allow_leak=scope.allow_leak,
            keep=keep,
            force=force,
            progress=progress,
        )


def _labelled_images(
    data: Path, passport: Passport, scope: VerifyScope, note: Callable[[str], object]
) -> ImageFolder:
    # Labels mean nothing to random weights: any folder of images will do.
    classes = () if passport.weights.kind == "random" else passport.class_names
    images = open_images(data, classes, layout=scope.layout, labels=scope.labels)
    found = survey(images)
    note(f"{found.images:,} images, {found.classes:,} classes, labels: {found.layout}")
    for problem in found.problems():
        note(problem)
    return images if scope.limit is None else select(images, scope.limit, seed=0)


def _look_over(
    images: ImageFolder,
    note: Callable[[str], object],
    progress: Progress,
    *,
    skip_unreadable: bool,
) -> None:
    """Better now than in the middle of a long run."""
    reading = look_over(images, progress)
    for problem in reading.problems():
        note(problem)
    if reading.unreadable and not skip_unreadable:
        raise DatasetError(
            f"{len(reading.unreadable)} images of {images.root} cannot be read: "
            f"{Few.of(reading.unreadable)}",
            hint="repair or remove them, or pass --skip-unreadable",
        )


def _bench(
    workspace: Workspace,
    model: str,
    data: Path,
    config: VerifyConfig,
    scope: VerifyScope,
    note: Callable[[str], object],
    progress: Progress,
) -> _Bench:
    _, passport = workspace.source(model)
    if scope.artifacts:
        targets = named_targets(scope.artifacts, passport, trust=config.trust)
    else:
        targets = workspace_targets(workspace, model, graphs_only=scope.graphs_only)
    images = _labelled_images(data, passport, scope, note)
    _look_over(images, note, progress, skip_unreadable=config.skip_unreadable)
    with progress.task(f"load {model} in PyTorch"):
        reference = reload_model(zoo.find(model), passport.weights, passport.recipe)
    # Nothing is judged on random weights, so that no image can flatter them.
    random_weights = passport.weights.kind == "random"
    seen = frozenset() if random_weights else _calibrated_on(workspace, model, targets)
    if seen is None and not scope.allow_leak:
        raise ArtifactError(
            f"{workspace.calibration(model)} is not the calibration that the INT8 artifacts were "
            "made with, so that nobody can tell whether --data holds calibration images",
            hint="build them again with build-engine --int8, or pass --allow-leak",
        )
    return _Bench(reference, passport, tuple(targets), images, seen)


def _calibrated_on(
    workspace: Workspace, model: str, targets: Sequence[Target]
) -> frozenset[str] | None:
    """SHA-256 of every image that an INT8 target was calibrated on; None if nobody can tell."""
    wanted = {target.passport.parents.get("calibration", "") for target in targets} - {""}
    path = workspace.calibration(model)
    if not wanted:
        return frozenset()
    if not path.exists() or wanted != {sha256_file(path)}:
        return None
    return frozenset(record.sha256 for record in load_table(path).images)


def _first_look(
    bench: _Bench, config: VerifyConfig, scope: VerifyScope, progress: Progress
) -> Results | None:
    """PyTorch alone on a sample before a long run; its results if no verdict can come of it."""
    if len(bench.images.entries) < _LONG or not bench.images.labelled:
        return None
    sample = select(bench.images, _PROBE, seed=0)
    alone = replace(config, shard=None, sequential=False)
    results = run_verification(
        bench.model,
        bench.passport,
        (),
        sample,
        alone,
        seen=bench.seen,
        allow_leak=True,
        progress=progress,
    )
    answers = [record.reference for record in results.records]
    return results if is_hopeless(answers, results.question, scope.expected) else None


def verify_model(
    workspace: Workspace,
    model: str,
    data: Path,
    config: VerifyConfig = VerifyConfig(),
    scope: VerifyScope = VerifyScope(),
    *,
    cluster: ClusterConfig | None = None,
    keep: Path | None = None,
    force: bool = False,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress = SILENT,
) -> Judgement:
    """Artifacts of ``model`` against PyTorch on labelled images.

    Images that an INT8 artifact was calibrated on flatter it: they are refused, or with
    ``allow_leak`` counted in the result.  PyTorch's own accuracy is looked at first, on a sample
    of a long run and then on all images; where it is not what was published nothing is judged.
    ``note`` is told what is odd about the images before the work starts.  The records are kept in
    ``keep``, by default in the workspace, so that a killed run is gone on with and a finished one
    is only read.  A ``cluster`` does the images in shards; the result is the same to the bit.

    Raises:
        ClipdeployError: see :mod:`exporters.errors`.
    """
    if cluster is not None and (config.sequential or config.shard):
        raise UsageError(
            "a cluster does all images, in shards that it cuts itself",
            hint="leave out --sequential and --shard, or --ray",
        )
    bench = _bench(workspace, model, data, config, scope, note, progress)
    kept = keep or workspace.verification(model, config.shard)
    if config.shard is None and (hopeless := _first_look(bench, config, scope, progress)):
        note("PyTorch itself misses its accuracy on a sample of the images: not going on")
        hopeless = replace(hopeless, question=_asking(hopeless, bench))
        verdict = _judge(hopeless, bench, config.max_drop, scope, progress)
        return Judgement(verdict, None, evidence=Evidence(hopeless, bench.images))
    if cluster is not None:
        job = _cluster_job(workspace, model, data, config, scope, len(bench.images.entries))
        with shards_on_cluster(cluster, job, force=force, progress=progress) as parts:
            results = merge_results([read_results(part) for part in parts])
            save_results(kept, results)
    else:
        results = bench.run(config, scope, kept, progress, force)
    if config.shard is not None:
        return Judgement(None, kept)
    verification = _judge(results, bench, config.max_drop, scope, progress)
    different = _write_disagreements(workspace, model, results)
    return Judgement(verification, kept, different, Evidence(results, bench.images))


def _cluster_job(
    workspace: Workspace,
    model: str,
    data: Path,
    config: VerifyConfig,
    scope: VerifyScope,
    images: int,
) -> ShardJob:
    labels = () if scope.labels is None else (scope.labels,)
    return ShardJob(
        title=f"verify {images} images",
        run=partial(_one_shard, workspace, model, data, config, scope),
        file=partial(workspace.verification, model),
        most=-(-images // config.batch),
        reads=(workspace.folder(model), data, *scope.artifacts, *labels),
        threads=config.threads,
        gpu=True,
    )


def _one_shard(
    workspace: Workspace,
    model: str,
    data: Path,
    config: VerifyConfig,
    scope: VerifyScope,
    shard: Shard,
    threads: int,
    keep: Path,
) -> None:
    config = replace(config, shard=shard, threads=threads)
    verify_model(workspace, model, data, config, scope, keep=keep)


def _asking(results: Results, bench: _Bench) -> Question:
    """The question with every artifact in it, none of which was run."""
    why = "PyTorch itself missed its accuracy on a first look at the images"
    asked = tuple(
        Asked(str(t.path), t.kind, t.precision, "", "", why, t.vouched) for t in bench.targets
    )
    return replace(results.question, artifacts=asked)


def _judge(
    results: Results, bench: _Bench, max_drop: float, scope: VerifyScope, progress: Progress
) -> Verification:
    result = judge_results(results, max_drop, scope.expected)
    if result.baseline:
        return result
    explained = diagnose(
        result.baseline,
        bench.model,
        bench.passport.preprocess,
        bench.images,
        results.records,
        bench.passport.class_names,
        progress,
    )
    return replace(result, baseline=explained)


def _write_disagreements(workspace: Workspace, model: str, results: Results) -> Path:
    """A CSV line for every image that an artifact answers otherwise than PyTorch."""
    question = results.question
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["artifact", "image", "label", "pytorch", "answer", "max_abs"])
    for lane, asked in enumerate(asked for asked in question.artifacts if asked.runner):
        for found in disagreements_of(results.records, lane):
            classes = (found.label, found.reference, found.artifact)
            names = [_name(question.class_names, index) for index in classes]
            rows.writerow([Path(asked.artifact).name, found.name, *names, found.max_abs])
    path = workspace.disagreements(model)
    write_atomic(path, text.getvalue().encode())
    return path


def _name(names: Sequence[str], index: int | None) -> str:
    if index is None:
        return ""
    return names[index] if index < len(names) else str(index)


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
    different = _write_disagreements(workspace, model, results)
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
        images = _labelled_images(where, passport, scope, note)
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
