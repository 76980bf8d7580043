"""``clipdeploy predict``: what is in these images?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from clipdeploy.cli.common import Context, emit, model_option, stage_command
from clipdeploy.cli.params import ArtifactPath

if TYPE_CHECKING:
    from rich.console import Group

    from clipdeploy.stages.predict import Predictions


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_option
@click.option(
    "--artifact",
    type=ArtifactPath(),
    help="A graph or an engine; the fastest one of the model that runs here if left out.",
)
@click.option(
    "--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes an image."
)
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
    emit(context, result, lambda: _render(result))


def _render(result: Predictions) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Text | Table] = []
    for found in result.images:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(justify="right")
        for guess in found.guesses:
            named = guess.label if guess.label == guess.name else f"{guess.label} ({guess.name})"
            table.add_row(f"{guess.percent:6.2f} %", Text(named))
        parts += [Text(found.image, style="bold"), table]
    return Group(*parts)
