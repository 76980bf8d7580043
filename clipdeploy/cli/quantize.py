"""``clipdeploy quantize``: INT8 into the graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from clipdeploy.cli.common import Context, emit, force_option, model_option, stage_command
from clipdeploy.cli.numbers import number
from clipdeploy.cli.usage import (
    command,
    given,
    option_names,
    refuse_together,
    refuse_unused,
    with_options,
)
from clipdeploy.core.spans import SQNR_DB, STRENGTH

if TYPE_CHECKING:
    from calibration.policy import Placement
    from calibration.qdq import QuantizeConfig
    from calibration.quality import Quality
    from calibration.scheme import SchemeConfig
    from clipdeploy.engines.backends import BackendOption

__all__ = [
    "check_recipe_options",
    "check_scheme_options",
    "note_quality",
    "quantize",
    "quantize_config",
    "quantize_options",
    "recipe_names",
    "recipe_options",
    "scheme_config",
    "scheme_options",
]

_SCHEME_OPTIONS = (
    click.option(
        "--range",
        "range_method",
        type=click.Choice(["auto", "minmax", "percentile", "mse", "entropy"]),
        default="auto",
        show_default=True,
        help="How activation ranges are found; auto looks at the error of the Linear's output.",
    ),
    click.option("--no-smooth", is_flag=True, help="Leave activation outliers where they are."),
    click.option(
        "--strength",
        type=number(STRENGTH),
        metavar="0..1",
        help="How much of the outliers moves into the weights, the same for all Linears.  "
        "[default: each Linear's own, by its expected error]",
    ),
    click.option(
        "--no-shift",
        is_flag=True,
        help="No Sub after GELU, which --range auto adds.",
    ),
    click.option("--no-bias-correction", is_flag=True, help="Leave biases as they are."),
    click.option("--no-weight-clip", is_flag=True, help="Weight scales from the largest weight."),
)
_OPTIONS = (
    click.option(
        "--recipe",
        type=click.Path(path_type=Path, dir_okay=False),
        help="A file that `search` wrote, instead of the options that follow.",
    ),
    click.option(
        "--exclude", multiple=True, metavar="PATTERN", help="Leave Linears alone: 'blocks.0.*'."
    ),
    *_SCHEME_OPTIONS,
    click.option(
        "--weight-scales",
        type=click.Choice(["channel", "ratio"]),
        help="Form of the weight scales: channel for TensorRT, ratio for TensorRT-RTX (default: "
        "the form for the backend).",
    ),
    click.option("--quantize-attention", is_flag=True, help="Attention's two products as well."),
    click.option("--quantize-head", is_flag=True, help="The classifier as well."),
    click.option("--quantize-patch", is_flag=True, help="The patch convolution as well."),
    click.option(
        "--min-sqnr",
        type=number(SQNR_DB),
        metavar="DB",
        help="Lowest signal over noise in dB: a Linear whose output would have less is left out, a "
        "graph whose logits have less on the calibration images is refused.  [default: 10]",
    ),
)


def scheme_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that decide how a Linear is quantised; :func:`scheme_config` reads them."""
    return with_options(_SCHEME_OPTIONS, function)


def check_scheme_options(options: dict[str, Any]) -> None:
    """Refuse options of :func:`scheme_options` that the others leave without effect.

    Raises:
        UsageError: the first of them.
    """
    refuse_together("no_smooth", "strength")
    if options["range_method"] != "auto":
        refuse_unused(["no_shift"], "--range auto", "pass --range auto")


def scheme_config(options: dict[str, Any]) -> SchemeConfig:
    """The values of :func:`scheme_options` as a configuration."""
    from calibration.scheme import SchemeConfig

    return SchemeConfig(
        range_method=options["range_method"],
        smooth=not options["no_smooth"],
        shift_gelu=not options["no_shift"],
        clip_weights=not options["no_weight_clip"],
        correct_bias=not options["no_bias_correction"],
        strength=options["strength"],
    )


def recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that decide how INT8 is made; :func:`quantize_config` reads them."""
    return with_options(_OPTIONS, function)


def recipe_names() -> list[str]:
    """The parameters of :func:`recipe_options`."""
    return option_names(_OPTIONS)


def check_recipe_options(options: dict[str, Any]) -> None:
    """Refuse options of :func:`recipe_options` that the others leave without effect.

    Raises:
        UsageError: a recipe file beside options that it holds, or the first without effect.
    """
    if given("recipe"):
        refuse_together(
            *recipe_names(),
            hint="no --recipe beside options that say how to quantise: it holds them all",
        )
    check_scheme_options(options)


def quantize_options(options: dict[str, Any]) -> QuantizeConfig:
    """The values of :func:`recipe_options` but for the recipe file, as a configuration.

    Raises:
        UsageError: a value that cannot be.
    """
    from calibration.policy import Scope
    from calibration.qdq import QuantizeConfig

    scheme = scheme_config(options)
    scope = Scope(
        attention=options["quantize_attention"],
        head=options["quantize_head"],
        patch=options["quantize_patch"],
    )
    config = QuantizeConfig(
        options["exclude"], "fp16", scheme, scope, weight_scales=options["weight_scales"]
    )
    return _with_minimum(config, options)


def _with_minimum(config: QuantizeConfig, options: dict[str, Any]) -> QuantizeConfig:
    minimum = options["min_sqnr"]
    return config if minimum is None else replace(config, min_sqnr=minimum)


def quantize_config(
    context: Context,
    model: str,
    options: dict[str, Any],
    remainder: Literal["fp16", "fp32"] | None = None,
) -> QuantizeConfig:
    """The values of :func:`recipe_options` as a configuration; a recipe file's if there is one.

    ``remainder`` outranks a recipe's.

    Raises:
        UsageError: a value that cannot be.
        ArtifactError, FileError: it cannot be read, or was found for other weights.
    """
    config = quantize_options(options)
    if options["recipe"] is not None:
        config = _with_minimum(_from_recipe(context, model, options["recipe"]), options)
    return config if remainder is None else replace(config, remainder=remainder)


def _from_recipe(context: Context, model: str, path: Path) -> QuantizeConfig:
    from calibration.recipe import load_recipe

    recipe = load_recipe(path)
    recipe.check(context.workspace.source(model)[1].weights.identity)
    return recipe.config


@command(epilog="\b\nclipdeploy quantize\nclipdeploy quantize --cpu --exclude 'blocks.0.*'")
@model_option
@recipe_options
@click.option(
    "--cpu", is_flag=True, help="For ONNX Runtime's int8 kernels on a CPU: the rest stays FP32."
)
@force_option
@stage_command
def quantize(context: Context, model: str | None, cpu: bool, force: bool, **recipe: Any) -> None:
    """Write the INT8 (Q/DQ) graph from the FP32 graph and its calibration."""
    check_recipe_options(recipe)
    name = context.model(model)
    from clipdeploy.stages.quantize import quantize_model

    config = quantize_config(context, name, recipe, "fp32" if cpu else None)
    result = quantize_model(
        context.workspace,
        name,
        config,
        backend=cast("BackendOption", context.setting("backend") or "auto"),
        force=force,
        progress=context.progress,
    )
    line = (
        f"{result.artifact.path}: {len(result.placement.quantized)} Linears and products in INT8, "
        f"{result.artifact.bytes / 1e6:.1f} MB"
        + ("" if result.artifact.changed else " (unchanged)")
    )
    quality = result.quality
    note_quality(context, quality)
    lines = [line, *_left_out(result.placement), *(() if quality is None else [_sqnr(quality)])]
    emit(context, result, lambda: "\n".join(lines))


def note_quality(context: Context, quality: Quality | None) -> None:
    """Show the warnings of an INT8 graph."""
    for warning in () if quality is None else quality.warnings:
        context.note(warning)


def _sqnr(quality: Quality) -> str:
    """What INT8 costs, in a line."""
    images = f"{quality.images} calibration images" if quality.images else "the sample images"
    figure = "equal to FP32" if quality.sqnr_db is None else f"SQNR {quality.sqnr_db:.1f} dB"
    return f"  logits: {figure} on {images}"


def _left_out(placement: Placement) -> list[str]:
    """What is not INT8: a line for each kind and reason."""
    kinds: dict[tuple[str, str], int] = {}
    for entry in placement.entries:
        if not entry.int8:
            kind = (re.sub(r"^blocks\.\d+", "blocks.*", entry.name), entry.reason)
            kinds[kind] = kinds.get(kind, 0) + 1
    return [
        f"  not INT8: {name}{f' ({count})' if count > 1 else ''}, {reason}"
        for (name, reason), count in kinds.items()
    ]
