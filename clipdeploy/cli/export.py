"""``clipdeploy export``: checkpoint to ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from clipdeploy.cli.common import Context, emit, force_option, model_option, stage_command
from exporters.errors import UsageError


@click.command()
@model_option
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Weights: .pth, .bin or .safetensors."
)
@click.option(
    "--random-init",
    type=int,
    metavar="SEED",
    help="Random weights instead, for speed and plumbing.",
)
@click.option("--resize-pos-embed", is_flag=True, help="Resample a position grid of another size.")
@click.option(
    "--numerics",
    type=click.Choice(["trained", "as-shipped"]),
    default="trained",
    show_default=True,
    help="As the weights were trained, or as mmpretrain's present configs run them.",
)
@click.option(
    "--resize",
    type=click.Choice(["published", "timm"]),
    default="published",
    show_default=True,
    help="The crop behind the published top-1, or timm's own.",
)
@click.option("--opset", type=int, default=20, show_default=True, help="ONNX operator set.")
@force_option
@stage_command
def export(
    context: Context,
    model: str | None,
    checkpoint: Path | None,
    random_init: int | None,
    resize_pos_embed: bool,
    numerics: Literal["trained", "as-shipped"],
    resize: Literal["published", "timm"],
    opset: int,
    force: bool,
) -> None:
    """Write a checked FP32 ONNX graph with a symbolic batch."""
    if checkpoint is not None and random_init is not None:
        raise UsageError("--checkpoint and --random-init exclude each other", hint="pass one")
    name = context.model(model)
    from clipdeploy.model import WeightsChoice
    from clipdeploy.pipeline import export_model
    from exporters.artifact import Recipe
    from exporters.onnx import ExportConfig

    artifact = export_model(
        context.workspace,
        name,
        WeightsChoice(checkpoint, random_init, resize_pos_embed),
        Recipe(numerics, resize),
        ExportConfig(opset),
        force=force,
        progress=context.progress,
    )
    emit(
        context,
        artifact,
        lambda: (
            f"{artifact.path}: {artifact.nodes} nodes, {artifact.bytes / 1e6:.1f} MB"
            + ("" if artifact.changed else " (unchanged)")
        ),
    )
