"""FP32 graph and calibration -> INT8 graph.

:mod:`calibration.policy` decides what runs in INT8, :mod:`calibration.plan` with which numbers,
:mod:`calibration.write` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from rich.console import Group
from rich.text import Text

from calibration.distribution import Distribution
from calibration.plan import (
    LinearPlan,
    PlanConfig,
    add_to_bias,
    fold_all,
    plan_linear,
    plan_product,
)
from calibration.policy import (
    HEAD,
    PATCH,
    LinearSite,
    Placement,
    Scope,
    find_linears,
    find_node,
    find_products,
    place,
    qkv_output,
)
from calibration.smoothing import Folding
from calibration.table import CalibrationTable, load_table
from calibration.weights import float16_step, quantize_weight
from calibration.write import QdqWriter
from exporters.artifact import Passport, Preprocess, settings_of
from exporters.checks import check_structure
from exporters.errors import ArtifactError, GraphError, UsageError
from exporters.files import sha256_file
from exporters.graphs import load_graph, save_graph
from exporters.headers import GraphArtifact, read_passport
from exporters.notebook import Renderable, Shown
from exporters.overflow import check_storage, largest_values, near_limit
from exporters.precision import Fp16Config, half_precision
from exporters.samples import Samples

__all__ = ["QuantizeConfig", "QuantizedGraph", "quantize", "smooth"]

# QuantizeLinear and DequantizeLinear take float16 scales from here on.
_FIRST_WITH_HALF_SCALES = 19


@dataclass(frozen=True)
class QuantizeConfig:
    """``exclude``: patterns of what stays as it is; ``remainder``: the rest's type.

    ``fp16`` is what a TensorRT engine is compiled from; ``fp32`` is what ONNX Runtime runs with
    int8 kernels on a CPU.  ``plan``: how ranges are found and outliers smoothed; ``scope``: what is
    quantised beside the Linears of the blocks.

    Raises:
        UsageError: another ``remainder``.
    """

    exclude: tuple[str, ...] = ()
    remainder: Literal["fp16", "fp32"] = "fp16"
    plan: PlanConfig = field(default_factory=PlanConfig)
    scope: Scope = field(default_factory=Scope)

    def __post_init__(self) -> None:
        if self.remainder not in ("fp16", "fp32"):
            raise UsageError(
                f"the remainder cannot be {self.remainder!r}", hint="choose fp16 or fp32"
            )


@dataclass(frozen=True)
class QuantizedGraph(Shown):
    """The INT8 graph and the placement report."""

    artifact: GraphArtifact
    placement: Placement

    def __rich__(self) -> Renderable:
        return Group(self.artifact, Text(""), self.placement)


def smooth(
    model: ir.Model,
    table: CalibrationTable,
    chosen: frozenset[str],
    strength: float | None = None,
) -> dict[str, Folding]:
    """Fold the activation outliers of the chosen Linears into ``model``; its function stays.

    Raises:
        CalibrationError: the table lacks a Linear.
    """
    sites = find_linears(model)
    statistics = {site.name: table.of(site.name) for site in sites if site.name in chosen}
    return fold_all(sites, statistics, strength)


def _write_linears(
    writer: QdqWriter,
    sites: list[LinearSite],
    table: CalibrationTable,
    foldings: dict[str, Folding],
    config: PlanConfig,
) -> None:
    for site in sites:
        plan: LinearPlan = plan_linear(site, table.of(site.name), foldings.get(site.name), config)
        if plan.zero and site.bias is not None and not writer.unsigned:
            add_to_bias(site, plan.shift_output)
        writer.activation(site.matmul, 0, site.name, plan.step, plan.zero)
        writer.weight(site.matmul, site.name, plan.integers, plan.weight_scale, axis=1)


def _write_products(
    writer: QdqWriter,
    model: ir.Model,
    table: CalibrationTable,
    foldings: dict[str, Folding],
    chosen: frozenset[str],
) -> None:
    for product in find_products(model):
        if product.name not in chosen:
            continue
        statistics = table.of(qkv_output(f"blocks.{product.block}.attn.qkv"))
        folding = foldings.get(f"blocks.{product.block}.attn.proj")
        steps = plan_product(product.role, statistics, folding)
        for index, step in enumerate(steps):
            writer.activation(product.node, index, f"{product.name}.{index}", step)


def _write_head(writer: QdqWriter, node: ir.Node, table: CalibrationTable) -> None:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    array = weight.const_value.numpy()
    # With transB, which torch.onnx sets, Gemm holds the weight as (Cout, Cin), else (Cin, Cout).
    turned = bool(node.attributes.get_int("transB", 0))
    integers, scale = quantize_weight(np.ascontiguousarray(array.T if turned else array))
    amax = Distribution.of(table.of(HEAD)).amax
    writer.activation(node, 0, HEAD, float16_step(amax))
    if turned:
        integers = np.ascontiguousarray(integers.T)
    writer.weight(node, HEAD, integers, scale, axis=0 if turned else 1)


def _write_patch(writer: QdqWriter, node: ir.Node, spec: Preprocess) -> None:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    kernel = weight.const_value.numpy()
    integers, scale = quantize_weight(np.ascontiguousarray(kernel.reshape(len(kernel), -1).T))
    # A pixel lies between 0 and 255: no image needs to be asked.
    mean, std = np.asarray(spec.mean), np.asarray(spec.std)
    amax = float(np.maximum(mean / std, (1 - mean) / std).max())
    writer.activation(node, 0, PATCH, float16_step(amax))
    writer.weight(node, PATCH, integers.T.reshape(kernel.shape).copy(), scale, axis=0)


def _write(
    model: ir.Model, table: CalibrationTable, chosen: frozenset[str], config: QuantizeConfig
) -> None:
    plan = config.plan
    foldings = smooth(model, table, chosen, plan.strength) if plan.smooth else {}
    writer = QdqWriter(model.graph, unsigned=config.remainder == "fp32")
    sites = [site for site in find_linears(model) if site.name in chosen]
    products = find_products(model)
    _write_linears(writer, sites, table, foldings, config.plan)
    if any(product.name in chosen for product in products):
        _write_products(writer, model, table, foldings, chosen)
    if HEAD in chosen and (node := find_node(model, HEAD, "Gemm")) is not None:
        _write_head(writer, node, table)
    if PATCH in chosen and (node := find_node(model, PATCH, "Conv")) is not None:
        _write_patch(writer, node, table.preprocess)


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
    placement = place(model, config.exclude, config.scope)
    chosen = frozenset(placement.quantized)
    _write(model, table, chosen, config)
    half = config.remainder == "fp16"
    images = samples.feed(passport.input)
    reference, peaks = largest_values(source, images) if half else (None, {})
    keep = near_limit(peaks)
    if half:
        _need_opset(model, passport)
        half_precision(model, Fp16Config(keep))
    passport = replace(
        passport,
        precision="int8" if half else "int8-cpu",
        parents={"source_graph": source_hash, "calibration": sha256_file(calibration)},
        settings={
            **passport.settings,
            **settings_of(config),
            "int8_nodes": len(chosen),
            "keep_fp32": list(keep),
        },
    )
    check_structure(model, passport)

    def check(written: Path) -> None:
        if reference is not None:
            check_storage(written, images, reference)

    return QuantizedGraph(save_graph(model, target, passport, check), placement)
