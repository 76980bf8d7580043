"""Graph -> engine, whatever has to come first."""

from __future__ import annotations

from pathlib import Path

from calibration.qdq import QuantizeConfig
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.builder import EngineArtifact, build_engine
from clipdeploy.stages.calibrate import CalibrateConfig, calibrate_model
from clipdeploy.stages.quantize import convert_model, quantize_model
from clipdeploy.workspace import Workspace
from exporters.artifact import Precision
from exporters.precision import Fp16Config
from exporters.progress import SILENT, Progress

__all__ = ["build_model"]


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
