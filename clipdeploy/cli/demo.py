"""``clipdeploy demo``: everything on the demo card."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from clipdeploy.cli.common import (
    EXIT_VERIFICATION,
    Context,
    emit,
    force_option,
    stage_command,
)

if TYPE_CHECKING:
    from rich.console import Group

    from clipdeploy.demo import DemoResult


@click.command()
@force_option
@stage_command
def demo(context: Context, force: bool) -> int:
    """Export, calibrate, INT8, engines and verdict on real handwritten digits, offline."""
    from clipdeploy.demo import run_demo

    result = run_demo(context.workspace, force=force, progress=context.progress)
    emit(context, result, lambda: _render(result))
    return 0 if result.verification else EXIT_VERIFICATION


def _render(result: DemoResult) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from clipdeploy.verification.table import verification_table

    table = Table(box=None, pad_edge=False)
    for title in ("engine", "bytes", "build s", "TensorRT"):
        figures = title in ("bytes", "build s")
        table.add_column(title, justify="right" if figures else "left", overflow="fold")
    for engine in result.engines:
        made = engine.passport
        table.add_row(
            engine.path.name,
            f"{made.plan_bytes:,}",
            f"{made.build_seconds:.2f}",
            f"{made.backend} {made.backend_version}",
        )
    note = (
        "The engines ran on this machine's GPU."
        if result.engines_executed
        else "No GPU here: the engines were built, not executed. The verdict is on the graphs that "
        "they were compiled from, run by ONNX Runtime."
    )
    report = Text(f"Report: {result.report}", no_wrap=True, overflow="ignore")
    parts = (verification_table(result.verification), table, Text(note), report)
    return Group(*[line for part in parts for line in (part, Text(""))][:-1])
