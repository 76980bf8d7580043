"""``clipdeploy search``: INT8 or FP16 for each Linear, under an accuracy budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from clipdeploy.cli.common import (
    EXIT_VERIFICATION,
    Context,
    data_option,
    emit,
    model_option,
    stage_command,
)
from clipdeploy.cli.labelling import check_labelling, labelling, labelling_options
from clipdeploy.cli.numbers import number
from clipdeploy.cli.params import setting_option
from clipdeploy.cli.quantize import check_scheme_options, scheme_config, scheme_options
from clipdeploy.cli.usage import command, refuse_unused
from clipdeploy.core.spans import BATCH, BUDGET, IMAGES, SEARCHED_DROP, SEED, THREADS


@command(epilog="\b\nclipdeploy search --data LABELLED_IMAGES --max-drop 0.5 --budget 60")
@model_option
@data_option("Labelled images; one part is searched on, the others confirm.", "validation")
@click.option(
    "--confirm", type=click.Path(path_type=Path), help="Other labelled images, to confirm on."
)
@setting_option(
    "max_drop",
    "--max-drop",
    type=number(SEARCHED_DROP),
    help="Percentage points of top-1 that may be lost.",
)
@click.option(
    "--budget", type=number(BUDGET), metavar="MINUTES", help="Stop then; a later run goes on."
)
@click.option(
    "--search-images", type=number(IMAGES), help="How many to search on.  [default: half]"
)
@click.option("--seed", type=number(SEED), default=0, show_default=True, help="Splits the images.")
@click.option(
    "--cost",
    type=click.Choice(["macs", "cpu"]),
    help="Count MACs and bytes, or time the Linears on this CPU.  [default: macs; cpu with --cpu]",
)
@click.option(
    "--batch", type=number(BATCH), default=8, show_default=True, help="Images at once, for costs."
)
@click.option(
    "--threads", type=number(THREADS), default=0, help="ONNX Runtime's; 0: its own choice."
)
@click.option(
    "--fixed-plan", "fixed_scheme", is_flag=True, help="Try no other --range and --strength."
)
@click.option(
    "--cpu", is_flag=True, help="For ONNX Runtime's int8 kernels on a CPU: the rest stays FP32."
)
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it: .png or .svg."
)
@labelling_options()
@scheme_options
@stage_command
def search(
    context: Context,
    model: str | None,
    data: Path,
    confirm: Path | None,
    max_drop: float,
    budget: float | None,
    search_images: int | None,
    seed: int,
    cost: Literal["macs", "cpu"] | None,
    batch: int,
    threads: int,
    fixed_scheme: bool,
    cpu: bool,
    plot: Path | None,
    **options: Any,
) -> int:
    """Choose INT8 or FP16 for every Linear and write that INT8 graph.

    The least cost whose loss of top-1 is proven to lie within --max-drop.  The choice is confirmed
    on images that the search never saw: exit 3 unless they do.
    """
    from clipdeploy.core.plots import check_plot_path, save_plot

    if plot:
        check_plot_path(plot)
    check_scheme_options(options)
    check_labelling(options)
    if confirm is not None:
        # The splits are then the two sets of images themselves.
        refuse_unused(["search_images", "seed"], "a split of --data", "leave out --confirm")
    name = context.model(model)
    from clipdeploy.stages.search import search_model
    from clipdeploy.tuning.search import SearchConfig

    config = SearchConfig(
        max_drop=max_drop,
        budget=budget,
        seed=seed,
        search_images=search_images,
        cost=cost or ("cpu" if cpu else "macs"),
        batch=batch,
        threads=threads,
        scheme=scheme_config(options),
        fixed_scheme=fixed_scheme,
        remainder="fp32" if cpu else "fp16",
        labelling=labelling(options),
    )
    result = search_model(
        context.workspace,
        name,
        data,
        config,
        confirm=confirm,
        note=context.note,
        progress=context.progress,
    )
    emit(context, result, lambda: result)
    if plot:
        from clipdeploy.tuning.drawing import draw_front

        save_plot(draw_front(result), plot)
        context.note(f"drawn: {plot}")
    return 0 if result else EXIT_VERIFICATION
