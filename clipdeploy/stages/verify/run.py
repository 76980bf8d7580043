"""Verifies artifacts against PyTorch: all artifacts of a model, or the named files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from clipdeploy.core.errors import UsageError
from clipdeploy.core.files import write_atomic
from clipdeploy.core.locks import sole_writer
from clipdeploy.core.paths import StrPath, as_path
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.imaging import select
from clipdeploy.models.cards import takes_any_name
from clipdeploy.stages.cluster import ClusterConfig, Shard, ShardJob, shards_on_cluster
from clipdeploy.stages.verify.on_disk import check_against_disk
from clipdeploy.stages.verify.remember import with_proof
from clipdeploy.stages.verify.setup import Judgement, VerificationSetup, VerifyScope, set_up
from clipdeploy.verification.baseline import rules_out_baseline
from clipdeploy.verification.disagreements import disagreements_csv
from clipdeploy.verification.reports import Evidence
from clipdeploy.verification.results import (
    ArtifactEntry,
    Results,
    RunKey,
    merge_results,
    read_results,
    save_results,
)
from clipdeploy.verification.retrieval import with_retrieval
from clipdeploy.verification.verifier import VerifyConfig, run_verification
from clipdeploy.workspace.folder import Workspace

__all__ = ["verify_model"]

# Images of the first look, and the number of images from which a run has one.
_PROBE = 256
_LONG = 1024


def _first_look(
    setup: VerificationSetup, config: VerifyConfig, scope: VerifyScope, progress: Progress
) -> Results | None:
    """Run PyTorch alone on a sample of a long run; return its results if no verdict is possible."""
    if len(setup.images.entries) < _LONG or not setup.images.labelled:
        return None
    sample = select(setup.images, _PROBE, seed=0)
    alone = replace(config, shard=None, sequential=False)
    results = run_verification(
        setup.model,
        setup.passport,
        (),
        sample,
        alone,
        calibrated=setup.calibrated,
        allow_leak=True,
        progress=progress,
    )
    answers = [record.reference for record in results.records]
    return results if rules_out_baseline(answers, results.run_key, scope.expected) else None


@takes_any_name
def verify_model(
    workspace: Workspace,
    model: str,
    data: StrPath,
    config: VerifyConfig = VerifyConfig(),
    scope: VerifyScope = VerifyScope(),
    *,
    cluster: ClusterConfig | None = None,
    keep: StrPath | None = None,
    force: bool = False,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress = SILENT,
) -> Judgement:
    """Verify artifacts of ``model`` against PyTorch on labelled images.

    Images that an INT8 artifact was calibrated on would overstate its accuracy: they are refused,
    or with ``allow_leak`` counted in the result. PyTorch's own accuracy is checked first, on a
    sample of a long run and then on all images; if it misses the published accuracy, nothing is
    judged. ``note`` receives sentences about problems with the images before the run starts. The
    records are saved in ``keep``, by default in the workspace: a killed run is resumed, and a
    finished one is only read. The workspace remembers a confirmed accuracy of PyTorch as the
    reference's proof, see :mod:`clipdeploy.stages.verify.remember`. A ``cluster`` runs the images
    in shards; the result is the same to the bit.

    Raises:
        ClipdeployError: see :mod:`clipdeploy.core.errors`.
    """
    data = Path(data)
    keep = as_path(keep)
    if cluster is not None and (config.sequential or config.shard):
        raise UsageError(
            "a cluster runs all images and makes the shards itself",
            hint="leave out --sequential and --shard, or --ray",
        )
    setup = set_up(workspace, model, data, config, scope, note, progress)
    saved = keep or workspace.verification(model, config.shard)
    if config.shard is None and (stopped := _first_look(setup, config, scope, progress)):
        note("PyTorch itself misses its accuracy on a sample of the images: stopped")
        stopped = replace(stopped, run_key=_unrun_key(stopped, setup))
        verdict = setup.judge(stopped, config.limits, scope, progress)
        verdict = with_proof(workspace, stopped, verdict, scope.expected, note)
        return Judgement(verdict, None, evidence=Evidence(stopped, setup.images))
    if cluster is not None:
        job = _cluster_job(workspace, model, data, config, scope, len(setup.images.entries))
        with shards_on_cluster(cluster, job, force=force, progress=progress) as parts:
            results = merge_results([read_results(part) for part in parts])
            check_against_disk(results, setup.images, progress)
            with sole_writer(saved, "clipdeploy verify"):
                save_results(saved, results)
    else:
        results = setup.run(config, scope, saved, progress, force)
    if config.shard is not None:
        return Judgement(None, saved)
    results = with_retrieval(results)
    verification = setup.judge(results, config.limits, scope, progress)
    verification = with_proof(workspace, results, verification, scope.expected, note)
    different = workspace.disagreements(model)
    write_atomic(different, disagreements_csv(results))
    return Judgement(verification, saved, different, Evidence(results, setup.images))


def _cluster_job(
    workspace: Workspace,
    model: str,
    data: Path,
    config: VerifyConfig,
    scope: VerifyScope,
    images: int,
) -> ShardJob:
    files = (scope.labelling.labels, scope.labelling.class_names)
    labels = tuple(path for path in files if path is not None)
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


def _unrun_key(results: Results, setup: VerificationSetup) -> RunKey:
    """Return the run key with every artifact, none of which was run."""
    why = "PyTorch itself missed its accuracy on a first look at the images"
    entries = tuple(
        ArtifactEntry(str(t.path), t.kind, t.precision, "", "", why, t.vouched)
        for t in setup.targets
    )
    return replace(results.run_key, artifacts=entries)
