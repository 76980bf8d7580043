"""``clipdeploy inspect``: show the passport of a file."""

from __future__ import annotations

from pathlib import Path

import click

from clipdeploy.cli.common import Context, emit, stage_command
from clipdeploy.cli.params import ArtifactPath
from clipdeploy.cli.shared_options import trust_option
from clipdeploy.cli.usage import command, refuse_unused


@command(epilog="\b\nclipdeploy inspect artifacts/MODEL/int8.engine")
@click.argument("file", type=ArtifactPath())
@trust_option
@stage_command
def inspect(context: Context, file: Path, trust: bool) -> None:
    """Show a file's passport and the precision of each block.

    FILE is an .onnx or .engine file. On a machine with a GPU an engine is loaded and the precisions
    are those in which its blocks run; elsewhere they are those that the graph requests.
    """
    if file.suffix == ".onnx":
        refuse_unused(["trust"], "engines", "name an .engine file")
    from clipdeploy.workspace.inspection import inspect_file

    result = inspect_file(file, trust=trust)
    emit(context, result, lambda: result)
