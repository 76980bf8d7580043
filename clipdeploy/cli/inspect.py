"""``clipdeploy inspect``: what a file is, by its own passport."""

from __future__ import annotations

from pathlib import Path

import click

from clipdeploy.cli.common import Context, emit, stage_command, trust_option
from clipdeploy.cli.params import ArtifactPath
from clipdeploy.cli.usage import command, refuse_unused


@command(epilog="\b\nclipdeploy inspect artifacts/MODEL/int8.engine")
@click.argument("file", type=ArtifactPath())
@trust_option
@stage_command
def inspect(context: Context, file: Path, trust: bool) -> None:
    """Show the passport of an .onnx or .engine file, and the precision of each block.

    On a machine with a GPU an engine is loaded and tells in which precision each block runs;
    elsewhere it is said what the graph asks for.
    """
    if file.suffix == ".onnx":
        refuse_unused(["trust"], "engines", "name an .engine file")
    from clipdeploy.workspace.inspection import inspect_file

    result = inspect_file(file, trust=trust)
    emit(context, result, lambda: result)
