"""The whole pipeline on the demo card and its real images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from clipdeploy import zoo
from clipdeploy.device import gpus
from clipdeploy.engines.builder import EngineArtifact
from clipdeploy.pipeline import (
    VerifyScope,
    build_model,
    export_model,
    verify_model,
    write_reports,
)
from clipdeploy.verification.result import Verification
from clipdeploy.workspace import PRECISIONS, Workspace
from exporters.headers import GraphArtifact
from exporters.notebook import Renderable, Shown
from exporters.progress import SILENT, Progress

__all__ = ["DemoResult", "run_demo"]


@dataclass(frozen=True)
class DemoResult(Shown):
    """What the demo made, and the verdict on it.

    ``engines_executed`` is False where there is no GPU: then the verdict is on the very graphs
    that the engines were compiled from, run by ONNX Runtime.  ``report`` is an HTML page.
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
            else "No GPU here: the engines were built, not executed. The verdict is on the graphs "
            "that they were compiled from, run by ONNX Runtime."
        )
        report = Text(f"Report: {self.report}", no_wrap=True, overflow="ignore")
        parts = (self.verification, _engines(self.engines), Text(note), report)
        return Group(*[line for part in parts for line in (part, Text(""))][:-1])


def _engines(engines: tuple[EngineArtifact, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("engine", "bytes", "build s", "TensorRT"):
        figures = title in ("bytes", "build s")
        table.add_column(title, justify="right" if figures else "left", overflow="fold")
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

    Raises:
        ClipdeployError: a stage failed.
    """
    graph = export_model(workspace, zoo.DEMO, force=force, progress=progress)
    engines = tuple(
        build_model(
            workspace,
            zoo.DEMO,
            precision,
            data=zoo.demo_file("calibration.zip"),
            force=force,
            progress=progress,
        )
        for precision in PRECISIONS
    )
    executed = bool(gpus())
    judgement = verify_model(
        workspace,
        zoo.DEMO,
        zoo.demo_file("test.zip"),
        scope=VerifyScope(graphs_only=not executed),
        force=force,
        progress=progress,
    )
    assert judgement.verification is not None  # only a shard has none
    report = workspace.report(zoo.DEMO)
    write_reports(judgement, [report])
    return DemoResult(graph, engines, judgement.verification, executed, report)
