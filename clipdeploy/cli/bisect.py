"""``clipdeploy bisect``: which part costs the accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clipdeploy.cli.common import Context, data_option, emit, model_option, stage_command
from clipdeploy.cli.labelling import check_labelling, labelling, labelling_options
from clipdeploy.cli.numbers import number
from clipdeploy.cli.params import ArtifactPath
from clipdeploy.cli.usage import command
from clipdeploy.core.spans import BATCH, IMAGES, SEED, THREADS


@command(epilog="\b\nclipdeploy bisect --data IMAGES --plot map.png")
@click.argument("graph", required=False, type=ArtifactPath(dir_okay=False))
@model_option
@data_option("Images, with labels if drops are to be points of top-1.", "validation")
@click.option("--images", type=number(IMAGES), help="How many of them.  [default: up to 64]")
@click.option("--seed", type=number(SEED), default=0, show_default=True, help="Draws them.")
@click.option("--batch", type=number(BATCH), default=8, show_default=True, help="Images at once.")
@click.option(
    "--threads", type=number(THREADS), default=0, help="ONNX Runtime's; 0: its own choice."
)
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it: .png or .svg."
)
@labelling_options()
@stage_command
def bisect(
    context: Context,
    graph: Path | None,
    model: str | None,
    data: Path,
    images: int | None,
    seed: int,
    batch: int,
    threads: int,
    plot: Path | None,
    **options: Any,
) -> None:
    """Find the Linear of GRAPH (the model's INT8 graph) that costs the accuracy.

    GRAPH is any FP16 or INT8 .onnx with the names of the FP32 graph, which it is held against.
    """
    from clipdeploy.core.plots import check_plot_path, save_plot

    check_labelling(options)
    if plot:
        check_plot_path(plot)
    name = context.model(model)
    from clipdeploy.stages.bisect import BisectConfig, bisect_model

    config = BisectConfig(images, seed, batch, threads, labelling(options))
    result = bisect_model(
        context.workspace,
        name,
        data,
        graph,
        config,
        note=context.note,
        progress=context.progress,
    )
    emit(context, result, lambda: result)
    if plot:
        from clipdeploy.tuning.drawing import draw_bisection

        save_plot(draw_bisection(result), plot)
        context.note(f"drawn: {plot}")
