"""``clipdeploy demo``: everything on the demo card."""

from __future__ import annotations

from clipdeploy.cli.common import (
    EXIT_VERIFICATION,
    Context,
    emit,
    force_option,
    stage_command,
)
from clipdeploy.cli.usage import command


@command(epilog="\b\nclipdeploy demo")
@force_option
@stage_command
def demo(context: Context, force: bool) -> int:
    """Export, calibrate, INT8, engines and verdict on real handwritten digits, offline."""
    from clipdeploy.stages.demo import run_demo

    result = run_demo(context.workspace, force=force, progress=context.progress)
    emit(context, result, lambda: result)
    return 0 if result.verification else EXIT_VERIFICATION
