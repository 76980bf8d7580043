"""``clipdeploy build-engine``: graph to TensorRT engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from clipdeploy.cli.calibrate import images_option, seed_option
from clipdeploy.cli.common import (
    Context,
    data_option,
    emit,
    force_option,
    model_option,
    skip_unreadable_option,
    stage_command,
)
from clipdeploy.cli.quantize import quantize_config, recipe_options
from exporters.errors import UsageError


@click.command("build-engine")
@model_option
@click.option("--fp32", "precision", flag_value="fp32", help="Full precision.")
@click.option(
    "--fp16", "precision", flag_value="fp16", default=True, help="Half precision (the default)."
)
@click.option("--int8", "precision", flag_value="int8", help="INT8 Linears, the rest FP16.")
@click.option("--fp16-io", is_flag=True, help="With --fp16: image and logits in half, too.")
@data_option("Calibration images; with --int8, where none was calibrated yet.", required=False)
@images_option
@seed_option
@skip_unreadable_option
@recipe_options
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    default="auto",
    show_default=True,
    help="TensorRT flavour.",
)
@click.option("--min-batch", type=int, default=1, show_default=True, help="Smallest batch.")
@click.option("--opt-batch", type=int, default=8, show_default=True, help="Batch to tune for.")
@click.option("--max-batch", type=int, default=32, show_default=True, help="Largest batch.")
@force_option
@stage_command
def build_engine(
    context: Context,
    model: str | None,
    precision: Literal["fp32", "fp16", "int8"],
    fp16_io: bool,
    data: Path | None,
    images: int | None,
    seed: int,
    skip_unreadable: bool,
    backend: Literal["auto", "tensorrt", "tensorrt-rtx"],
    min_batch: int,
    opt_batch: int,
    max_batch: int,
    force: bool,
    **recipe: Any,
) -> None:
    """Compile an engine; calibrates and quantises first where that is due."""
    if fp16_io and precision != "fp16":
        raise UsageError("--fp16-io belongs to --fp16", hint="leave it out, or build --fp16")
    name = context.model(model)
    from clipdeploy.builder import BuildConfig
    from clipdeploy.pipeline import CalibrateConfig, build_model
    from exporters.precision import Fp16Config

    artifact = build_model(
        context.workspace,
        name,
        precision,
        BuildConfig(backend, (min_batch, opt_batch, max_batch)),
        data=data,
        calibrate=CalibrateConfig(images, seed, skip_unreadable),
        fp16=Fp16Config(half_io=fp16_io),
        quantize=quantize_config(recipe),
        force=force,
        progress=context.progress,
    )
    made = artifact.passport
    emit(
        context,
        artifact,
        lambda: (
            f"{artifact.path}: {made.plan_bytes / 1e6:.1f} MB, "
            + (f"built in {made.build_seconds:.1f} s" if artifact.changed else "unchanged")
            + f" by {made.backend} {made.backend_version} on {made.built_on}"
        ),
    )
