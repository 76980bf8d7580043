"""Makes the FP16 graph, and with a calibration the INT8 and FP8 graphs, from the FP32 graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from calibration.config import QuantizeConfig, is_made_with
from calibration.formats import FORMATS
from calibration.policy import Placement, place
from calibration.qdq import QuantizedGraph, quantize
from calibration.quality import Quality
from calibration.recipe import QuantizeRecipe, load_recipe
from calibration.table import load_table
from clipdeploy.core.errors import BuildError, UsageError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import Passport, Precision, Tower, from_json, to_json
from clipdeploy.core.paths import StrPath
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.engines.backends import Backend, BackendOption, choose_backend, scale_forms
from clipdeploy.models.cards import takes_any_name
from clipdeploy.stages.calibrate import is_calibrated
from clipdeploy.stages.samples import sample_images, sample_texts
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph
from exporters.headers import GraphArtifact, existing_graph, graph_sha256, read_passport
from exporters.precision import Fp16Config, convert_to_fp16
from exporters.samples import GraphSamples

__all__ = [
    "calibration_file",
    "chosen_config",
    "convert_model",
    "in_format",
    "model_quality",
    "quantize_model",
    "read_recipe",
    "recipe_config",
    "refuse_quantised_only",
    "refuse_unbuildable",
    "stored_quality",
    "with_scale_form",
    "write_quantised",
]

# Number of sample images on which float16 storage is checked.
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
    """Write the INT8 or FP8 graph, from the FP32 graph and its calibration.

    An existing graph is reused if it was made from the same files with the same ``config``.  To
    keep the graph that a search wrote, take ``config`` from :func:`chosen_config`.
    The weight scales have the form for ``backend`` unless ``config`` names one.

    Raises:
        ClipdeployError: see :mod:`clipdeploy.core.errors`.
    """
    config = with_scale_form(config, backend)
    source, _ = workspace.source(model)
    calibration = calibration_file(workspace, model)
    target = _target(workspace, model, config)
    parents = {"source_graph": graph_sha256(source), "calibration": sha256_file(calibration)}
    if not force and (found := existing_graph(target)):
        made = found.passport
        if made.made_from == parents and is_made_with(made.settings, config):
            return QuantizedGraph(found, _placement(source, config, found), stored_quality(found))
    with progress.task(f"quantise {model}"):
        return write_quantised(source, calibration, target, config)


def write_quantised(
    source: Path, calibration: Path, target: Path, config: QuantizeConfig
) -> QuantizedGraph:
    """Write the INT8 or FP8 graph of the FP32 graph ``source`` to ``target``.

    Raises:
        ClipdeployError: see :func:`calibration.qdq.quantize`.
    """
    samples = sample_images(read_passport(source).preprocess, _STORAGE_IMAGES)
    return quantize(source, calibration, target, samples, config)


def with_scale_form(config: QuantizeConfig, backend: BackendOption = "auto") -> QuantizeConfig:
    """``config`` with a form of the weight scales; ``backend`` decides unless ``config`` names one.

    If no TensorRT is installed, the form is that for TensorRT; ``build-engine`` checks it later.
    """
    if config.weight_scales is not None:
        return config
    if config.remainder == "fp32" or config.default_scales == "tensor":
        return replace(config, weight_scales=config.default_scales)
    return replace(config, weight_scales=scale_forms(_backend(backend))[0])


def _backend(asked: BackendOption) -> Backend:
    """The backend that ``asked`` chooses; TensorRT if none is installed."""
    if asked != "auto":
        return asked
    try:
        return choose_backend(asked).backend
    except BuildError:
        return "tensorrt"


def _target(workspace: Workspace, model: str, config: QuantizeConfig) -> Path:
    return workspace.graph(model, config.precision)


def in_format(config: QuantizeConfig, precision: Precision) -> QuantizeConfig:
    """``config`` for a graph of ``precision``, ``int8`` or ``fp8``.

    Raises:
        UsageError: ``config`` is for FP8 and ``precision`` is not.
    """
    if config.format == "fp8" and precision != "fp8":
        raise UsageError(
            f"a configuration for FP8, but the precision is {precision}",
            hint="choose fp8, or a configuration for int8",
        )
    return replace(config, format="fp8") if precision == "fp8" else config


def calibration_file(workspace: Workspace, model: str) -> Path:
    """The model's calibration.

    Raises:
        UsageError: the model has not been calibrated.
    """
    path = workspace.calibration(model)
    if not path.exists():
        raise UsageError(
            f"{model} has not been calibrated in {workspace.root}",
            hint="clipdeploy calibrate --data CALIBRATION_IMAGES",
        )
    return path


def refuse_quantised_only(given: Mapping[str, bool]) -> None:
    """Refuse arguments of INT8 and FP8; ``given`` says for each name whether it was given.

    Raises:
        UsageError: it names the first one that was given.
    """
    for name, is_given in given.items():
        if is_given:
            raise UsageError(
                f"{name} belongs to --int8 and --fp8", hint="leave it out, or choose one of them"
            )


@takes_any_name
def recipe_config(
    workspace: Workspace, model: str, path: StrPath, precision: Precision | None = None
) -> QuantizeConfig:
    """The configuration in a recipe file, for ``precision`` if it is given.

    Raises:
        ArtifactError, FileError: it cannot be read, or belongs to other weights than the model's.
        UsageError: it is for another precision.
    """
    recipe = read_recipe(Path(path), precision)
    recipe.check(workspace.source(model)[1].weights.identity)
    return recipe.config


def read_recipe(path: Path, precision: Precision | None = None) -> QuantizeRecipe:
    """Read a recipe file and check that it is for ``precision``, if that is given.

    Raises:
        ArtifactError, FileError: it cannot be read.
        UsageError: it is for another precision.
    """
    recipe = load_recipe(path)
    if precision in FORMATS and precision != recipe.config.format:
        raise UsageError(
            f"{path} is a recipe for {recipe.config.format}, not for {precision}",
            hint=f"choose --{recipe.config.format}, or leave out --recipe",
        )
    return recipe


def refuse_unbuildable(config: QuantizeConfig, backend: BackendOption = "auto") -> None:
    """Refuse a configuration whose graph ``backend`` does not build, before it is made.

    Raises:
        UsageError: the remainder is not FP16, or the weight scales have another backend's form.
    """
    if config.remainder != "fp16":
        raise UsageError(
            f"no engine is built from INT8 with the rest in {config.remainder}",
            hint="leave the remainder at fp16; fp32 is for graphs on a CPU",
        )
    possible = scale_forms(_backend(backend))
    if config.weight_scales not in (None, *possible):
        raise UsageError(
            f"weight scales in {config.weight_scales} form, but this backend needs {possible[0]}",
            hint="leave out --weight-scales, or choose another --backend",
        )


@takes_any_name
def chosen_config(
    workspace: Workspace,
    model: str,
    asked: QuantizeConfig = QuantizeConfig(),
    *,
    force: bool = False,
    note: Callable[[str], object] = lambda text: None,
) -> QuantizeConfig:
    """The configuration of the quantised graph: ``asked``, or that of a search.

    A graph that a search wrote is kept if ``asked`` is the default, apart from ``format``,
    ``remainder``, ``min_sqnr`` and ``weight_scales``; ``force`` replaces it.  ``note`` is called if
    it is kept.

    Raises:
        ClipdeployError: the recipe or the graph of the search cannot be read.
    """
    searched = None if force else _searched_config(workspace, model, asked)
    if searched is None:
        return asked
    label = asked.number_format.label
    note(f"keeping the {label} graph of the search; --force or {label} options replace it")
    return searched


def _searched_config(
    workspace: Workspace, model: str, asked: QuantizeConfig
) -> QuantizeConfig | None:
    """The configuration of the graph, if a search wrote it and ``asked`` is the default."""
    default = QuantizeConfig(remainder=asked.remainder, format=asked.format)
    path = workspace.recipe(model)
    other = replace(asked, min_sqnr=default.min_sqnr, weight_scales=None)
    if other != default or not path.exists():
        return None
    if (graph := existing_graph(_target(workspace, model, asked))) is None:
        return None
    config = load_recipe(path).config
    if config.precision != asked.precision:
        return None
    # Both forms hold the same integers, so the graph is the searched one in either form.
    settings = graph.passport.settings
    either = replace(config, weight_scales=settings.get("weight_scales", "channel"))
    if not is_made_with(settings, either):
        return None
    return replace(config, weight_scales=asked.weight_scales or config.weight_scales)


def _placement(source: Path, config: QuantizeConfig, made: GraphArtifact) -> Placement:
    placement = place(load_graph(source), config.exclude, config.scope)
    return placement.without(made.passport.settings.get(f"{config.format}_left_out", {}))


def model_quality(
    workspace: Workspace, model: str, precision: Precision = "int8"
) -> Quality | None:
    """The :func:`stored_quality` of a graph in the workspace; None if there is none.

    Raises:
        ArtifactError: its passport cannot be read.
    """
    graph = existing_graph(workspace.graph(model, precision))
    return None if graph is None else stored_quality(graph)


def stored_quality(graph: GraphArtifact) -> Quality | None:
    """The quality that was measured when a quantised graph was made; None if it was not measured.

    Raises:
        ArtifactError: the passport of the graph is invalid.
    """
    found = graph.passport.settings.get("quality")
    return None if found is None else from_json(to_json(found), Quality, str(graph.path))


def _judged(workspace: Workspace, model: str, passport: Passport) -> GraphSamples:
    """What float16 storage is checked with: sample texts, or sample and calibration images."""
    if passport.tower == "text":
        return sample_texts()
    samples = sample_images(passport.preprocess, _STORAGE_IMAGES)
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
    tower: Tower = "image",
    force: bool = False,
    progress: Progress = SILENT,
) -> GraphArtifact:
    """Write the FP16 graph, from the FP32 graph of the same ``tower``.

    An existing graph is reused if it was made from the same file with the same ``config``.

    Raises:
        ClipdeployError: see :mod:`clipdeploy.core.errors`.
    """
    source, passport = workspace.source(model, tower)
    target = workspace.graph(model, "fp16", tower)
    parents = {"source_graph": graph_sha256(source)}
    if not force and (found := existing_graph(target)) and found.passport.made_from == parents:
        settings = found.passport.settings
        near = settings.get("near_limit", ())
        asked = {name for name in settings.get("keep_fp32", ()) if name not in near}
        if asked == set(config.keep) and settings.get("half_io") == config.half_io:
            return found
    with progress.task(f"convert {model} to FP16"):
        return convert_to_fp16(source, target, _judged(workspace, model, passport), config)
