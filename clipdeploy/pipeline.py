"""The way of the data, in Python: export -> calibrate -> quantise -> build -> verify.

    from clipdeploy.pipeline import Workspace, build_model, export_model, verify_model

    workspace = Workspace(Path("artifacts"))
    export_model(workspace, "clip-vit-base-p16")
    build_model(workspace, "clip-vit-base-p16", "int8", data=Path("calibration"))

A stage a function; the commands call the same ones.
"""

from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.builder import EngineArtifact
from clipdeploy.stages.bisect import BisectConfig, bisect_model
from clipdeploy.stages.build import build_model
from clipdeploy.stages.calibrate import (
    CalibrateConfig,
    CalibrationArtifact,
    calibrate_model,
    merge_calibration,
)
from clipdeploy.stages.export import export_model
from clipdeploy.stages.quantize import convert_model, quantize_model
from clipdeploy.stages.samples import sample_images
from clipdeploy.stages.search import search_model
from clipdeploy.stages.verify import verify_model
from clipdeploy.tuning.search import SearchConfig, SearchResult
from clipdeploy.verification.verifier import Verification, VerifyConfig
from clipdeploy.workspace import Workspace

__all__ = [
    "BisectConfig",
    "BuildConfig",
    "CalibrateConfig",
    "CalibrationArtifact",
    "EngineArtifact",
    "SearchConfig",
    "SearchResult",
    "Verification",
    "VerifyConfig",
    "Workspace",
    "bisect_model",
    "build_model",
    "calibrate_model",
    "convert_model",
    "export_model",
    "merge_calibration",
    "quantize_model",
    "sample_images",
    "search_model",
    "verify_model",
]
