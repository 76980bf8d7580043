"""The way of the data, in Python: export -> calibrate -> quantise -> build -> verify -> package.

    from clipdeploy.pipeline import Workspace, build_model, export_model, verify_model

    workspace = Workspace(Path("artifacts"))
    export_model(workspace, "clip-vit-base-p16")
    build_model(workspace, "clip-vit-base-p16", "int8", data=Path("calibration"))

All stages at once, and a package at their end if the verdict passed:

    config = DeployConfig(val=Path("val"), calibration=Path("calibration"))
    deployment = deploy_model(workspace, "clip-vit-base-p16", config)

A stage a function; the commands call the same ones.
"""

from clipdeploy.cluster import ClusterConfig
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.builder import EngineArtifact
from clipdeploy.packaging.cpp import CppPackage
from clipdeploy.packaging.triton import TritonPackage
from clipdeploy.packaging.triton_config import TritonConfig
from clipdeploy.stages.bisect import BisectConfig, bisect_model
from clipdeploy.stages.build import build_model
from clipdeploy.stages.calibrate import (
    CalibrateConfig,
    CalibrationArtifact,
    calibrate_model,
    merge_calibration,
)
from clipdeploy.stages.deploy import DeployConfig, Deployment, deploy_model
from clipdeploy.stages.export import export_model
from clipdeploy.stages.merge import merge_verification
from clipdeploy.stages.package import artifact_to_package, package_cpp, package_triton
from clipdeploy.stages.predict import Predictions, predict_images
from clipdeploy.stages.quantize import convert_model, quantize_model
from clipdeploy.stages.report import write_reports
from clipdeploy.stages.samples import sample_images
from clipdeploy.stages.search import search_model
from clipdeploy.stages.stage_log import StageRun, StageWatch
from clipdeploy.stages.verify import verify_model
from clipdeploy.stages.verify_setup import Judgement, VerifyScope
from clipdeploy.tuning.search import SearchConfig, SearchResult
from clipdeploy.verification.baseline import Expected
from clipdeploy.verification.result import Verification
from clipdeploy.verification.verifier import VerifyConfig
from clipdeploy.workspace import Workspace

__all__ = [
    "BisectConfig",
    "BuildConfig",
    "CalibrateConfig",
    "CalibrationArtifact",
    "ClusterConfig",
    "CppPackage",
    "DeployConfig",
    "Deployment",
    "EngineArtifact",
    "Expected",
    "Judgement",
    "Predictions",
    "SearchConfig",
    "SearchResult",
    "StageRun",
    "StageWatch",
    "TritonConfig",
    "TritonPackage",
    "Verification",
    "VerifyConfig",
    "VerifyScope",
    "Workspace",
    "artifact_to_package",
    "bisect_model",
    "build_model",
    "calibrate_model",
    "convert_model",
    "deploy_model",
    "export_model",
    "merge_calibration",
    "merge_verification",
    "package_cpp",
    "package_triton",
    "predict_images",
    "quantize_model",
    "sample_images",
    "search_model",
    "verify_model",
    "write_reports",
]
