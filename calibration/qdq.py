"""Write INT8 into the graph as QuantizeLinear / DequantizeLinear pairs.

    x ── Q(s_x) ── DQ(s_x) ──┐
                             MatMul ── Add(bias)
    W int8 ────── DQ(s_w) ───┘

Activations: symmetric, one scale a tensor, s_x = range / 127.  Weights: symmetric, one scale for
each output channel, s_w[j] = max_i |W[i, j]| / 127, stored as int8.  Every scale is rounded to
float16 before it is used, so that the FP16 and the FP32 flavour of the graph hold the same integers
and the same scales.  Biases stay floating point: TensorRT-RTX refuses an int32 DequantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.policy import LinearSite, Placement, find_linears, place
from calibration.table import CalibrationTable, load_table
from exporters.artifact import Passport, settings_of
from exporters.checks import check_structure
from exporters.errors import ArtifactError, CalibrationError, GraphError, UsageError
from exporters.files import sha256_file
from exporters.graphs import GraphArtifact, load_graph, read_passport, save_graph
from exporters.overflow import check_storage, largest_values, near_limit
from exporters.precision import Fp16Config, half_precision
from exporters.samples import Samples

__all__ = ["QuantizeConfig", "QuantizedGraph", "quantize"]

_QMAX = 127
# QuantizeLinear and DequantizeLinear take float16 scales from here on.
_FIRST_WITH_HALF_SCALES = 19
_SMALLEST_SCALE = float(np.finfo(np.float16).tiny)


@dataclass(frozen=True)
class QuantizeConfig:
    """``exclude``: patterns of Linears that stay as they are; ``remainder``: the rest's type.

    ``fp16`` is what a TensorRT engine is compiled from; ``fp32`` is what ONNX Runtime runs with
    int8 kernels on a CPU.
    """

    exclude: tuple[str, ...] = ()
    remainder: Literal["fp16", "fp32"] = "fp16"

    def __post_init__(self) -> None:
        if self.remainder not in ("fp16", "fp32"):
            raise UsageError(
                f"the remainder cannot be {self.remainder!r}", hint="choose fp16 or fp32"
            )


@dataclass(frozen=True)
class QuantizedGraph:
    """The INT8 graph and the placement report."""

    artifact: GraphArtifact
    placement: Placement


def float16_scale(scale: NDArray[np.float64]) -> NDArray[np.float32]:
    """Scales rounded to float16 values, no smaller than float16's smallest normal number."""
    return np.maximum(scale, _SMALLEST_SCALE).astype(np.float16).astype(np.float32)


def quantize_weight(
    weight: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(Cin, Cout) float32 -> int8 of the same shape, and the (Cout,) scales."""
    scale = float16_scale(np.abs(weight).max(axis=0).astype(np.float64) / _QMAX)
    return np.clip(np.rint(weight / scale), -_QMAX, _QMAX).astype(np.int8), scale


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def _node(
    op: str,
    name: str,
    inputs: list[ir.Value],
    dtype: ir.DataType,
    like: ir.Value,
    **attributes: int,
) -> ir.Node:
    node = ir.node(op, inputs, attributes, name=name)
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(dtype)
    node.outputs[0].shape = like.shape
    return node


def _quantize_site(model: ir.Model, site: LinearSite, scale: float) -> None:
    graph = model.graph
    weight = site.weight.const_value
    if weight is None:
        raise CalibrationError(f"the weight of {site.name} has no data")
    integers, weight_scale = quantize_weight(weight.numpy())
    zero = _initializer(graph, f"{site.name}.input_zero_point", np.zeros((), np.int8))
    step = _initializer(graph, f"{site.name}.input_scale", np.asarray(scale, np.float32))
    q = _node(
        "QuantizeLinear",
        f"{site.name}/Q",
        [site.activation, step, zero],
        ir.DataType.INT8,
        site.activation,
    )
    dq = _node(
        "DequantizeLinear",
        f"{site.name}/DQ",
        [q.outputs[0], step, zero],
        ir.DataType.FLOAT,
        site.activation,
    )
    w_int8 = _initializer(graph, f"{site.weight.name}/int8", integers)
    w_scale = _initializer(graph, f"{site.weight.name}/scale", weight_scale)
    w_dq = _node(
        "DequantizeLinear",
        f"{site.name}/weight_DQ",
        [w_int8, w_scale],
        ir.DataType.FLOAT,
        site.weight,
        axis=1,
    )
    graph.insert_before(site.matmul, [q, dq, w_dq])
    site.matmul.replace_input_with(0, dq.outputs[0])
    site.matmul.replace_input_with(1, w_dq.outputs[0])
    del graph.initializers[site.weight.name or ""]


def _check_table(table: CalibrationTable, passport: Passport, source: str, where: Path) -> None:
    for what, found, wanted in (
        ("model", table.model, passport.model),
        ("weights", table.weights, passport.weights.identity),
        ("preprocessing", table.preprocess, passport.preprocess),
        ("source graph", table.source_graph, source),
    ):
        if found != wanted:
            raise ArtifactError(
                f"{where} was made for another {what}: {found}, not {wanted}",
                hint="calibrate this model again",
            )


def _need_opset(model: ir.Model, passport: Passport) -> None:
    opset = model.graph.opset_imports[""]
    if opset < _FIRST_WITH_HALF_SCALES:
        raise GraphError(
            f"INT8 with an FP16 remainder needs opset {_FIRST_WITH_HALF_SCALES} or newer, "
            f"{passport.model} was exported with {opset}",
            hint="export again with a newer --opset",
        )


def quantize(
    source: Path,
    calibration: Path,
    target: Path,
    samples: Samples,
    config: QuantizeConfig = QuantizeConfig(),
) -> QuantizedGraph:
    """Write the INT8 twin of the FP32 graph ``source``.

    With an FP16 remainder, ``samples`` (a few real images) decide which tensors stay float32, and
    the result is run with every half really stored as one before it gets its name.

    Raises:
        ArtifactError: the calibration is damaged, or of another model or preprocessing.
        CalibrationError: the calibration lacks a Linear.
        GraphError: the graph has no Linears of ours, a tensor overflows, or the result is not
            valid.
        FileError: something cannot be read or written.
    """
    passport = read_passport(source)
    table = load_table(calibration)
    source_hash = sha256_file(source)
    _check_table(table, passport, source_hash, calibration)
    model = load_graph(source)
    sites = find_linears(model)
    placement = place(sites, config.exclude)
    chosen = set(placement.quantized)
    for site in sites:
        if site.name in chosen:
            amax = np.asarray([table.of(site.name).amax.max()], np.float64)
            _quantize_site(model, site, float(float16_scale(amax / _QMAX)[0]))
    half = config.remainder == "fp16"
    images = samples.feed(passport.input)
    reference, peaks = largest_values(source, images) if half else (None, {})
    keep = near_limit(peaks)
    if half:
        _need_opset(model, passport)
        half_precision(model, Fp16Config(keep))
    passport = replace(
        passport,
        precision="int8",
        parents={"source_graph": source_hash, "calibration": sha256_file(calibration)},
        settings={
            **passport.settings,
            **settings_of(config),
            "int8_linears": len(chosen),
            "keep_fp32": list(keep),
        },
    )
    check_structure(model, passport)

    def check(written: Path) -> None:
        if reference is not None:
            check_storage(written, images, reference)

    return QuantizedGraph(save_graph(model, target, passport, check), placement)
