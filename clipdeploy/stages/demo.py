"""Runs the whole pipeline on the demo model and its real images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from clipdeploy.core.device import gpus
from clipdeploy.core.display import Renderable, Shown
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.engines.builder import EngineArtifact
from clipdeploy.models import cards
from clipdeploy.stages.deploy.run import DeployConfig, deploy_model
from clipdeploy.stages.verify.setup import VerifyScope
from clipdeploy.verification.result import Verification
from clipdeploy.workspace.folder import Workspace
from exporters.headers import GraphArtifact

__all__ = ["DemoResult", "run_demo"]


@dataclass(frozen=True)
class DemoResult(Shown):
    """The artifacts of the demo and their verdict.

    ``engines_executed`` is False without a GPU: then the verdict is on the graphs that the engines
    were compiled from, run by ONNX Runtime.  ``report`` is the path of an HTML page.
    """

    graph: GraphArtifact
    engines: tuple[EngineArtifact, ...]
    verification: Verification
    engines_executed: bool
    report: Path

    def __rich__(self) -> Renderable:
        note = (
            "The engines ran on this machine's GPU."
            if self.engines_executed
            else "This machine has no GPU: the engines were built but not executed. The verdict is "
            "on the graphs that they were compiled from, run by ONNX Runtime."
        )
        report = Text(f"Report: {self.report}", no_wrap=True, overflow="ignore")
        parts = (self.verification, _engines(self.engines), Text(note), report)
        return Group(*[line for part in parts for line in (part, Text(""))][:-1])


def _engines(engines: tuple[EngineArtifact, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("engine", "bytes", "build s", "TensorRT"):
        numbers = title in ("bytes", "build s")
        table.add_column(title, justify="right" if numbers else "left", overflow="fold")
    for engine in engines:
        made = engine.passport
        table.add_row(
            engine.path.name,
            f"{made.plan_bytes:,}",
            f"{made.build_seconds:.2f}",
            f"{made.backend} {made.backend_version}",
        )
    return table


def run_demo(
    workspace: Workspace, *, force: bool = False, progress: Progress = SILENT
) -> DemoResult:
    """Export, calibrate, quantise, build FP32, FP16 and INT8 engines, verify on held-out digits.

    Needs no network: weights and images are part of the package.

    Raises:
        ClipdeployError: a stage failed.
    """
    executed = bool(gpus())
    config = DeployConfig(
        val=cards.demo_file("test.zip"),
        calibration=cards.demo_file("calibration.zip"),
        beside=("fp32", "fp16"),
        scope=VerifyScope(graphs_only=not executed),
        benchmark=None,
        package=False,
    )
    made = deploy_model(workspace, cards.DEMO, config, force=force, progress=progress)
    return DemoResult(made.graphs[0], made.engines, made.verification, executed, made.report)
