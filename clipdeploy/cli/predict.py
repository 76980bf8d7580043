"""``clipdeploy predict``: classify images."""

from __future__ import annotations

from pathlib import Path

import click

from clipdeploy.cli.common import Context, emit, stage_command
from clipdeploy.cli.numbers import number
from clipdeploy.cli.options import option
from clipdeploy.cli.params import ArtifactPath
from clipdeploy.cli.shared_options import model_option
from clipdeploy.cli.usage import command
from clipdeploy.core.spans import TOP


@command(epilog="\b\nclipdeploy predict cat.jpg dog.jpg --top 3")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_option
@option(
    "--artifact",
    type=ArtifactPath(),
    help="Graph or engine to run.",
    default_text="the model's fastest one that runs here",
)
@option(
    "--top",
    type=number(TOP),
    default=5,
    metavar="COUNT",
    help="Number of most likely classes to print for each image.",
)
@stage_command
def predict(
    context: Context, images: tuple[Path, ...], model: str | None, artifact: Path | None, top: int
) -> None:
    """Print the most likely classes of images.

    IMAGES are files, folders or archives.
    """
    name = None if artifact is not None and model is None else context.model(model)
    from clipdeploy.stages.predict import predict_images

    result = predict_images(
        context.workspace, name, images, artifact, top=top, progress=context.progress
    )
    context.note(f"{result.artifact} on {result.runner}")
    for problem in result.problems:
        context.note(problem)
    emit(context, result, lambda: result)
