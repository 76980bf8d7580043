"""Builds an engine, calibrating and quantising first if necessary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from calibration.config import QuantizeConfig
from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import QUANTISED, Precision, Tower
from clipdeploy.core.paths import StrPath, as_path
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.builder import EngineArtifact, build_engine
from clipdeploy.models.cards import takes_any_name
from clipdeploy.stages.calibrate import CalibrateConfig, calibrate_model
from clipdeploy.stages.quantize import (
    chosen_config,
    convert_model,
    in_format,
    quantize_model,
    refuse_quantised_only,
    refuse_unbuildable,
)
from clipdeploy.workspace.folder import Workspace
from exporters.precision import Fp16Config

__all__ = ["build_model"]


@takes_any_name
def build_model(
    workspace: Workspace,
    model: str,
    precision: Precision,
    config: BuildConfig = BuildConfig(),
    *,
    data: StrPath | None = None,
    calibrate: CalibrateConfig = CalibrateConfig(),
    fp16: Fp16Config = Fp16Config(),
    quantize: QuantizeConfig = QuantizeConfig(),
    tower: Tower = "image",
    force: bool = False,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress = SILENT,
) -> EngineArtifact:
    """Build an engine of ``precision``; calibrate and quantise first if necessary.

    ``data`` are calibration images; None uses the calibration in the workspace.  ``quantize`` is
    for INT8 and FP8; ``precision`` sets its format.  A graph that a search wrote is kept unless
    ``quantize`` or ``force`` is given.  ``tower`` is ``text`` for the text tower of an embedding
    model.  ``note`` is called with remarks on the images and the graph.

    Raises:
        UsageError: a configuration that ``precision`` does not use, or that has no engine; or a
            text tower in INT8 or FP8.
        ClipdeployError: see :mod:`clipdeploy.core.errors`.
    """
    data = as_path(data)
    _refuse_unused(precision, config, data, calibrate, fp16, quantize)
    if tower == "text" and precision in QUANTISED:
        raise UsageError(
            f"the text tower has no {precision} engine: it is not calibrated with texts",
            hint="build --fp16 or --fp32",
        )
    workspace.source(model, tower)
    if precision in QUANTISED:
        quantize = in_format(quantize, precision)
        quantize = chosen_config(workspace, model, quantize, force=force, note=note)
        if data is not None:
            made = calibrate_model(
                workspace, model, data, calibrate, force=force, progress=progress
            )
            for text in made.notes():
                note(text)
        quantize_model(
            workspace,
            model,
            quantize,
            backend=config.backend,
            force=force,
            progress=progress,
        )
    elif precision == "fp16":
        convert_model(workspace, model, fp16, tower=tower, force=force, progress=progress)
    return build_engine(
        workspace.graph(model, precision, tower),
        workspace.engine(model, precision, tower),
        config,
        force=force,
        progress=progress,
    )


def _refuse_unused(
    precision: Precision,
    config: BuildConfig,
    data: Path | None,
    calibrate: CalibrateConfig,
    fp16: Fp16Config,
    quantize: QuantizeConfig,
) -> None:
    """Refuse arguments that would have no effect, and INT8 that ``config`` cannot build.

    Raises:
        UsageError: it names the first one.
    """
    if precision not in QUANTISED:
        refuse_quantised_only({"data": data is not None, "quantize": quantize != QuantizeConfig()})
    refuse_unbuildable(quantize, config.backend)
    if data is None and calibrate != CalibrateConfig():
        raise UsageError("calibrate belongs to data", hint="leave it out, or pass images")
    if precision != "fp16" and fp16 != Fp16Config():
        raise UsageError("fp16 belongs to an engine in FP16", hint="leave it out, or build fp16")
