"""``clipdeploy search``: choose 8 bits or FP16 for each product within an accuracy limit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from clipdeploy.cli.common import EXIT_VERIFICATION, Context, emit, stage_command
from clipdeploy.cli.config_fields import choices_of
from clipdeploy.cli.labelling import check_labelling, labelling, labelling_options
from clipdeploy.cli.numbers import number
from clipdeploy.cli.options import option
from clipdeploy.cli.params import setting_option
from clipdeploy.cli.quantize import check_scheme_options, scheme_config, scheme_options
from clipdeploy.cli.shared_options import (
    batch_option,
    cpu_option,
    model_option,
    picture_option,
    run_threads_option,
    seed_option,
    val_data_option,
)
from clipdeploy.cli.usage import command, refuse_together, refuse_unused
from clipdeploy.core.spans import BUDGET, IMAGES, SEARCHED_DROP

if TYPE_CHECKING:
    from clipdeploy.engines.backends import BackendOption

_CONFIG = "clipdeploy.tuning.search.SearchConfig"


@command(epilog="\b\nclipdeploy search --data LABELLED_IMAGES --max-drop 0.5 --budget 60")
@model_option
@val_data_option("Labelled images: the search uses one part, the others confirm its result.")
@option(
    "--confirm-data",
    type=click.Path(path_type=Path),
    formerly={"--confirm": "--confirm-data"},
    help="Other labelled images to confirm the result on.",
    default_text="a part of --data",
)
@setting_option(
    "max_drop",
    "--max-drop",
    type=number(SEARCHED_DROP),
    metavar="POINTS",
    help="Percentage points of top-1 that may be lost.",
)
@option(
    "--budget",
    type=number(BUDGET),
    metavar="MINUTES",
    help="Stop after so many minutes; the same command continues the search.",
    default_text="no limit",
)
@option(
    "--search-images",
    type=number(IMAGES),
    metavar="COUNT",
    help="Number of images of --data to search on.",
    default_text="half of them",
)
@seed_option(_CONFIG, "Seed for splitting the images.")
@option(
    "--cost",
    type=click.Choice(choices_of(_CONFIG, "cost")),
    help="roofline estimates the time on a GPU, gpu measures it on this machine's GPU, macs counts "
    "MACs, cpu times the Linears on this CPU.",
    default_text="roofline; cpu with --cpu",
)
@option(
    "--gpu",
    default="",
    metavar="NAME",
    help="GPU to estimate the time for; `benchmark --estimate list` lists them.",
    default_text="this machine's, or L4",
)
@batch_option(_CONFIG, "Images per inference run, for which the time is estimated as well.")
@run_threads_option
@option(
    "--fixed-plan",
    "fixed_scheme",
    is_flag=True,
    help="Do not try other values of --range and --strength.",
)
@option(
    "--no-quantize-outputs",
    is_flag=True,
    help="Do not round the sums of qkv and fc1, even where that saves time and keeps the accuracy.",
)
@option("--int8", is_flag=True, help="Search INT8 only, instead of each format that the GPU has.")
@option("--fp8", is_flag=True, help="Search FP8 only, instead of each format that the GPU has.")
@cpu_option
@picture_option
@labelling_options()
@scheme_options
@stage_command
def search(
    context: Context,
    model: str | None,
    val_data: Path,
    confirm_data: Path | None,
    max_drop: float,
    budget: float | None,
    search_images: int | None,
    seed: int,
    cost: Literal["roofline", "gpu", "macs", "cpu"] | None,
    gpu: str,
    batch: int,
    threads: int,
    fixed_scheme: bool,
    no_quantize_outputs: bool,
    int8: bool,
    fp8: bool,
    cpu: bool,
    plot: Path | None,
    **options: Any,
) -> int:
    """Choose INT8, FP8 or FP16 for each Linear and write the graph.

    Finds the fastest combination that is proven to lose at most --max-drop of top-1, and confirms
    it on images that the search did not use. The exit code is 3 if they do not confirm it. With
    --cost roofline or gpu, it also chooses for the attention of each block and for the sums of qkv
    and fc1.
    """
    from clipdeploy.core.plots import check_plot_path, save_plot

    if plot:
        check_plot_path(plot)
    refuse_together("fp8", "cpu", hint="FP8 is for TensorRT engines: leave one of the two out")
    refuse_together("int8", "fp8", hint="leave both out to search both")
    check_scheme_options(options, fp8=fp8)
    check_labelling(options)
    if confirm_data is not None:
        # Then nothing is split.
        refuse_unused(["search_images", "seed"], "a split of --data", "leave out --confirm-data")
    chosen = cost or ("cpu" if cpu else "roofline")
    if chosen != "roofline":
        refuse_unused(["gpu"], "--cost roofline", "choose --cost roofline")
    if chosen in ("macs", "cpu"):
        refuse_unused(
            ["no_quantize_outputs"], "--cost roofline and gpu", "choose one of these costs"
        )
    if cpu:
        refuse_unused(["no_quantize_outputs"], "graphs for TensorRT", "leave out --cpu")
    name = context.model(model)
    from clipdeploy.stages.search import search_model
    from clipdeploy.tuning.search import SearchConfig

    config = SearchConfig(
        max_drop=max_drop,
        budget=budget,
        seed=seed,
        search_images=search_images,
        cost=chosen,
        gpu=gpu,
        batch=batch,
        threads=threads,
        scheme=scheme_config(options),
        fixed_scheme=fixed_scheme,
        remainder="fp32" if cpu else "fp16",
        format="fp8" if fp8 else "int8" if int8 else None,
        labelling=labelling(options),
        outputs=not no_quantize_outputs,
    )
    result = search_model(
        context.workspace,
        name,
        val_data,
        config,
        confirm=confirm_data,
        backend=cast("BackendOption", context.setting("backend") or "auto"),
        note=context.note,
        progress=context.progress,
    )
    emit(context, result, lambda: result)
    if plot:
        from clipdeploy.tuning.drawing import draw_front

        save_plot(draw_front(result), plot)
        context.note(f"picture: {plot}")
    return 0 if result else EXIT_VERIFICATION
