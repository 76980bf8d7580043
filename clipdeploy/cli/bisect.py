"""``clipdeploy bisect``: find the part of a graph that costs the accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clipdeploy.cli.common import Context, emit, stage_command
from clipdeploy.cli.config_fields import value_of
from clipdeploy.cli.labelling import check_labelling, labelling, labelling_options
from clipdeploy.cli.params import ArtifactPath
from clipdeploy.cli.shared_options import (
    batch_option,
    model_option,
    picture_option,
    run_threads_option,
    seed_option,
    val_data_option,
    val_images_option,
)
from clipdeploy.cli.usage import command

_STAGE = "clipdeploy.stages.bisect"
_CONFIG = f"{_STAGE}.BisectConfig"


@command(epilog="\b\nclipdeploy bisect --data IMAGES -o map.png")
@click.argument("graph", required=False, type=ArtifactPath(dir_okay=False))
@model_option
@val_data_option("Images; with labels, drops are measured in points of top-1.")
@val_images_option("Number of images.", f"all, at most {value_of(f'{_STAGE}._DEFAULT_IMAGES')}")
@seed_option(_CONFIG, "Seed for choosing images.")
@batch_option(_CONFIG)
@run_threads_option
@picture_option
@labelling_options()
@stage_command
def bisect(
    context: Context,
    graph: Path | None,
    model: str | None,
    val_data: Path,
    val_images: int | None,
    seed: int,
    batch: int,
    threads: int,
    plot: Path | None,
    **options: Any,
) -> None:
    """Find the Linear that costs the accuracy of a graph.

    Compares GRAPH, by default the model's INT8 graph, with the FP32 graph. GRAPH is an FP16 or INT8
    .onnx file with the node names of the FP32 graph.
    """
    from clipdeploy.core.plots import check_plot_path, save_plot

    check_labelling(options)
    if plot:
        check_plot_path(plot)
    name = context.model(model)
    from clipdeploy.stages.bisect import BisectConfig, bisect_model

    config = BisectConfig(val_images, seed, batch, threads, labelling(options))
    result = bisect_model(
        context.workspace,
        name,
        val_data,
        graph,
        config,
        note=context.note,
        progress=context.progress,
    )
    emit(context, result, lambda: result)
    if plot:
        from clipdeploy.tuning.drawing import draw_bisection

        save_plot(draw_bisection(result), plot)
        context.note(f"picture: {plot}")
