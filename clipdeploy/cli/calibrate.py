"""``clipdeploy calibrate``: images to activation statistics."""

from __future__ import annotations

from pathlib import Path

import click

from clipdeploy.cli.common import (
    Context,
    data_option,
    emit,
    force_option,
    model_option,
    skip_unreadable_option,
    stage_command,
)

images_option = click.option(
    "--images", type=click.IntRange(min=1), help="How many; all, up to 512, if left out."
)
seed_option = click.option(
    "--seed", type=int, default=0, show_default=True, help="Draws the images."
)


@click.command()
@model_option
@data_option("Folder or zip of calibration images; never the ones verification will use.")
@images_option
@seed_option
@skip_unreadable_option
@force_option
@stage_command
def calibrate(
    context: Context,
    model: str | None,
    data: Path,
    images: int | None,
    seed: int,
    skip_unreadable: bool,
    force: bool,
) -> None:
    """Observe the inputs of every Linear on real images."""
    name = context.model(model)
    from clipdeploy.pipeline import CalibrateConfig, calibrate_model

    result = calibrate_model(
        context.workspace,
        name,
        data,
        CalibrateConfig(images, seed, skip_unreadable),
        force=force,
        progress=context.progress,
    )
    for skipped in result.skipped:
        context.note(f"skipped, unreadable: {skipped}")
    emit(
        context,
        result,
        lambda: (
            f"{result.path}: {len(result.table.images)} images, "
            f"{len(result.table.statistics)} Linears" + ("" if result.changed else " (unchanged)")
        ),
    )
