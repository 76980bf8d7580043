"""``clipdeploy export``: checkpoint to ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from clipdeploy.cli.common import Context, emit, force_option, model_option, stage_command
from clipdeploy.cli.params import setting_option
from exporters.errors import UsageError

if TYPE_CHECKING:
    from exporters.artifact import WeightsOrigin


def _weights(origin: WeightsOrigin) -> str:
    if origin.kind == "random":
        return f"random, seed {origin.seed}"
    resized = ", position grid resized" if origin.resized_position else ""
    return f"{origin.path}, {origin.layout}, SHA-256 {origin.sha256[:8]}{resized}"


@click.command(
    epilog="\b\n"
    "clipdeploy export --model clip-vit-base-p16\n"
    "clipdeploy export --model clip-vit-base-p16 --checkpoint finetuned.safetensors",
)
@model_option
@click.option(
    "--checkpoint",
    metavar="FILE",
    help="Weights: .pth, .bin or .safetensors, or hf://OWNER/NAME.",
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
@click.option(
    "--opset", type=int, default=20, show_default=True, help="ONNX operator set, 17 to 23."
)
@click.option("--batch", type=int, help="Fix the batch size; symbolic if left out.")
@click.option(
    "--preprocess", is_flag=True, help="Take uint8 (B, S, S, 3): normalisation in the graph."
)
@setting_option("offline", "--offline/--no-offline", help="Download nothing.")
@force_option
@stage_command
def export(
    context: Context,
    model: str | None,
    checkpoint: str | None,
    random_init: int | None,
    resize_pos_embed: bool,
    numerics: Literal["trained", "as-shipped"],
    resize: Literal["published", "timm"],
    opset: int,
    batch: int | None,
    preprocess: bool,
    offline: bool,
    force: bool,
) -> None:
    """Write a checked FP32 ONNX graph with a symbolic batch."""
    if checkpoint is not None and random_init is not None:
        raise UsageError("--checkpoint and --random-init exclude each other", hint="pass one")
    name = context.model(model)
    from clipdeploy.model import WeightsChoice
    from clipdeploy.stages.export import export_model
    from exporters.artifact import Recipe
    from exporters.onnx import ExportConfig

    artifact = export_model(
        context.workspace,
        name,
        WeightsChoice(checkpoint, random_init, resize_pos_embed, offline, not context.quiet),
        Recipe(numerics, resize),
        ExportConfig(opset, batch, preprocess),
        force=force,
        progress=context.progress,
    )
    emit(
        context,
        artifact,
        lambda: (
            f"{artifact.path}: {artifact.nodes} nodes, {artifact.bytes / 1e6:.1f} MB"
            + ("" if artifact.changed else " (unchanged)")
            + f"\n  weights: {_weights(artifact.passport.weights)}"
        ),
    )
