"""Writes the weights of the Linears as 4-bit numbers, and measures what is left of the logits.

    python scripts/bench/int4.py [--variants FOLDER]
    python scripts/bench/int4.py --model clip-vit-base-p16 [--images 48]

Each weight (Cin, Cout) has a scale for each output channel and each block of B input channels,

    W'[c, j] = s[c // B, j] q[c, j],      q = -7, -6, .. 7,

as ONNX's blocked DequantizeLinear (opset 21) takes it; B is 128, or the model's width if that is
less.  Inputs stay floating point.  The numbers q are

    nearest    to W / s, with s = max |W| / 7 of the block
    clipped    also, with the best of that and five smaller scales (:mod:`calibration.weights`)
    fitted     rounded on calibration images, with fitted biases, as ``--effort best`` does
               (:mod:`calibration.rounding`, :mod:`calibration.fitting`); the scales are those of
               clipped

and a row "rotated" has the residual stream and the heads rotated first (``flat+heads`` of
rotation.py).
The SQNR is that of the logits on held-out images, on ONNX Runtime, in dB.  The demo and its
variants with outliers are measured on digits; ``--model`` has random weights, and crops of two
photographs.  The script stops if ONNX Runtime does not compute the graph as it would with W' in
FP32.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
from calibrate import inputs, write_photos
from held_out import CALIBRATION, F32, decibels, demo_graphs, held_out_digits
from numpy.typing import NDArray
from rotation import rotated, rotations

from calibration.distribution import Distribution
from calibration.fitting import fit_linears
from calibration.formats import INT8
from calibration.policy import LinearSite, find_linears
from calibration.scheme import LinearScheme, add_to_bias
from calibration.table import CalibrationTable, load_table
from calibration.views import mirrored
from calibration.weights import quantize_weight
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import calibrate_model, export_model
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph
from exporters.initializers import (
    add_initializer,
    own_initializer,
    remove_unused,
    values_of,
    write_initializer,
)
from exporters.samples import Samples
from exporters.session import OnnxSession
from exporters.tapped import serialised

BLOCK = 128
FIRST_WITH_BLOCKS = 21
# The IR version of onnx 1.16, the first with INT4.
FIRST_WITH_INT4 = 10
# Float32 sums in another order.
SAME_DB = 90.0
# Images that --model is judged on.
HELD_OUT = 16


class Int4(type(INT8)):  # type: ignore[misc]
    """The numbers -7 .. 7."""

    label, largest = "INT4", 7.0
    onnx_type, dtype = ir.DataType.INT4, np.dtype(ml_dtypes.int4)


INT4 = Int4()
Schemes = dict[str, LinearScheme]


def blocked_weight(
    weight: F32, block: int, variance: NDArray[np.float64] | None
) -> tuple[NDArray[np.generic], F32]:
    """Numbers (Cin, Cout) of a weight, and the scale of each, (Cin, Cout)."""
    numbers, scales = [], []
    for first in range(0, len(weight), block):
        part = slice(first, first + block)
        inside = None if variance is None else variance[part]
        found, scale = quantize_weight(weight[part], inside, INT4)
        numbers.append(found)
        scales.append(np.broadcast_to(scale, found.shape))
    return np.concatenate(numbers), np.concatenate(scales)


def nearest(model: ir.Model, table: CalibrationTable, block: int, *, clip: bool) -> Schemes:
    """The nearest numbers of each Linear."""

    def scheme(site: LinearSite) -> LinearScheme:
        weight = values_of(site.weight)
        variance = Distribution.of(table.of(site.name)).variance() if clip else None
        numbers, scale = blocked_weight(weight, block, variance)
        # Neither the step of the input nor its SQNR is used.
        return LinearScheme(1.0, 0, numbers, scale, None, np.zeros(weight.shape[1]), 0.0, "")

    return {site.name: scheme(site) for site in find_linears(model)}


def fitted(model: ir.Model, table: CalibrationTable, schemes: Schemes) -> Schemes:
    """Numbers and biases fitted to the calibration's images and their mirror images."""
    images, checks = table.fitted(), table.samples()
    assert images is not None
    assert checks is not None
    both = images.concat(Samples(mirrored(images.crops), images.spec))
    return fit_linears(
        model, schemes, both.pixels.copy(), checks.pixels.copy(), INT4, weights_only=True
    ).schemes


def write(model: ir.Model, schemes: Mapping[str, LinearScheme], block: int) -> None:
    """Write the weights in INT4, with a scale for each block."""
    model.graph.opset_imports[""] = max(model.graph.opset_imports[""] or 0, FIRST_WITH_BLOCKS)
    model.ir_version = max(model.ir_version or 0, FIRST_WITH_INT4)
    for site in find_linears(model):
        scheme = schemes[site.name]
        add_to_bias(site, scheme.correction)
        value, graph = own_initializer(site.matmul, 1), site.matmul.graph
        assert isinstance(graph, ir.Graph)
        scale = np.ascontiguousarray(scheme.weight_scale[::block])
        stored = [
            add_initializer(graph, f"{value.name}/int4", scheme.numbers),
            add_initializer(graph, f"{value.name}/scale", scale),
        ]
        node = ir.node(
            "DequantizeLinear", stored, {"axis": 0, "block_size": block}, name=f"{site.name}/DQ"
        )
        node.outputs[0].name = node.name
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        graph.insert_before(site.matmul, node)
        site.matmul.replace_input_with(1, node.outputs[0])
        remove_unused(graph)


def simulate(model: ir.Model, schemes: Mapping[str, LinearScheme], block: int) -> None:
    """Write the values of the INT4 weights of ``schemes`` in FP32."""
    for site in find_linears(model):
        if (scheme := schemes.get(site.name)) is None:
            continue
        add_to_bias(site, scheme.correction)
        values = scheme.numbers.astype(np.float32) * scheme.weight_scale
        write_initializer(site.matmul, 1, values)


def run(model: ir.Model, images: F32) -> F32:
    """The logits of a graph (N, K); a DequantizeLinear is computed as it is written."""
    session = OnnxSession(serialised(model), fp8=True)
    return np.concatenate([found for (found,) in session.run_all(images)])


def measured(graph: Path, schemes: Schemes, block: int, images: F32, reference: F32) -> float:
    """The SQNR in dB of the logits with the weights of ``schemes``.

    Raises:
        SystemExit: ONNX Runtime does not compute what the numbers and scales say.
    """
    results = []
    for edit in (write, simulate):
        model = load_graph(graph)
        edit(model, schemes, block)
        results.append(run(model, images))
    if (same := decibels(results[1], results[0])) < SAME_DB:
        raise SystemExit(f"INT4 on ONNX Runtime is only {same:.1f} dB from FP32 with equal weights")
    return decibels(reference, results[0])


def block_of(name: str) -> int:
    """The number of input channels with one scale."""
    return min(BLOCK, cards.find(name).width)


def row(workspace: Workspace, name: str, data: Path, images: F32, reference: F32) -> str:
    """The SQNR of each way to round the FP32 graph of ``workspace``."""
    graph, block = workspace.graph(name, "fp32"), block_of(name)
    table = load_table(calibrate_model(workspace, name, data).path)
    model = load_graph(graph)
    clipped = nearest(model, table, block, clip=True)
    ways = (nearest(model, table, block, clip=False), clipped, fitted(model, table, clipped))
    return "".join(f"{measured(graph, w, block, images, reference):10.1f}" for w in ways)


def print_demo(variants: Path | None, folder: Path) -> None:
    """Print the rows of the demo and its variants, also rotated."""
    images = held_out_digits()
    both = rotations(cards.find(cards.DEMO).width)["flat+heads"]
    for name, source in demo_graphs(variants, folder):
        reference = run(load_graph(source), images)
        for title, rotation in (("", lambda model: None), (", rotated", both)):
            workspace = Workspace(folder / f"{name}{title}")
            rotated(source, workspace.graph(cards.DEMO, "fp32"), rotation)
            cells = row(workspace, cards.DEMO, CALIBRATION, images, reference)
            print(f"{name + title:20}{cells}", flush=True)


def print_model(name: str, count: int, folder: Path) -> None:
    """Print the row of a model with random weights, calibrated on ``count`` photographs."""
    write_photos(folder / "calibration", count, seed=1)
    write_photos(folder / "held-out", HELD_OUT, seed=2)
    workspace = Workspace(folder / "artifacts")
    export_model(workspace, name, WeightsChoice(random_seed=0))
    graph = workspace.graph(name, "fp32")
    images = np.concatenate(list(inputs(graph, folder / "held-out", HELD_OUT)))
    reference = run(load_graph(graph), images)
    print(f"{name:20}{row(workspace, name, folder / 'calibration', images, reference)}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--images", type=int, default=48, help="calibration images of --model")
    chosen = parser.parse_args()
    print(f"{'':20}{'nearest':>10}{'clipped':>10}{'fitted':>10}")
    with tempfile.TemporaryDirectory() as temporary:
        if chosen.model is None:
            print_demo(chosen.variants, Path(temporary))
        else:
            print_model(chosen.model, chosen.images, Path(temporary))


if __name__ == "__main__":
    main()
