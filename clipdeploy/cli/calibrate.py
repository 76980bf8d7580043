"""``clipdeploy calibrate``: images to activation statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from clipdeploy.cli.common import (
    Context,
    cluster_or_none,
    data_option,
    emit,
    force_option,
    model_option,
    ray_option,
    shard_option,
    shard_or_none,
    skip_unreadable_option,
    stage_command,
    threads_option,
)
from clipdeploy.cli.numbers import number
from clipdeploy.cli.params import how_to_give
from clipdeploy.cli.usage import group
from clipdeploy.core.errors import UsageError
from clipdeploy.core.spans import IMAGES, SEED

if TYPE_CHECKING:
    from clipdeploy.stages.calibrate import CalibrationArtifact

images_option = click.option(
    "--images", type=number(IMAGES), help="How many; all, up to 512, if left out."
)
seed_option = click.option(
    "--seed", type=number(SEED), default=0, show_default=True, help="Draws the images."
)


@group(
    invoke_without_command=True,
    epilog="\b\nclipdeploy calibrate --data CALIBRATION_IMAGES --images 256",
)
@model_option
@data_option(
    "Folder or zip of calibration images; never the ones verification will use.",
    "calibration",
    required=False,
)
@images_option
@seed_option
@shard_option("calibrate merge")
@ray_option
@threads_option
@skip_unreadable_option
@force_option
@stage_command
def calibrate(
    context: Context,
    model: str | None,
    data: Path | None,
    images: int | None,
    seed: int,
    shard: str | None,
    ray: str | None,
    threads: int,
    skip_unreadable: bool,
    force: bool,
) -> None:
    """Observe the inputs of every Linear on real images.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    if click.get_current_context().invoked_subcommand is not None:
        return
    if data is None:
        way = "clipdeploy calibrate --data CALIBRATION_IMAGES"
        raise UsageError("no images", hint=how_to_give(way, "calibration"))
    name = context.model(model)
    from clipdeploy.stages.calibrate import FEW_IMAGES, CalibrateConfig, calibrate_model

    result = calibrate_model(
        context.workspace,
        name,
        data,
        CalibrateConfig(images, seed, skip_unreadable, shard_or_none(shard), threads),
        cluster=cluster_or_none(ray),
        force=force,
        progress=context.progress,
    )
    for text in result.notes():
        context.note(text)
    if len(result.table.images) < FEW_IMAGES and shard is None:
        context.note(
            f"only {len(result.table.images)} images: with {FEW_IMAGES} or more the ranges are "
            "those of the data rather than of these images"
        )
    emit(context, _summary(result), lambda: _line(result))


@calibrate.command()
@click.argument("shards", nargs=-1, type=click.Path(path_type=Path))
@model_option
@stage_command
def merge(context: Context, shards: tuple[Path, ...], model: str | None) -> None:
    """Join the shards of `calibrate --shard`: the given files, or all of the workspace."""
    name = context.model(model)
    from clipdeploy.stages.calibrate import merge_calibration

    result = merge_calibration(context.workspace, name, shards)
    emit(context, _summary(result), lambda: _line(result))


def _summary(result: CalibrationArtifact) -> dict[str, object]:
    """The result without the statistics themselves, which the file holds."""
    return {
        "path": str(result.path),
        "images": result.table.images,
        "tensors": sorted(result.table.statistics),
        "shard": result.table.shard,
        "skipped": result.skipped,
        "problems": result.problems,
        "changed": result.changed,
    }


def _line(result: CalibrationArtifact) -> str:
    return (
        f"{result.path}: {len(result.table.images)} images, "
        f"{len(result.table.statistics)} tensors" + ("" if result.changed else " (unchanged)")
    )
