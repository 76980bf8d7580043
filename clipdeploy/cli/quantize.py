"""``clipdeploy quantize``: write the INT8 or the FP8 graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from clipdeploy.cli.common import Context, emit, stage_command
from clipdeploy.cli.config_fields import choices_of, default_of
from clipdeploy.cli.numbers import number
from clipdeploy.cli.options import option
from clipdeploy.cli.shared_options import cpu_option, force_option, model_option
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
    from calibration.config import QuantizeConfig
    from calibration.policy import Placement
    from calibration.quality import Quality
    from calibration.scheme import SchemeConfig
    from clipdeploy.core.passport import Precision
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

_QUANTIZE = "calibration.config.QuantizeConfig"
_SCHEME = "calibration.scheme.SchemeConfig"
_SCHEME_OPTIONS = (
    option(
        "--range",
        "range_method",
        type=click.Choice(choices_of(_SCHEME, "range_method")),
        default=default_of(_SCHEME, "range_method"),
        help="Method for activation ranges; auto minimises the error of the Linear's output.",
    ),
    option("--no-smooth", is_flag=True, help="Do not move activation outliers into the weights."),
    option(
        "--strength",
        type=number(STRENGTH),
        metavar="FRACTION",
        help="Share of the outliers that smoothing moves into the weights, for all Linears.",
        default_text="chosen for each Linear by its expected error",
    ),
    option(
        "--no-shift",
        is_flag=True,
        help="Do not shift the output of GELU, as --range auto does.",
    ),
    option("--no-bias-correction", is_flag=True, help="Do not correct biases."),
    option(
        "--no-weight-clip",
        is_flag=True,
        help="Do not clip weights: take their scales from the largest weight.",
    ),
)
_OPTIONS = (
    option(
        "--recipe",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Recipe file written by `search`, instead of the quantisation options below.",
    ),
    option(
        "--exclude",
        multiple=True,
        metavar="PATTERN",
        help="Linears to leave unquantised, such as 'blocks.0.*'; may be given several times.",
    ),
    option(
        "--effort",
        type=click.Choice(choices_of(_QUANTIZE, "effort")),
        default=default_of(_QUANTIZE, "effort"),
        help="best also fits weights and biases to the stored calibration images, block by block.",
    ),
    *_SCHEME_OPTIONS,
    option(
        "--weight-scales",
        type=click.Choice(choices_of(_QUANTIZE, "weight_scales")),
        help="Form of the weight scales: channel for TensorRT, ratio for TensorRT-RTX, tensor for "
        "a single scale.",
        default_text="the form for the backend, tensor for FP8",
    ),
    option("--quantize-attention", is_flag=True, help="Quantise attention's two products too."),
    option(
        "--quantize-outputs",
        is_flag=True,
        help="Round the sums of qkv and fc1 too, so that they move as 8 bits.",
    ),
    option("--quantize-head", is_flag=True, help="Quantise the classifier too."),
    option("--quantize-patch", is_flag=True, help="Quantise the patch convolution too."),
    option(
        "--min-sqnr",
        type=number(SQNR_DB),
        metavar="DB",
        help="Lowest signal-to-noise ratio in dB. A Linear whose output has less is not quantised; "
        "a graph whose logits have less on the calibration images is refused.",
        default_text=f"{default_of('calibration.config.QuantizeConfig', 'min_sqnr'):g}",
    ),
)


def scheme_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for quantising a Linear; :func:`scheme_config` reads them."""
    return with_options(_SCHEME_OPTIONS, function)


def check_scheme_options(options: dict[str, Any], *, fp8: bool = False) -> None:
    """Refuse options of :func:`scheme_options` that have no effect with the others or with FP8.

    Raises:
        UsageError: it names the first one.
    """
    if fp8:
        # FP8's error is relative: neither smoothing nor another zero lowers it.
        refuse_unused(["no_smooth", "strength", "no_shift"], "INT8", "use INT8 instead of FP8")
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
    """Add the options of quantisation; :func:`quantize_config` reads them."""
    return with_options(_OPTIONS, function)


def recipe_names() -> list[str]:
    """The parameter names of :func:`recipe_options`."""
    return option_names(_OPTIONS)


def check_recipe_options(options: dict[str, Any], *, fp8: bool = False) -> None:
    """Refuse options of :func:`recipe_options` that have no effect with the others or with FP8.

    Raises:
        UsageError: it names the first one, or the option given beside a recipe file.
    """
    if given("recipe"):
        refuse_together(
            *recipe_names(),
            hint="a recipe contains all quantisation options: leave one of them out",
        )
    check_scheme_options(options, fp8=fp8)


def quantize_options(options: dict[str, Any]) -> QuantizeConfig:
    """The values of :func:`recipe_options` without the recipe file, as a configuration.

    Raises:
        UsageError: a value is out of range.
    """
    from calibration.config import QuantizeConfig
    from calibration.policy import Scope

    scheme = scheme_config(options)
    scope = Scope(
        attention=options["quantize_attention"],
        head=options["quantize_head"],
        patch=options["quantize_patch"],
        outputs=options["quantize_outputs"],
    )
    config = QuantizeConfig(
        options["exclude"],
        "fp16",
        scheme,
        scope,
        weight_scales=options["weight_scales"],
        effort=options["effort"],
    )
    minimum = options["min_sqnr"]
    return config if minimum is None else replace(config, min_sqnr=minimum)


def quantize_config(
    context: Context,
    model: str,
    options: dict[str, Any],
    remainder: Literal["fp16", "fp32"] | None = None,
    precision: Precision | None = None,
) -> QuantizeConfig:
    """The values of :func:`recipe_options`, or of the recipe file, as a configuration.

    ``remainder`` outranks that of a recipe.  ``precision`` is the one asked for, if any.

    Raises:
        UsageError: a value is out of range.
        ArtifactError, FileError: the recipe cannot be read, or belongs to other weights.
    """
    from clipdeploy.stages.quantize import in_format, recipe_config

    if options["recipe"] is None:
        config = in_format(quantize_options(options), precision or "int8")
    else:
        config = recipe_config(context.workspace, model, options["recipe"], precision)
    return config if remainder is None else replace(config, remainder=remainder)


@command(
    epilog="\b\nclipdeploy quantize\nclipdeploy quantize --cpu --exclude 'blocks.0.*'\n"
    "clipdeploy quantize --fp8"
)
@model_option
@option("--fp8", is_flag=True, help="Write the FP8 graph (E4M3) instead of the INT8 graph.")
@recipe_options
@cpu_option
@force_option
@stage_command
def quantize(
    context: Context, model: str | None, fp8: bool, cpu: bool, force: bool, **recipe: Any
) -> None:
    """Write the INT8 or FP8 graph with the ranges of the calibration.

    Quantised operators are marked by QuantizeLinear and DequantizeLinear (Q/DQ).
    """
    refuse_together("fp8", "cpu", hint="FP8 is for TensorRT engines: leave one of the two out")
    check_recipe_options(recipe, fp8=fp8)
    name = context.model(model)
    from clipdeploy.stages.quantize import chosen_config, quantize_model

    config = quantize_config(context, name, recipe, "fp32" if cpu else None, "fp8" if fp8 else None)
    if recipe["recipe"] is None:
        config = chosen_config(context.workspace, name, config, force=force, note=context.note)
    result = quantize_model(
        context.workspace,
        name,
        config,
        backend=cast("BackendOption", context.setting("backend") or "auto"),
        force=force,
        progress=context.progress,
    )
    label = config.number_format.label
    line = (
        f"{result.artifact.path}: {len(result.placement.quantized)} Linears and products in "
        f"{label}, "
        f"{result.artifact.bytes / 1e6:.1f} MB"
        + ("" if result.artifact.changed else " (unchanged)")
    )
    quality = result.quality
    for warning in result.warnings:
        context.note(warning)
    lines = [
        line,
        *_left_out(result.placement, label),
        *(() if quality is None else [_sqnr(quality)]),
    ]
    emit(context, result, lambda: "\n".join(lines))


def note_quality(context: Context, quality: Quality | None) -> None:
    """Note the warnings of a quantised graph."""
    for warning in () if quality is None else quality.warnings:
        context.note(warning)


def _sqnr(quality: Quality) -> str:
    """What the quantisation costs, in one line."""
    images = f"{quality.images} calibration images" if quality.images else "the sample images"
    ratio = "equal to FP32" if quality.sqnr_db is None else f"SQNR {quality.sqnr_db:.1f} dB"
    return f"  logits: {ratio} on {images}"


def _left_out(placement: Placement, label: str) -> list[str]:
    """What is not quantised: a line for each group of operators with the same reason."""
    counts: dict[tuple[str, str], int] = {}
    for entry in placement.entries:
        if not entry.quantized:
            group = (re.sub(r"^blocks\.\d+", "blocks.*", entry.name), entry.reason)
            counts[group] = counts.get(group, 0) + 1
    return [
        f"  not {label}: {name}{f' ({count})' if count > 1 else ''}, {reason}"
        for (name, reason), count in counts.items()
    ]
