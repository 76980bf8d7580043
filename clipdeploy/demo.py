"""The whole pipeline on the demo card and its real images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clipdeploy import zoo
from clipdeploy.device import gpus
from clipdeploy.engines.builder import EngineArtifact
from clipdeploy.pipeline import DeployConfig, VerifyScope, deploy_model
from clipdeploy.verification.result import Verification
from clipdeploy.workspace import PRECISIONS, Workspace
from exporters.headers import GraphArtifact
from exporters.progress import SILENT, Progress

__all__ = ["DemoResult", "run_demo"]


@dataclass(frozen=True)
class DemoResult:
    """What the demo made, and the verdict on it.

    ``engines_executed`` is False where there is no GPU: then the verdict is on the very graphs
    that the engines were compiled from, run by ONNX Runtime.  ``report`` is an HTML page.
    """

    graph: GraphArtifact
    engines: tuple[EngineArtifact, ...]
    verification: Verification
    engines_executed: bool
    report: Path


def run_demo(
    workspace: Workspace, *, force: bool = False, progress: Progress = SILENT
) -> DemoResult:
    """Export, calibrate, quantise, build FP32, FP16 and INT8 engines, verify on held-out digits.

    Raises:
        ClipdeployError: a stage failed.
    """
    executed = bool(gpus())
    config = DeployConfig(
        val=zoo.demo_file("test.zip"),
        calibration=zoo.demo_file("calibration.zip"),
        beside=PRECISIONS,
        scope=VerifyScope(graphs_only=not executed),
        benchmark=None,
        package=False,
    )
    made = deploy_model(workspace, zoo.DEMO, config, force=force, progress=progress)
    return DemoResult(made.graphs[0], made.engines, made.verification, executed, made.report)
