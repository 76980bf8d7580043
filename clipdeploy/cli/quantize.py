"""``clipdeploy quantize``: INT8 into the graph."""

from __future__ import annotations

import click

from clipdeploy.cli.common import Context, emit, force_option, model_option, stage_command


@click.command()
@model_option
@click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Linears to leave alone: 'blocks.0.*'."
)
@force_option
@stage_command
def quantize(context: Context, model: str | None, exclude: tuple[str, ...], force: bool) -> None:
    """Write the INT8 (Q/DQ) graph from the FP32 graph and its calibration."""
    name = context.model(model)
    from calibration.qdq import QuantizeConfig
    from clipdeploy.pipeline import quantize_model

    result = quantize_model(
        context.workspace, name, QuantizeConfig(exclude), force=force, progress=context.progress
    )
    left = [entry for entry in result.placement.entries if not entry.int8]
    lines = [
        f"{result.artifact.path}: {len(result.placement.quantized)} of "
        f"{len(result.placement.entries)} Linears in INT8, {result.artifact.bytes / 1e6:.1f} MB"
        + ("" if result.artifact.changed else " (unchanged)"),
        *(f"  not INT8: {entry.name}, {entry.reason}" for entry in left),
    ]
    emit(context, result, lambda: "\n".join(lines))
