"""FP32 graph -> FP16 graph, or with its calibration -> INT8 graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from calibration.policy import Placement, place
from calibration.qdq import QuantizeConfig, QuantizedGraph, quantize
from calibration.recipe import load_recipe
from clipdeploy.stages.samples import sample_images
from clipdeploy.workspace import Workspace
from clipdeploy.zoo import takes_any_name
from exporters.artifact import settings_of
from exporters.errors import UsageError
from exporters.files import sha256_file
from exporters.graphs import load_graph
from exporters.headers import GraphArtifact, existing_graph
from exporters.precision import Fp16Config, convert_to_fp16
from exporters.progress import SILENT, Progress

__all__ = ["config_to_build", "convert_model", "quantize_model", "refuse_int8_only"]

# Images on which float16 storage is judged.
_STORAGE_IMAGES = 3


@takes_any_name
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
    if asked != QuantizeConfig() or graph is None or not path.exists():
        return None
    config = load_recipe(path).config
    made = graph.passport.settings.items() >= settings_of(config).items()
    return config if made and config.remainder == "fp16" else None


def _placement(source: Path, config: QuantizeConfig) -> Placement:
    return place(load_graph(source), config.exclude, config.scope)


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
        ClipdeployError: see :mod:`exporters.errors`.
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
        samples = sample_images(passport.preprocess, _STORAGE_IMAGES)
        return convert_to_fp16(source, target, samples, config)
