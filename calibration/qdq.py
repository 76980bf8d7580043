"""Makes the INT8 graph from the FP32 graph and its calibration.

:mod:`calibration.policy` selects the nodes, :mod:`calibration.scheme` computes their scales and
weights, :mod:`calibration.write` writes the Q/DQ pairs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir

from calibration.distribution import Distribution
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
from calibration.quality import MIN_SQNR_DB, Judge, Quality, Weakest, check_quality
from calibration.scheme import (
    LinearScheme,
    SchemeConfig,
    add_to_bias,
    fold_all,
    linear_scheme,
    product_steps,
)
from calibration.smoothing import Folding
from calibration.table import CalibrationTable, load_table
from calibration.weights import float16_step, quantize_weight
from calibration.write import QdqWriter
from clipdeploy.core.display import Renderable, Shown, stacked
from clipdeploy.core.errors import ArtifactError, CalibrationError, GraphError, UsageError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import Passport, Preprocess, ScaleForm, settings_of
from clipdeploy.core.spans import SQNR_DB, check_numbers
from exporters.checks import check_structure
from exporters.graphs import load_graph, save_graph
from exporters.headers import GraphArtifact, read_passport
from exporters.initializers import values_of
from exporters.overflow import near_limit
from exporters.precision import Fp16Config, half_precision
from exporters.samples import Samples

__all__ = [
    "SCHEME_KEY",
    "QuantizeConfig",
    "QuantizedGraph",
    "quantize",
    "smooth",
    "stored_settings",
]

# First opset whose QuantizeLinear and DequantizeLinear take float16 scales.
_FIRST_WITH_HALF_SCALES = 19
# The JSON key of ``scheme`` in every passport and recipe written so far.
SCHEME_KEY = "plan"


@dataclass(frozen=True)
class QuantizeConfig:
    """How to make the INT8 graph.

    ``exclude``: name patterns of Linears and products to leave unquantised.  ``remainder``: type of
    the unquantised nodes; ``fp16`` for TensorRT engines, ``fp32`` for ONNX Runtime's int8 kernels
    on a CPU.  ``scheme``: how ranges are found and outliers smoothed.  ``scope``: what to quantise
    besides the Linears of the blocks.  ``min_sqnr``: lowest signal-to-noise ratio in dB; a Linear
    whose output would fall below it is left unquantised, a graph whose logits fall below it is
    refused.  None disables both checks.  ``weight_scales``: form of the weight scales, see
    :mod:`calibration.write`; None selects the form for the installed TensorRT, or ``channel`` for
    ``fp32``.

    Raises:
        UsageError: unknown ``remainder`` or ``weight_scales``, or ``min_sqnr`` out of range.
    """

    exclude: tuple[str, ...] = ()
    remainder: Literal["fp16", "fp32"] = "fp16"
    scheme: SchemeConfig = field(default_factory=SchemeConfig)
    scope: Scope = field(default_factory=Scope)
    min_sqnr: float | None = MIN_SQNR_DB
    weight_scales: ScaleForm | None = None

    def __post_init__(self) -> None:
        if self.remainder not in ("fp16", "fp32"):
            raise UsageError(
                f"the remainder cannot be {self.remainder!r}", hint="choose fp16 or fp32"
            )
        if self.weight_scales not in (None, *get_args(ScaleForm)):
            raise UsageError(
                f"weight scales cannot have the form {self.weight_scales!r}",
                hint=f"one of {', '.join(get_args(ScaleForm))}",
            )
        if self.weight_scales == "ratio" and self.remainder == "fp32":
            raise UsageError(
                "weight scales in ratio form are for TensorRT-RTX, remainder fp32 for ONNX Runtime",
                hint="leave one of the two out",
            )
        check_numbers(self, min_sqnr=SQNR_DB.or_none)


def stored_settings(config: QuantizeConfig) -> dict[str, Any]:
    """``config`` as passports and recipes store it.

    Its keys are the field names, except that ``scheme`` is stored as ``plan``: the key of earlier
    versions, whose graphs would otherwise be made again and whose recipes would not load.
    """
    return {SCHEME_KEY if k == "scheme" else k: v for k, v in settings_of(config).items()}


@dataclass(frozen=True)
class QuantizedGraph(Shown):
    """The INT8 graph, its placement, and its quality; None if it was not measured."""

    artifact: GraphArtifact
    placement: Placement
    quality: Quality | None = None

    def __rich__(self) -> Renderable:
        warnings = () if self.quality is None else self.quality.warnings
        return stacked(self.artifact, "", *warnings, self.placement)


def smooth(
    model: ir.Model,
    table: CalibrationTable,
    chosen: frozenset[str],
    strength: float | None = None,
) -> dict[str, Folding]:
    """Fold the activation outliers of the chosen Linears into ``model``; its outputs stay the same.

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
    config: QuantizeConfig,
) -> dict[str, Weakest]:
    """Quantise all Linears that reach ``min_sqnr``; return the expected SQNR of every Linear."""
    found = {}
    for site in sites:
        statistics, folding = table.of(site.name), foldings.get(site.name)
        scheme: LinearScheme = linear_scheme(site, statistics, folding, config.scheme)
        found[site.name] = Weakest(site.name, scheme.sqnr_db, scheme.cause)
        if config.min_sqnr is not None and scheme.sqnr_db < config.min_sqnr:
            continue
        if site.bias is not None:
            lost = scheme.shift_output if not writer.unsigned else 0.0
            add_to_bias(site, scheme.correction + lost)
        writer.activation(site.matmul, 0, site.name, scheme.step, scheme.zero)
        writer.weight(site.matmul, site.name, scheme.integers, scheme.weight_scale, axis=1)
    return found


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
        steps = product_steps(product.role, statistics, folding)
        for index, step in enumerate(steps):
            writer.activation(product.node, index, f"{product.name}.{index}", step)


def _write_head(writer: QdqWriter, node: ir.Node, table: CalibrationTable) -> None:
    array = values_of(node.inputs[1])
    # With transB, which torch.onnx sets, Gemm's weight is (Cout, Cin), else (Cin, Cout).
    transposed = bool(node.attributes.get_int("transB", 0))
    integers, scale = quantize_weight(np.ascontiguousarray(array.T if transposed else array))
    amax = Distribution.of(table.of(HEAD)).amax
    writer.activation(node, 0, HEAD, float16_step(amax))
    if transposed:
        integers = np.ascontiguousarray(integers.T)
    writer.weight(node, HEAD, integers, scale, axis=0 if transposed else 1)


def _write_patch(writer: QdqWriter, node: ir.Node, spec: Preprocess) -> None:
    kernel = values_of(node.inputs[1])
    integers, scale = quantize_weight(np.ascontiguousarray(kernel.reshape(len(kernel), -1).T))
    # Pixels are from 0 to 255, so the range is known without calibration.
    mean, std = np.asarray(spec.mean), np.asarray(spec.std)
    amax = float(np.maximum(mean / std, (1 - mean) / std).max())
    writer.activation(node, 0, PATCH, float16_step(amax))
    writer.weight(node, PATCH, integers.T.reshape(kernel.shape).copy(), scale, axis=0)


def _write(
    model: ir.Model, table: CalibrationTable, chosen: frozenset[str], config: QuantizeConfig
) -> dict[str, Weakest]:
    scheme = config.scheme
    foldings = smooth(model, table, chosen, scheme.strength) if scheme.smooth else {}
    unsigned = config.remainder == "fp32"
    writer = QdqWriter(model.graph, unsigned=unsigned, scales=config.weight_scales or "channel")
    sites = [site for site in find_linears(model) if site.name in chosen]
    products = find_products(model)
    found = _write_linears(writer, sites, table, foldings, config)
    if any(product.name in chosen for product in products):
        _write_products(writer, model, table, foldings, chosen)
    if HEAD in chosen and (node := find_node(model, HEAD, "Gemm")) is not None:
        _write_head(writer, node, table)
    if PATCH in chosen and (node := find_node(model, PATCH, "Conv")) is not None:
        _write_patch(writer, node, table.preprocess)
    return found


def _check_table(table: CalibrationTable, passport: Passport, source: str, where: Path) -> None:
    for what, found, expected in (
        ("model", table.model, passport.model),
        ("weights", table.weights, passport.weights.identity),
        ("preprocessing", table.preprocess, passport.preprocess),
        ("source graph", table.source_graph, source),
    ):
        if found != expected:
            raise ArtifactError(
                f"{where} was made for another {what}: {found}, not {expected}",
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


def _left_out(found: dict[str, Weakest], minimum: float | None) -> dict[str, str]:
    """The Linears below ``minimum`` dB, each with the reason to leave it unquantised.

    Raises:
        CalibrationError: all Linears are below it.
    """
    if minimum is None:
        return {}
    low = {name: each for name, each in found.items() if each.sqnr_db < minimum}
    if low and len(low) == len(found):
        raise CalibrationError(
            f"INT8 would leave every Linear below {minimum:g} dB; "
            f"{min(found.values(), key=lambda each: each.sqnr_db)}",
            hint="calibrate with other images, build with --fp16, or give a lower --min-sqnr",
        )
    return {
        name: f"INT8 would give it an SQNR of {each.sqnr_db:.1f} dB: {each.cause}"
        for name, each in low.items()
    }


def _measured(
    judge: Judge,
    model: ir.Model,
    table: CalibrationTable,
    kept: Collection[Weakest],
    minimum: float | None,
) -> Quality | None:
    """Measure an INT8 graph with the quantised Linears ``kept``; None without a ``minimum``.

    Raises:
        CalibrationError: the quality is below ``minimum`` dB.
        GraphError: a tensor overflows.
    """
    if minimum is None:
        # float16 overflow is checked even if the quality is not.
        if judge.half:
            judge.measure(model)
        return None
    weakest = min(kept, key=lambda each: each.sqnr_db, default=None)
    quality = replace(judge.measure(model), weakest=weakest)
    return replace(quality, warnings=check_quality(quality, table, minimum))


def quantize(
    source: Path,
    calibration: Path,
    target: Path,
    samples: Samples,
    config: QuantizeConfig = QuantizeConfig(),
) -> QuantizedGraph:
    """Write the INT8 graph of the FP32 graph ``source`` to ``target``.

    The images stored in the calibration and ``samples`` (a few real images) decide which tensors of
    an FP16 remainder stay float32, and the result is measured on them before it is saved.

    Raises:
        ArtifactError: the calibration is damaged, or of another model or preprocessing.
        CalibrationError: the calibration lacks a Linear, or the result is below ``min_sqnr``.
        GraphError: clipdeploy did not export the graph, a tensor overflows, or the result is not
            valid.
        FileError: a file cannot be read or written.
    """
    config = replace(config, weight_scales=config.weight_scales or "channel")
    passport = read_passport(source)
    table = load_table(calibration)
    source_hash = sha256_file(source)
    _check_table(table, passport, source_hash, calibration)
    model = load_graph(source)
    placement = place(model, config.exclude, config.scope)
    half = config.remainder == "fp16"
    found = _write(model, table, frozenset(placement.quantized), config)
    left_out = _left_out(found, config.min_sqnr)
    placement = placement.without(left_out)
    judge = Judge(source, passport.input, table.samples(), samples, half=half)
    keep = near_limit(judge.peaks)
    if half:
        _need_opset(model, passport)
        half_precision(model, Fp16Config(keep))
    passport = replace(
        passport,
        precision="int8" if half else "int8-cpu",
        parents={"source_graph": source_hash, "calibration": sha256_file(calibration)},
        settings={
            **passport.settings,
            **stored_settings(config),
            "int8_nodes": len(placement.quantized),
            "int8_left_out": left_out,
            "keep_fp32": list(keep),
        },
    )
    check_structure(model, passport)
    kept = [each for name, each in found.items() if name not in left_out]
    quality = _measured(judge, model, table, kept, config.min_sqnr)
    if quality is not None:
        passport = replace(
            passport, settings={**passport.settings, "quality": settings_of(quality)}
        )
    return QuantizedGraph(save_graph(model, target, passport), placement, quality)
