"""``clipdeploy predict``: what is in these images?"""

from __future__ import annotations

from pathlib import Path

import click

from clipdeploy.cli.common import Context, emit, model_option, stage_command
from clipdeploy.cli.numbers import number
from clipdeploy.cli.params import ArtifactPath
from clipdeploy.cli.usage import command
from clipdeploy.core.spans import TOP


@command(epilog="\b\nclipdeploy predict cat.jpg dog.jpg --top 3")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_option
@click.option(
    "--artifact",
    type=ArtifactPath(),
    help="A graph or an engine; the fastest one of the model that runs here if left out.",
)
@click.option("--top", type=number(TOP), default=5, show_default=True, help="Classes an image.")
@stage_command
def predict(
    context: Context, images: tuple[Path, ...], model: str | None, artifact: Path | None, top: int
) -> None:
    """Name the likeliest classes of IMAGES: files, folders or archives."""
    name = None if artifact is not None and model is None else context.model(model)
    from clipdeploy.stages.predict import predict_images

    result = predict_images(
        context.workspace, name, images, artifact, top=top, progress=context.progress
    )
    context.note(f"{result.artifact} on {result.runner}")
    for problem in result.problems:
        context.note(problem)
    emit(context, result, lambda: result)
