"""The way of the data, in Python: a verb a stage, a frozen config in, a frozen result out.

    from clipdeploy.pipeline import Workspace, build_model, export_model, verify_model

    workspace = Workspace("artifacts")
    export_model(workspace, "clip-vit-base-p16")
    build_model(workspace, "clip-vit-base-p16", "int8", data="calibration")
    verify_model(workspace, "clip-vit-base-p16", "imagenet-val")

All stages at once, and a package at their end if the verdict passed:

    config = DeployConfig(val="val", calibration="calibration")
    deployment = deploy_model(workspace, "clip-vit-base-p16", config)

The commands call the same functions.  A result is a table where a notebook or rich shows it, and a
truth value where it is a verdict.  ``docs/python.md`` has every verb with an example.
"""

from calibration.config import QuantizeConfig
from calibration.policy import Scope
from calibration.qdq import QuantizedGraph
from calibration.scheme import SchemeConfig
from clipdeploy.benchmark import (
    Benchmark,
    BenchmarkConfig,
    SpeedEstimate,
    benchmark_artifacts,
    benchmark_model,
    estimate_artifacts,
    estimate_model,
)
from clipdeploy.core.errors import ClipdeployError
from clipdeploy.core.passport import ModelChoices, Recipe
from clipdeploy.core.progress_bars import ProgressBars
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.builder import EngineArtifact
from clipdeploy.imaging import Labelling
from clipdeploy.models.load import WeightsChoice, ZeroShot
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
from clipdeploy.stages.cluster import ClusterConfig
from clipdeploy.stages.deploy.run import DeployConfig, Deployment, deploy_model
from clipdeploy.stages.export import export_model
from clipdeploy.stages.package import artifact_to_package, package_cpp, package_triton
from clipdeploy.stages.predict import Predictions, predict_images
from clipdeploy.stages.quantize import convert_model, quantize_model
from clipdeploy.stages.report import write_reports
from clipdeploy.stages.samples import sample_images
from clipdeploy.stages.search import search_model
from clipdeploy.stages.stage_log import StageRun, StageWatch
from clipdeploy.stages.text_tower import ExportedTowers, export_towers
from clipdeploy.stages.verify.merge import merge_verification
from clipdeploy.stages.verify.run import verify_model
from clipdeploy.stages.verify.setup import Judgement, VerifyScope
from clipdeploy.stages.verify.texts import verify_texts
from clipdeploy.tuning.result import Bisection
from clipdeploy.tuning.search import SearchConfig, SearchResult
from clipdeploy.verification.baseline import Expected
from clipdeploy.verification.result import Verification
from clipdeploy.verification.verdicts import Limits
from clipdeploy.verification.verifier import VerifyConfig
from clipdeploy.workspace.folder import Workspace
from clipdeploy.workspace.inspection import Inspection, inspect_file
from exporters.headers import GraphArtifact
from exporters.onnx import ExportConfig
from exporters.precision import Fp16Config

# The name of SchemeConfig in earlier versions; deprecated.
PlanConfig = SchemeConfig

__all__ = [
    "Benchmark",
    "BenchmarkConfig",
    "BisectConfig",
    "Bisection",
    "BuildConfig",
    "CalibrateConfig",
    "CalibrationArtifact",
    "ClipdeployError",
    "ClusterConfig",
    "CppPackage",
    "DeployConfig",
    "Deployment",
    "EngineArtifact",
    "Expected",
    "ExportConfig",
    "ExportedTowers",
    "Fp16Config",
    "GraphArtifact",
    "Inspection",
    "Judgement",
    "Labelling",
    "Limits",
    "ModelChoices",
    "Predictions",
    "ProgressBars",
    "QuantizeConfig",
    "QuantizedGraph",
    "Recipe",
    "SchemeConfig",
    "Scope",
    "SearchConfig",
    "SearchResult",
    "SpeedEstimate",
    "StageRun",
    "StageWatch",
    "TritonConfig",
    "TritonPackage",
    "Verification",
    "VerifyConfig",
    "VerifyScope",
    "WeightsChoice",
    "Workspace",
    "ZeroShot",
    "artifact_to_package",
    "benchmark_artifacts",
    "benchmark_model",
    "bisect_model",
    "build_model",
    "calibrate_model",
    "convert_model",
    "deploy_model",
    "estimate_artifacts",
    "estimate_model",
    "export_model",
    "export_towers",
    "inspect_file",
    "merge_calibration",
    "merge_verification",
    "package_cpp",
    "package_triton",
    "predict_images",
    "quantize_model",
    "sample_images",
    "search_model",
    "verify_model",
    "verify_texts",
    "write_reports",
]
