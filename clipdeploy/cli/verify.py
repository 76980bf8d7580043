"""``clipdeploy verify``: the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from clipdeploy.cli.common import (
    EXIT_VERIFICATION,
    Context,
    data_option,
    emit,
    model_option,
    skip_unreadable_option,
    stage_command,
)

if TYPE_CHECKING:
    from rich.console import Group

    from clipdeploy.imaging.layouts import LayoutName
    from clipdeploy.verification.verifier import Verification


@click.command()
@model_option
@data_option("Labelled images: a folder, zip or tar; see --layout.")
@click.option(
    "--max-drop",
    type=float,
    default=1.0,
    show_default=True,
    help="Percentage points of top-1 that an artifact may lose.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Only so many images, spread over the classes."
)
@click.option(
    "--graphs-only", is_flag=True, help="Judge the ONNX graphs and leave the engines out."
)
@click.option(
    "--allow-leak", is_flag=True, help="Count calibration images among --data, do not refuse."
)
@click.option(
    "--layout",
    type=click.Choice(["auto", "folders", "list", "devkit", "solution", "none"]),
    default="auto",
    show_default=True,
    help="Where the classes stand: folders, NAME CLASS list, ILSVRC devkit, Kaggle's CSV.",
)
@click.option("--labels", type=click.Path(path_type=Path), help="The file they stand in.")
@click.option("--workers", type=click.IntRange(min=0), help="Decoding processes; one a core.")
@click.option("--cache", is_flag=True, help="Keep decoded crops for the next verification.")
@click.option("--cache-size", type=float, metavar="GB", help="Most of them; 32 GiB if left out.")
@skip_unreadable_option
@stage_command
def verify(
    context: Context,
    model: str | None,
    data: Path,
    max_drop: float,
    limit: int | None,
    graphs_only: bool,
    allow_leak: bool,
    layout: LayoutName,
    labels: Path | None,
    workers: int | None,
    cache: bool,
    cache_size: float | None,
    skip_unreadable: bool,
) -> int:
    """Judge every artifact of the model against PyTorch; exit 3 unless all of them pass."""
    name = context.model(model)
    from clipdeploy.imaging.crops import CropCache
    from clipdeploy.stages.verify import verify_model
    from clipdeploy.verification.verifier import VerifyConfig

    kept = CropCache.default() if cache_size is None else CropCache.default(int(cache_size * 1e9))
    result = verify_model(
        context.workspace,
        name,
        data,
        VerifyConfig(
            max_drop,
            skip_unreadable=skip_unreadable,
            workers=workers,
            cache=kept if cache else None,
        ),
        limit=limit,
        graphs_only=graphs_only,
        allow_leak=allow_leak,
        layout=layout,
        labels=labels,
        note=context.note,
        progress=context.progress,
    )
    for skipped in result.skipped:
        context.note(f"skipped, unreadable: {skipped}")
    emit(context, result, lambda: render(result))
    return 0 if result else EXIT_VERIFICATION


def render(result: Verification) -> Group:
    """The verdict as a terminal table."""
    from clipdeploy.verification.table import verification_table

    return verification_table(result)
