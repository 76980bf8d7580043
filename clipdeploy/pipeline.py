"""The stages over a workspace: zoo -> export -> calibrate -> quantize -> build -> verify.

Each function is one command's work: it looks whether the artifact is already there and made from
the same inputs with the same settings, makes it if not, and returns what it made.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from calibration.policy import Placement, place
from calibration.qdq import QuantizeConfig, QuantizedGraph, quantize
from calibration.table import (
    load_table,
)
from clipdeploy import zoo
from clipdeploy.builder import BuildConfig, EngineArtifact, build_engine
from clipdeploy.calibrating import (
    CalibrateConfig,
    CalibrationArtifact,
    calibrate_model,
    merge_calibration,
)
from clipdeploy.datasets import iter_crops, open_images, select
from clipdeploy.model import LoadedModel, WeightsChoice, load_model, reload_model
from clipdeploy.passport import library_versions, load_engine_passport
from clipdeploy.verifier import Target, Verification, VerifyConfig, verify_targets
from clipdeploy.workspace import PRECISIONS, Workspace
from exporters.artifact import (
    Passport,
    Precision,
    Preprocess,
    Recipe,
    TensorSpec,
    settings_of,
)
from exporters.checks import PARITY_BATCHES
from exporters.errors import ArtifactError, UsageError
from exporters.files import sha256_file
from exporters.graphs import GraphArtifact, existing_graph, load_graph, read_passport
from exporters.onnx import ExportConfig, export_graph
from exporters.precision import Fp16Config, convert_to_fp16
from exporters.progress import SILENT, Progress
from exporters.samples import Samples

__all__ = [
    "CalibrateConfig",
    "CalibrationArtifact",
    "build_model",
    "calibrate_model",
    "convert_model",
    "export_model",
    "merge_calibration",
    "quantize_model",
    "verify_model",
]


# Images on which float16 storage is judged.
_STORAGE_IMAGES = 3


def _passport(model: LoadedModel) -> Passport:
    size = model.card.image_size
    classes = model.module.config.classes
    names = tuple(name for name, _ in zoo.class_names(model.card))
    return Passport(
        kind="graph",
        model=model.card.name,
        precision="fp32",
        weights=model.weights,
        recipe=model.recipe,
        preprocess=model.card.preprocess(model.recipe),
        input=TensorSpec("image", "float32", ("batch", 3, size, size)),
        output=TensorSpec("logits", "float32", ("batch", classes)),
        classes=classes,
        class_names=names if len(names) == classes else (),
        versions=library_versions(),
    )


def sample_images(spec: Preprocess, count: int = max(PARITY_BATCHES)) -> Samples:
    """A few real images to check graphs with: the demo card's digits."""
    digits = select(open_images(zoo.demo_file("calibration.zip")), count, seed=0)
    return Samples(np.stack([crop.pixels for crop in iter_crops(digits, spec)]), spec)


def export_model(
    workspace: Workspace,
    name: str,
    weights: WeightsChoice = WeightsChoice(),
    recipe: Recipe = Recipe(),
    config: ExportConfig = ExportConfig(),
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> GraphArtifact:
    """Checkpoint -> checked FP32 graph in the workspace.

    Raises:
        ClipdeployError: see :mod:`exporters.errors`; nothing is left behind.
    """
    card = zoo.find(name)
    with progress.task(f"load {card.name}"):
        model = load_model(card, weights, recipe)
    passport = _passport(model)
    path = workspace.graph(card.name, "fp32")
    settings = settings_of(config)
    if not force and (found := existing_graph(path)):
        old = found.passport
        same = (old.weights.identity, old.recipe, old.settings, old.versions) == (
            passport.weights.identity,
            recipe,
            settings,
            passport.versions,
        )
        if same:
            workspace.remember(card.name)
            return found
    samples = sample_images(passport.preprocess)
    artifact = export_graph(model.module, path, passport, samples, config, progress, release=True)
    workspace.remember(card.name)
    return artifact


def quantize_model(
    workspace: Workspace,
    model: str,
    config: QuantizeConfig = QuantizeConfig(),
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> QuantizedGraph:
    """FP32 graph and calibration -> INT8 graph.

    Raises:
        ClipdeployError: see :mod:`exporters.errors`.
    """
    source, passport = workspace.source(model)
    calibration = workspace.calibration(model)
    if not calibration.exists():
        raise UsageError(
            f"{model} has not been calibrated in {workspace.root}",
            hint="clipdeploy calibrate --data CALIBRATION_IMAGES",
        )
    target = workspace.graph(model, "int8" if config.remainder == "fp16" else "int8-cpu")
    parents = {"source_graph": sha256_file(source), "calibration": sha256_file(calibration)}
    if not force and (found := existing_graph(target)):
        settings = found.passport.settings
        asked = settings_of(config)
        if found.passport.parents == parents and settings.items() >= asked.items():
            return QuantizedGraph(found, _placement(source, config))
    with progress.task(f"quantise {model}"):
        samples = sample_images(passport.preprocess, _STORAGE_IMAGES)
        return quantize(source, calibration, target, samples, config)


def _placement(source: Path, config: QuantizeConfig) -> Placement:
    return place(load_graph(source), config.exclude, config.scope)


def convert_model(
    workspace: Workspace,
    model: str,
    config: Fp16Config = Fp16Config(),
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> GraphArtifact:
    """FP32 graph -> FP16 graph.

    Raises:
        ClipdeployError: see :mod:`exporters.errors`.
    """
    source, passport = workspace.source(model)
    target = workspace.graph(model, "fp16")
    parents = {"source_graph": sha256_file(source)}
    if not force and (found := existing_graph(target)) and found.passport.parents == parents:
        settings = found.passport.settings
        kept = set(config.keep) <= set(settings.get("keep_fp32", ()))
        if kept and settings.get("half_io") == config.half_io:
            return found
    with progress.task(f"convert {model} to FP16"):
        samples = sample_images(passport.preprocess, _STORAGE_IMAGES)
        return convert_to_fp16(source, target, samples, config)


def build_model(
    workspace: Workspace,
    model: str,
    precision: Precision,
    config: BuildConfig = BuildConfig(),
    *,
    data: Path | None = None,
    calibrate: CalibrateConfig = CalibrateConfig(),
    fp16: Fp16Config = Fp16Config(),
    quantize: QuantizeConfig = QuantizeConfig(),
    force: bool = False,
    progress: Progress = SILENT,
) -> EngineArtifact:
    """Graph -> engine; calibration and quantisation first where they are due.

    Raises:
        ClipdeployError: see :mod:`exporters.errors`.
    """
    workspace.source(model)
    if precision == "int8":
        if data is not None:
            calibrate_model(workspace, model, data, calibrate, force=force, progress=progress)
        quantize_model(workspace, model, quantize, force=force, progress=progress)
    elif precision == "fp16":
        convert_model(workspace, model, fp16, force=force, progress=progress)
    return build_engine(
        workspace.graph(model, precision),
        workspace.engine(model, precision),
        config,
        force=force,
        progress=progress,
    )


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
        if not graph.exists() or passport.graph_sha256 != sha256_file(graph):
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
    progress: Progress = SILENT,
) -> Verification:
    """Every artifact of ``model`` against PyTorch on labelled images.

    Images that an INT8 artifact was calibrated on flatter it: they are refused, or with
    ``allow_leak`` counted in the result.

    Raises:
        ClipdeployError: see :mod:`exporters.errors`.
    """
    _, passport = workspace.source(model)
    targets = list(_graph_targets(workspace, model))
    if not graphs_only:
        targets.extend(_engine_targets(workspace, model))
    random_weights = passport.weights.kind == "random"
    # Labels mean nothing to random weights: any folder of images will do.
    images = open_images(data, () if random_weights else passport.class_names)
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
