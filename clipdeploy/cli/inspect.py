"""``clipdeploy inspect``: what a file is, by its own passport."""

from __future__ import annotations

from pathlib import Path

import click

from clipdeploy.cli.common import Context, emit, stage_command


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@stage_command
def inspect(context: Context, file: Path) -> None:
    """Show the passport of an .onnx or .engine file."""
    from clipdeploy.passport import load_engine_passport
    from exporters.artifact import to_json
    from exporters.graphs import read_passport

    passport = load_engine_passport(file) if file.suffix == ".engine" else read_passport(file)
    emit(context, passport, lambda: to_json(passport).decode())
