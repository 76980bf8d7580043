"""FP32 graph -> FP16 graph, or with its calibration -> INT8 graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from calibration.policy import Placement, place
from calibration.qdq import QuantizeConfig, QuantizedGraph, quantize, stored_settings
from calibration.quality import Quality
from calibration.recipe import load_recipe
from calibration.table import load_table
from clipdeploy.core.errors import BuildError, UsageError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import Preprocess, from_json, to_json
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.engines.backends import BackendOption, choose_backend, scale_form
from clipdeploy.models.cards import takes_any_name
from clipdeploy.stages.calibrate import is_calibrated
from clipdeploy.stages.samples import sample_images
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph
from exporters.headers import GraphArtifact, existing_graph
from exporters.precision import Fp16Config, convert_to_fp16
from exporters.samples import Samples

__all__ = [
    "config_to_build",
    "convert_model",
    "int8_quality",
    "model_quality",
    "quantize_model",
    "refuse_int8_only",
    "with_scale_form",
]

# Images on which float16 storage is judged.
_STORAGE_IMAGES = 3


@takes_any_name
def quantize_model(
    workspace: Workspace,
    model: str,
    config: QuantizeConfig = QuantizeConfig(),
    *,
    backend: BackendOption = "auto",
    force: bool = False,
    progress: Progress = SILENT,
) -> QuantizedGraph:
    """FP32 graph and calibration -> INT8 graph, its weight scales in the form for ``backend``.

    Raises:
        ClipdeployError: see :mod:`clipdeploy.core.errors`.
    """
    config = with_scale_form(config, backend)
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
        asked = stored_settings(config)
        if found.passport.parents == parents and settings.items() >= asked.items():
            return QuantizedGraph(found, _placement(source, config, found), int8_quality(found))
    with progress.task(f"quantise {model}"):
        samples = sample_images(passport.preprocess, _STORAGE_IMAGES)
        return quantize(source, calibration, target, samples, config)


def with_scale_form(config: QuantizeConfig, backend: BackendOption = "auto") -> QuantizeConfig:
    """``config`` with a form of the weight scales; ``backend`` chooses where it names none.

    Without any TensorRT here it is the form for TensorRT; a later ``build-engine`` checks it.
    """
    if config.weight_scales is not None:
        return config
    if config.remainder == "fp32":
        return replace(config, weight_scales="channel")
    try:
        chosen = choose_backend(backend).backend if backend == "auto" else backend
    except BuildError:
        chosen = "tensorrt"
    return replace(config, weight_scales=scale_form(chosen))


def refuse_int8_only(given: Mapping[str, bool]) -> None:
    """Refuse choices that only INT8 uses, where none is made; ``given`` says which there are.

    Raises:
        UsageError: it names the first.
    """
    for name, is_given in given.items():
        if is_given:
            raise UsageError(f"{name} belongs to --int8", hint="leave it out, or choose INT8")


@takes_any_name
def config_to_build(
    workspace: Workspace,
    model: str,
    asked: QuantizeConfig = QuantizeConfig(),
    *,
    force: bool = False,
    note: Callable[[str], object] = lambda text: None,
) -> QuantizeConfig:
    """How the INT8 graph of an engine is made: as ``asked``, or as a search chose.

    Without INT8 options an engine takes the graph that a search wrote; ``force`` makes it anew.

    Raises:
        UsageError: a remainder that no engine is built from.
        ClipdeployError: a recipe that cannot be read.
    """
    if asked.remainder != "fp16":
        raise UsageError(
            f"no engine is built from INT8 with the rest in {asked.remainder}",
            hint="leave the remainder at fp16; fp32 is for graphs on a CPU",
        )
    searched = None if force else _searched_config(workspace, model, asked)
    if searched is None:
        return asked
    note("INT8 as the search chose; --force or other options make it anew")
    return searched


def _searched_config(
    workspace: Workspace, model: str, asked: QuantizeConfig
) -> QuantizeConfig | None:
    """What the INT8 graph was made with, if a search wrote it and ``asked`` is only the default."""
    path = workspace.recipe(model)
    graph = existing_graph(workspace.graph(model, "int8"))
    default = QuantizeConfig()
    if replace(asked, min_sqnr=default.min_sqnr) != default or graph is None or not path.exists():
        return None
    config = load_recipe(path).config
    # Both forms hold the same integers, so the graph is the searched one in either form.
    settings = graph.passport.settings
    either = replace(config, weight_scales=settings.get("weight_scales", "channel"))
    made = settings.items() >= stored_settings(either).items()
    return config if made and config.remainder == "fp16" else None


def _placement(source: Path, config: QuantizeConfig, made: GraphArtifact) -> Placement:
    placement = place(load_graph(source), config.exclude, config.scope)
    return placement.without(made.passport.settings.get("int8_left_out", {}))


def model_quality(workspace: Workspace, model: str) -> Quality | None:
    """:func:`int8_quality` of the INT8 graph in the workspace; None without one.

    Raises:
        ArtifactError: its passport cannot be read.
    """
    graph = existing_graph(workspace.graph(model, "int8"))
    return None if graph is None else int8_quality(graph)


def int8_quality(graph: GraphArtifact) -> Quality | None:
    """What was measured when an INT8 graph was made; None if nothing was.

    Raises:
        ArtifactError: its passport does not hold what it should.
    """
    found = graph.passport.settings.get("quality")
    return None if found is None else from_json(to_json(found), Quality, str(graph.path))


def _judged_images(workspace: Workspace, model: str, spec: Preprocess) -> Samples:
    """Images to judge float16 storage on: sample images, and the calibration's if there is one."""
    samples = sample_images(spec, _STORAGE_IMAGES)
    if not is_calibrated(workspace, model):
        return samples
    kept = load_table(workspace.calibration(model)).samples()
    return samples if kept is None else kept.concat(samples)


@takes_any_name
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
        ClipdeployError: see :mod:`clipdeploy.core.errors`.
    """
    source, passport = workspace.source(model)
    target = workspace.graph(model, "fp16")
    parents = {"source_graph": sha256_file(source)}
    if not force and (found := existing_graph(target)) and found.passport.parents == parents:
        settings = found.passport.settings
        near = settings.get("near_limit", ())
        asked = {name for name in settings.get("keep_fp32", ()) if name not in near}
        if asked == set(config.keep) and settings.get("half_io") == config.half_io:
            return found
    with progress.task(f"convert {model} to FP16"):
        samples = _judged_images(workspace, model, passport.preprocess)
        return convert_to_fp16(source, target, samples, config)
