"""FP32 graph -> FP16 graph, or with its calibration -> INT8 graph."""

from __future__ import annotations

from pathlib import Path

from calibration.policy import Placement, place
from calibration.qdq import QuantizeConfig, QuantizedGraph, quantize
from calibration.recipe import load_recipe
from clipdeploy.stages.samples import sample_images
from clipdeploy.workspace import Workspace
from exporters.artifact import settings_of
from exporters.errors import UsageError
from exporters.files import sha256_file
from exporters.graphs import load_graph
from exporters.headers import GraphArtifact, existing_graph
from exporters.precision import Fp16Config, convert_to_fp16
from exporters.progress import SILENT, Progress

__all__ = ["convert_model", "quantize_model", "searched_config"]

# Images on which float16 storage is judged.
_STORAGE_IMAGES = 3


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


def searched_config(
    workspace: Workspace, model: str, asked: QuantizeConfig
) -> QuantizeConfig | None:
    """What the INT8 graph was made with, if a search wrote it and ``asked`` is only the default.

    An engine that is built without a word about INT8 then takes the graph as it lies there.
    """
    path = workspace.recipe(model)
    graph = existing_graph(workspace.graph(model, "int8"))
    if asked != QuantizeConfig() or graph is None or not path.exists():
        return None
    config = load_recipe(path).config
    made = graph.passport.settings.items() >= settings_of(config).items()
    return config if made and config.remainder == "fp16" else None


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
