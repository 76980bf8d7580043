"""``clipdeploy demo``: run the whole pipeline on the demo model."""

from __future__ import annotations

from clipdeploy.cli.common import (
    EXIT_VERIFICATION,
    Context,
    emit,
    stage_command,
)
from clipdeploy.cli.shared_options import force_option
from clipdeploy.cli.usage import command


@command(epilog="\b\nclipdeploy demo")
@force_option
@stage_command
def demo(context: Context, force: bool) -> int:
    """Run the whole pipeline on the demo model, offline.

    Exports, calibrates, quantises, builds engines and verifies them on real handwritten digits.
    Everything it needs is installed with clipdeploy.
    """
    context.note(
        "demo: downloads nothing; the model and its images are installed with clipdeploy. "
        f"Artifacts are written to {context.workspace.root}."
    )
    from clipdeploy.stages.demo import run_demo

    result = run_demo(context.workspace, force=force, progress=context.progress)
    emit(context, result, lambda: result)
    return 0 if result.verification else EXIT_VERIFICATION
