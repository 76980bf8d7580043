"""``clipdeploy predict``: classify images, or compare them with texts."""

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


@command(
    epilog="\b\n"
    "clipdeploy predict cat.jpg dog.jpg --top 3\n"
    "clipdeploy predict cat.jpg --text 'a photo of a cat' --text 'a photo of a dog'"
)
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_option
@option(
    "--artifact",
    type=ArtifactPath(),
    help="Graph or engine to run.",
    default_text="the model's fastest one that runs here",
)
@option(
    "--texts",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="For an embedding model: texts to compare the images with, one a line.",
)
@option(
    "--text",
    multiple=True,
    metavar="TEXT",
    help="A text to compare the images with; may be given several times.",
)
@option(
    "--top",
    type=number(TOP),
    default=5,
    metavar="COUNT",
    help="Number of most likely classes or texts to print for each image.",
)
@stage_command
def predict(
    context: Context,
    images: tuple[Path, ...],
    model: str | None,
    artifact: Path | None,
    texts: Path | None,
    text: tuple[str, ...],
    top: int,
) -> None:
    """Print the most likely classes or texts of images.

    IMAGES are files, folders or archives.
    """
    name = None if artifact is not None and model is None else context.model(model)
    from clipdeploy.models.clip.prompts import read_texts
    from clipdeploy.stages.predict import predict_images

    result = predict_images(
        context.workspace,
        name,
        images,
        artifact,
        texts=(*text, *(read_texts(texts) if texts else ())),
        top=top,
        progress=context.progress,
    )
    beside = f", texts by {result.text_artifact}" if result.text_artifact else ""
    context.note(f"{result.artifact} on {result.runner}{beside}")
    for problem in result.problems:
        context.note(problem)
    emit(context, result, lambda: result)
