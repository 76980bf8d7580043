"""Every artifact of a model against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from calibration.table import load_table
from clipdeploy import zoo
from clipdeploy.engines.passport import load_engine_passport
from clipdeploy.imaging import open_images, select
from clipdeploy.imaging.images import survey
from clipdeploy.imaging.layouts import LayoutName
from clipdeploy.model import reload_model
from clipdeploy.verification.verifier import Target, Verification, VerifyConfig, verify_targets
from clipdeploy.workspace import PRECISIONS, Workspace
from exporters.errors import ArtifactError
from exporters.files import sha256_file
from exporters.headers import read_passport
from exporters.progress import SILENT, Progress

__all__ = ["verify_model"]


def _stale(path: Path, parent: Path) -> ArtifactError:
    return ArtifactError(
        f"{path} was not made from the {parent.name} that lies beside it",
        hint="build it again with build-engine",
    )


def _graph_targets(workspace: Workspace, model: str) -> Iterator[Target]:
    source, _ = workspace.source(model)
    source_hash = sha256_file(source)
    for precision in (*PRECISIONS, "int8-cpu"):
        graph = workspace.graph(model, precision)
        if not graph.exists():
            continue
        passport = read_passport(graph)
        if graph != source and passport.parents.get("source_graph") != source_hash:
            raise _stale(graph, source)
        yield Target(graph, "graph", passport)


def _engine_targets(workspace: Workspace, model: str) -> Iterator[Target]:
    for precision in PRECISIONS:
        graph, engine = workspace.graph(model, precision), workspace.engine(model, precision)
        if not engine.exists():
            continue
        passport = load_engine_passport(engine)
        if not graph.exists() or passport.hashes.graph != sha256_file(graph):
            raise _stale(engine, graph)
        yield Target(engine, "engine", passport.graph, graph)


def verify_model(
    workspace: Workspace,
    model: str,
    data: Path,
    config: VerifyConfig = VerifyConfig(),
    *,
    limit: int | None = None,
    graphs_only: bool = False,
    allow_leak: bool = False,
    layout: LayoutName = "auto",
    labels: Path | None = None,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress = SILENT,
) -> Verification:
    """Every artifact of ``model`` against PyTorch on labelled images.

    Images that an INT8 artifact was calibrated on flatter it: they are refused, or with
    ``allow_leak`` counted in the result.  ``note`` is told what is odd about the images before the
    work starts.

    Raises:
        ClipdeployError: see :mod:`exporters.errors`.
    """
    _, passport = workspace.source(model)
    targets = list(_graph_targets(workspace, model))
    if not graphs_only:
        targets.extend(_engine_targets(workspace, model))
    random_weights = passport.weights.kind == "random"
    # Labels mean nothing to random weights: any folder of images will do.
    classes = () if random_weights else passport.class_names
    images = open_images(data, classes, layout=layout, labels=labels)
    for problem in survey(images).problems():
        note(problem)
    if limit is not None:
        images = select(images, limit, seed=0)
    with progress.task(f"load {model} in PyTorch"):
        reference = reload_model(zoo.find(model), passport.weights, passport.recipe)
    # Nothing is judged on random weights, so that no image can flatter them.
    seen = frozenset() if random_weights else _calibrated_on(workspace, model, targets)
    if seen is None and not allow_leak:
        path = workspace.calibration(model)
        raise ArtifactError(
            f"{path} is not the calibration that the INT8 artifacts were made with, so that "
            "nobody can tell whether --data holds calibration images",
            hint="build them again with build-engine --int8, or pass --allow-leak",
        )
    return verify_targets(
        reference, targets, images, config, progress, seen=seen, allow_leak=allow_leak
    )


def _calibrated_on(
    workspace: Workspace, model: str, targets: list[Target]
) -> frozenset[str] | None:
    """SHA-256 of every image that an INT8 target was calibrated on; None if nobody can tell."""
    wanted = {target.passport.parents.get("calibration", "") for target in targets} - {""}
    path = workspace.calibration(model)
    if not wanted:
        return frozenset()
    if not path.exists() or wanted != {sha256_file(path)}:
        return None
    return frozenset(record.sha256 for record in load_table(path).images)
