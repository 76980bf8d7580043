"""``clipdeploy calibrate``: collect activation statistics for INT8."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from clipdeploy.cli.common import Context, emit, stage_command
from clipdeploy.cli.params import how_to_give
from clipdeploy.cli.shared_options import (
    calibration_data_option,
    calibration_images_option,
    calibration_seed_option,
    cluster_or_none,
    force_option,
    model_option,
    ray_option,
    shard_option,
    shard_or_none,
    skip_unreadable_option,
    threads_option,
)
from clipdeploy.cli.usage import group
from clipdeploy.core.errors import UsageError

if TYPE_CHECKING:
    from clipdeploy.stages.calibrate import CalibrationArtifact


@group(
    invoke_without_command=True,
    epilog="\b\nclipdeploy calibrate --data CALIBRATION_IMAGES --images 256",
)
@model_option
@calibration_data_option(
    "Calibration images: a folder or archive; do not use the images for verification."
)
@calibration_images_option()
@calibration_seed_option
@shard_option("calibrate merge")
@ray_option
@threads_option
@skip_unreadable_option
@force_option
@stage_command
def calibrate(
    context: Context,
    model: str | None,
    calibration_data: Path | None,
    calibration_images: int | None,
    seed: int,
    shard: str | None,
    ray: str | None,
    threads: int,
    skip_unreadable: bool,
    force: bool,
) -> None:
    """Measure the inputs of all Linears on real images, for INT8/FP8.

    To continue an interrupted run, give the same command again.
    """
    if click.get_current_context().invoked_subcommand is not None:
        return
    if calibration_data is None:
        way = "clipdeploy calibrate --data CALIBRATION_IMAGES"
        raise UsageError("no images", hint=how_to_give(way, "calibration_data"))
    name = context.model(model)
    from clipdeploy.stages.calibrate import CalibrateConfig, calibrate_model

    result = calibrate_model(
        context.workspace,
        name,
        calibration_data,
        CalibrateConfig(calibration_images, seed, skip_unreadable, shard_or_none(shard), threads),
        cluster=cluster_or_none(ray),
        force=force,
        progress=context.progress,
    )
    for text in result.notes():
        context.note(text)
    emit(context, _summary(result), lambda: _line(result))


@calibrate.command()
@click.argument("shards", nargs=-1, type=click.Path(path_type=Path))
@model_option
@stage_command
def merge(context: Context, shards: tuple[Path, ...], model: str | None) -> None:
    """Join the shards of `calibrate --shard`: the given files, or all in the workspace."""
    name = context.model(model)
    from clipdeploy.stages.calibrate import merge_calibration

    result = merge_calibration(context.workspace, name, shards)
    for text in result.notes():
        context.note(text)
    emit(context, _summary(result), lambda: _line(result))


def _summary(result: CalibrationArtifact) -> dict[str, object]:
    """The result without the statistics, which are in the file."""
    return {
        "path": str(result.path),
        "images": result.table.images,
        "tensors": sorted(result.table.statistics),
        "shard": result.table.shard,
        "skipped": result.skipped,
        "problems": result.problems,
        "findings": result.table.findings,
        "changed": result.changed,
    }


def _line(result: CalibrationArtifact) -> str:
    return (
        f"{result.path}: {len(result.table.images)} images, "
        f"{len(result.table.statistics)} tensors" + ("" if result.changed else " (unchanged)")
    )
