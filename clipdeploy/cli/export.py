"""``clipdeploy export``: write the FP32 graph of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipdeploy.cli.common import Context, emit, stage_command
from clipdeploy.cli.config_fields import choices_of, default_of
from clipdeploy.cli.labelling import class_names_option
from clipdeploy.cli.numbers import number
from clipdeploy.cli.options import option
from clipdeploy.cli.params import setting_option
from clipdeploy.cli.shared_options import force_option, model_option
from clipdeploy.cli.usage import command, refuse_together, refuse_unused, with_options
from clipdeploy.core.spans import (
    BATCH,
    CROP_PCT,
    EPS,
    HEADS,
    IMAGE_SIZE,
    MEAN,
    OPSET,
    SEED,
    STD,
)

if TYPE_CHECKING:
    from clipdeploy.core.passport import Passport, Recipe
    from clipdeploy.models.load import WeightsChoice
    from exporters.headers import GraphArtifact

__all__ = ["export", "model_or_none", "weights_choice", "weights_options"]


def _classes(passport: Passport) -> str:
    names = passport.class_names
    if passport.embeds:
        return f"none: embeddings of {passport.classes} numbers"
    if not names:
        return f"{passport.classes}, without names"
    source = {
        "file": "from --class-names",
        "checkpoint": "from the checkpoint",
        "assumed": "assumed to be the model's",
    }.get(passport.class_names_from, "the model's")
    if passport.weights.zero_shot is not None:
        source = "from --zero-shot"
    return f"{passport.classes}, names {source}: {names[0]} to {names[-1]}"


def _shown(artifact: GraphArtifact) -> str:
    from clipdeploy.workspace.proof import reference_proof

    made = artifact.passport
    return (
        f"{artifact.path}: {artifact.nodes} nodes, {artifact.bytes / 1e6:.1f} MB"
        + ("" if artifact.changed else " (unchanged)")
        + f"\n  weights: {made.weights.description}"
        + f"\n  reference: {reference_proof(artifact.path, made).sentence}"
        + f"\n  classes: {_classes(made)}"
    )


# Parameters that replace fields of a recipe.
_PREPROCESSING = ("mean", "std", "crop_pct", "interpolation")
_RECIPE = "clipdeploy.core.passport.Recipe"
_CHOICES = "clipdeploy.core.passport.ModelChoices"
# Parameters that say how a checkpoint is read.
_READING = (
    *("resize_pos_embed", "image_size", "resampling", "averaged", "gelu", "pooling", "heads"),
    "eps",
)
_WEIGHTS_OPTIONS = (
    option(
        "--checkpoint",
        metavar="FILE",
        help="Weights: a .pth, .bin or .safetensors file, a folder or index with shards, or "
        "hf://OWNER/NAME[/FILE.index.json]. Without --model, its geometry selects the model.",
        default_text="the workspace's, else the published ones",
    ),
    option(
        "--random-init",
        type=number(SEED),
        metavar="SEED",
        help="Initialise the weights at random with this seed, to test speed or integration.",
    ),
    option(
        "--replace-weights",
        is_flag=True,
        help="Replace the workspace's weights by these, or by the published ones.",
    ),
    option(
        "--resize-pos-embed",
        is_flag=True,
        help="Interpolate the position embedding of a checkpoint for another image size.",
    ),
    option(
        "--image-size",
        type=number(IMAGE_SIZE),
        metavar="PIXELS",
        help="Edge of the image; the checkpoint's position grid is resampled to it.",
        default_text="that of the position grid",
    ),
    option(
        "--resampling",
        type=click.Choice(choices_of(_CHOICES, "resampling")),
        help="Resample a position grid as timm (antialiased) or as mmpretrain.",
        default_text="as the checkpoint's library",
    ),
    option(
        "--ema/--no-ema",
        "averaged",
        default=None,
        help="Use the averaged (EMA) weights of a checkpoint that has both kinds, or the others.",
        default_text="averaged",
    ),
    option(
        "--gelu",
        type=click.Choice(choices_of(_CHOICES, "gelu")),
        help="Exact GELU (erf), or the QuickGELU of OpenAI's CLIP.",
        default_text="that of the checkpoint's configuration or layout",
    ),
    option(
        "--pooling",
        type=click.Choice(choices_of(_CHOICES, "pooling")),
        help="What the head reads: the class token, or the average of the patch tokens.",
        default_text="that of the checkpoint's configuration or layout",
    ),
    option(
        "--heads",
        type=number(HEADS),
        metavar="COUNT",
        help="Attention heads of the checkpoint's model.",
        default_text="of its configuration or the model, else of 64 channels each",
    ),
    option(
        "--layernorm-eps",
        "eps",
        type=number(EPS),
        metavar="EPS",
        help="Epsilon of the LayerNorms.",
        default_text="that of the checkpoint's library",
    ),
    option(
        "--probe",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Inputs and their logits in your framework (.npz), with which the model must agree.",
        default_text="the model is not compared with another framework",
    ),
    option(
        "--zero-shot",
        metavar="CLASSES",
        help="Make a zero-shot classifier of CLIP, which is --checkpoint or --model OWNER/NAME: a "
        "file with one class a line, or imagenet.",
        default_text="the checkpoint is a classifier",
    ),
    option(
        "--templates",
        metavar="NAME|FILE",
        help="Prompts of --zero-shot: openai80, simple, or a file with one prompt a line, with {} "
        "for the class.",
        default_text=default_of("clipdeploy.models.load.ZeroShot", "templates"),
    ),
    option(
        "--embeddings",
        is_flag=False,
        flag_value="normalised",
        type=click.Choice(["normalised", "raw"]),
        metavar="[normalised|raw]",
        help="Make an embedding model of CLIP, which is --checkpoint or --model OWNER/NAME: images "
        "to vectors of length 1 (normalised), or as CLIP's projection gives them (raw).",
        default_text="the checkpoint is a classifier",
    ),
    option(
        "--numerics",
        type=click.Choice(choices_of(_RECIPE, "numerics")),
        default=default_of(_RECIPE, "numerics"),
        help="Run the model as the weights were trained, or as mmpretrain's configs run them now.",
    ),
    option(
        "--resize",
        type=click.Choice(choices_of(_RECIPE, "resize")),
        default=default_of(_RECIPE, "resize"),
        help="Resize and crop images as for the published top-1, or as timm does.",
    ),
    option(
        "--mean",
        nargs=3,
        type=number(MEAN),
        metavar="R G B",
        help="Mean of each channel, for samples scaled to 0..1.",
        default_text="that of the checkpoint's configuration, else of --numerics",
    ),
    option(
        "--std",
        nargs=3,
        type=number(STD),
        metavar="R G B",
        help="Standard deviation of each channel, for samples scaled to 0..1.",
        default_text="that of the checkpoint's configuration, else of --numerics",
    ),
    option(
        "--crop-pct",
        type=number(CROP_PCT),
        metavar="PART",
        help="Edge of the crop as a part of the resized edge.",
        default_text="that of the checkpoint's configuration, else of --resize",
    ),
    option(
        "--interpolation",
        type=click.Choice(choices_of(_RECIPE, "interpolation")),
        help="How images are resized.",
        default_text="that of the checkpoint's configuration, else bicubic",
    ),
    class_names_option,
    setting_option("offline", "--offline/--no-offline", help="Download nothing."),
)


def weights_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose the weights; :func:`weights_choice` reads them."""
    return with_options(_WEIGHTS_OPTIONS, function)


def weights_choice(context: Context, options: dict[str, Any]) -> tuple[WeightsChoice, Recipe]:
    """The values of :func:`weights_options`: the weights, and the recipe to run them with.

    Raises:
        UsageError: two kinds of weights, or a checkpoint option without a checkpoint.
    """
    refuse_together("checkpoint", "random_init")
    if all(options[name] is None for name in ("checkpoint", "zero_shot", "embeddings")):
        refuse_unused(_READING, "--checkpoint", "pass --checkpoint FILE")
    elif options["image_size"] is None and not options["resize_pos_embed"]:
        refuse_unused(["resampling"], "--image-size", "pass --image-size PIXELS")
    if options["zero_shot"] is None:
        refuse_unused(["templates"], "--zero-shot", "pass --zero-shot CLASSES")
    refuse_together("zero_shot", "class_names")
    refuse_together("zero_shot", "embeddings")
    refuse_together("embeddings", "class_names")
    # CLIP's embedding is that of the class token.
    refuse_together("zero_shot", "pooling")
    refuse_together("embeddings", "pooling")
    from clipdeploy.core.passport import ModelChoices, Recipe
    from clipdeploy.models.load import WeightsChoice, ZeroShot

    checkpoint, seed = options["checkpoint"], options["random_init"]
    resize, offline = options["resize_pos_embed"], options["offline"]
    classes, templates = options["zero_shot"], options["templates"]
    choice = WeightsChoice(
        checkpoint,
        seed,
        resize,
        offline,
        not context.quiet,
        replace=options["replace_weights"],
        class_names=options["class_names"],
        choices=ModelChoices(
            *(options[name] for name in ("averaged", "gelu", "pooling", "eps", "resampling"))
        ),
        heads=options["heads"],
        image_size=options["image_size"],
        probe=options["probe"],
        zero_shot=None if classes is None else ZeroShot(classes, *filter(None, [templates])),
        embedding=options["embeddings"],
    )
    preprocessing = {name: options[name] for name in _PREPROCESSING}
    return choice, Recipe(options["numerics"], options["resize"], **preprocessing)


def model_or_none(context: Context, name: str | None, weights: WeightsChoice) -> str | None:
    """The full name of the model; None if it is to be inferred from the checkpoint.

    With class texts or for embeddings, it may be a repository of CLIP's.
    """
    of_clip = weights.zero_shot is not None or weights.embedding is not None
    if name is not None and "/" in name and of_clip and weights.checkpoint is None:
        return name
    if name is None and weights.checkpoint is not None:
        from_settings = context.setting("model")
        return None if from_settings is None else context.model(str(from_settings))
    return context.model(name)


@command(
    epilog="\b\n"
    "clipdeploy export --model clip-vit-base-p16\n"
    "clipdeploy export --checkpoint finetuned.safetensors\n"
    "clipdeploy export --checkpoint model_best.pth.tar --no-ema --image-size 256\n"
    "clipdeploy export --model openai/clip-vit-base-patch16 --zero-shot imagenet\n"
    "clipdeploy export --model openai/clip-vit-base-patch16 --embeddings --text-tower",
)
@model_option
@weights_options
@option(
    "--opset",
    type=number(OPSET),
    default=default_of("exporters.onnx.ExportConfig", "opset"),
    metavar="N",
    help="Version of the ONNX operator set.",
)
@option(
    "--fixed-batch",
    type=number(BATCH),
    metavar="N",
    formerly={"--batch": "--fixed-batch"},
    help="Batch size of the graph.",
    default_text="symbolic: any batch",
)
@option(
    "--text-tower",
    is_flag=True,
    help="With --embeddings: write the text tower as well, token ids (B, 77) to embeddings.",
)
@option(
    "--preprocess",
    is_flag=True,
    help="Take uint8 images (B, S, S, 3) and normalise them in the graph.",
)
@force_option
@stage_command
def export(
    context: Context,
    model: str | None,
    opset: int,
    fixed_batch: int | None,
    text_tower: bool,
    preprocess: bool,
    force: bool,
    **options: Any,
) -> None:
    """Write the FP32 ONNX graph of a checkpoint and check it.

    With --checkpoint alone, the model is inferred from the checkpoint's tensors.

    The graph takes batches of any size, unless --fixed-batch gives one.
    """
    refuse_together("zero_shot", "text_tower")
    weights, recipe = weights_choice(context, options)
    name = model_or_none(context, model, weights)
    from clipdeploy.stages.export import export_model
    from clipdeploy.stages.text_tower import ExportedTowers, export_towers
    from exporters.onnx import ExportConfig

    stage: Callable[..., GraphArtifact | ExportedTowers]
    stage = export_towers if text_tower else export_model
    made = stage(
        context.workspace,
        name,
        weights,
        recipe,
        ExportConfig(opset, fixed_batch, preprocess),
        force=force,
        note=context.note,
        progress=context.progress,
    )
    graphs = (made.image, made.text) if isinstance(made, ExportedTowers) else (made,)
    emit(context, made, lambda: "\n".join(map(_shown, graphs)))
