"""``clipdeploy export``: checkpoint to ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from clipdeploy.cli.common import Context, emit, force_option, model_option, stage_command
from clipdeploy.cli.labelling import class_names_option
from clipdeploy.cli.numbers import number
from clipdeploy.cli.params import setting_option
from clipdeploy.cli.usage import command, refuse_together, refuse_unused, with_options
from clipdeploy.core.spans import BATCH, OPSET, SEED

if TYPE_CHECKING:
    from clipdeploy.core.passport import Passport, Recipe
    from clipdeploy.models.load import WeightsChoice

__all__ = ["export", "weights_choice", "weights_options"]


def _classes(passport: Passport) -> str:
    names = passport.class_names
    if not names:
        return f"{passport.classes}, without names"
    who = {
        "file": "from --class-names",
        "checkpoint": "from the checkpoint",
        "assumed": "assumed to be the model's",
    }.get(passport.class_names_from, "the model's")
    return f"{passport.classes}, names {who}: {names[0]} to {names[-1]}"


_WEIGHTS_OPTIONS = (
    click.option(
        "--checkpoint",
        metavar="FILE",
        help="Weights: .pth, .bin or .safetensors, or hf://OWNER/NAME.  "
        "[default: the workspace's, else the published ones]",
    ),
    click.option(
        "--random-init",
        type=number(SEED),
        metavar="SEED",
        help="Random weights instead, for speed and plumbing.",
    ),
    click.option(
        "--replace-weights",
        is_flag=True,
        help="Take these, or the published ones, in the place of the workspace's own.",
    ),
    click.option(
        "--resize-pos-embed", is_flag=True, help="Resample a position grid of another size."
    ),
    click.option(
        "--numerics",
        type=click.Choice(["trained", "as-shipped"]),
        default="trained",
        show_default=True,
        help="As the weights were trained, or as mmpretrain's present configs run them.",
    ),
    click.option(
        "--resize",
        type=click.Choice(["published", "timm"]),
        default="published",
        show_default=True,
        help="The crop behind the published top-1, or timm's own.",
    ),
    class_names_option,
    setting_option("offline", "--offline/--no-offline", help="Download nothing."),
)


def weights_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that decide what the model is; :func:`weights_choice` reads them."""
    return with_options(_WEIGHTS_OPTIONS, function)


def weights_choice(context: Context, options: dict[str, Any]) -> tuple[WeightsChoice, Recipe]:
    """The values of :func:`weights_options` as a choice of weights and what is made of them.

    Raises:
        UsageError: weights of two kinds, or an option of a checkpoint without one.
    """
    refuse_together("checkpoint", "random_init")
    if options["checkpoint"] is None:
        refuse_unused(["resize_pos_embed"], "--checkpoint", "pass --checkpoint FILE")
    from clipdeploy.core.passport import Recipe
    from clipdeploy.models.load import WeightsChoice

    checkpoint, seed = options["checkpoint"], options["random_init"]
    resize, offline = options["resize_pos_embed"], options["offline"]
    choice = WeightsChoice(
        checkpoint,
        seed,
        resize,
        offline,
        not context.quiet,
        replace=options["replace_weights"],
        class_names=options["class_names"],
    )
    return choice, Recipe(options["numerics"], options["resize"])


@command(
    epilog="\b\n"
    "clipdeploy export --model clip-vit-base-p16\n"
    "clipdeploy export --model clip-vit-base-p16 --checkpoint finetuned.safetensors",
)
@model_option
@weights_options
@click.option(
    "--opset",
    type=number(OPSET),
    default=20,
    show_default=True,
    help="ONNX operator set, 17 to 23.",
)
@click.option("--batch", type=number(BATCH), help="Fix the batch size; symbolic if left out.")
@click.option(
    "--preprocess", is_flag=True, help="Take uint8 (B, S, S, 3): normalisation in the graph."
)
@force_option
@stage_command
def export(
    context: Context,
    model: str | None,
    opset: int,
    batch: int | None,
    preprocess: bool,
    force: bool,
    **options: Any,
) -> None:
    """Write a checked FP32 ONNX graph with a symbolic batch."""
    weights, recipe = weights_choice(context, options)
    name = context.model(model)
    from clipdeploy.stages.export import export_model
    from exporters.onnx import ExportConfig

    artifact = export_model(
        context.workspace,
        name,
        weights,
        recipe,
        ExportConfig(opset, batch, preprocess),
        force=force,
        note=context.note,
        progress=context.progress,
    )
    emit(
        context,
        artifact,
        lambda: (
            f"{artifact.path}: {artifact.nodes} nodes, {artifact.bytes / 1e6:.1f} MB"
            + ("" if artifact.changed else " (unchanged)")
            + f"\n  weights: {artifact.passport.weights.description}"
            + f"\n  classes: {_classes(artifact.passport)}"
        ),
    )
