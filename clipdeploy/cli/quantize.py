"""``clipdeploy quantize``: INT8 into the graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import click

from clipdeploy.cli.common import Context, emit, force_option, model_option, stage_command

if TYPE_CHECKING:
    from calibration.policy import Placement
    from calibration.qdq import QuantizeConfig

__all__ = ["quantize", "quantize_config", "recipe_options"]

_OPTIONS = (
    click.option(
        "--exclude", multiple=True, metavar="PATTERN", help="Leave Linears alone: 'blocks.0.*'."
    ),
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
        "--no-shift",
        is_flag=True,
        help="No Sub after GELU, which --range auto adds.",
    ),
    click.option("--no-bias-correction", is_flag=True, help="Leave biases as they are."),
    click.option("--no-weight-clip", is_flag=True, help="Weight scales from the largest weight."),
    click.option("--quantize-attention", is_flag=True, help="Attention's two products as well."),
    click.option("--quantize-head", is_flag=True, help="The classifier as well."),
    click.option("--quantize-patch", is_flag=True, help="The patch convolution as well."),
)


def recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that decide how INT8 is made; :func:`quantize_config` reads them."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def quantize_config(
    options: dict[str, Any], remainder: Literal["fp16", "fp32"] = "fp16"
) -> QuantizeConfig:
    """The values of :func:`recipe_options` as a configuration."""
    from calibration.plan import PlanConfig
    from calibration.policy import Scope
    from calibration.qdq import QuantizeConfig

    plan = PlanConfig(
        range_method=options["range_method"],
        smooth=not options["no_smooth"],
        shift_gelu=not options["no_shift"],
        clip_weights=not options["no_weight_clip"],
        correct_bias=not options["no_bias_correction"],
    )
    scope = Scope(
        attention=options["quantize_attention"],
        head=options["quantize_head"],
        patch=options["quantize_patch"],
    )
    return QuantizeConfig(options["exclude"], remainder, plan, scope)


@click.command()
@model_option
@recipe_options
@click.option(
    "--cpu", is_flag=True, help="For ONNX Runtime's int8 kernels on a CPU: the rest stays FP32."
)
@force_option
@stage_command
def quantize(context: Context, model: str | None, cpu: bool, force: bool, **recipe: Any) -> None:
    """Write the INT8 (Q/DQ) graph from the FP32 graph and its calibration."""
    name = context.model(model)
    from clipdeploy.stages.quantize import quantize_model

    config = quantize_config(recipe, "fp32" if cpu else "fp16")
    result = quantize_model(context.workspace, name, config, force=force, progress=context.progress)
    line = (
        f"{result.artifact.path}: {len(result.placement.quantized)} Linears and products in INT8, "
        f"{result.artifact.bytes / 1e6:.1f} MB"
        + ("" if result.artifact.changed else " (unchanged)")
    )
    emit(context, result, lambda: "\n".join([line, *_left_out(result.placement)]))


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
