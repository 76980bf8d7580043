"""Makes the INT8 or FP8 graph from the FP32 graph and its calibration.

:mod:`calibration.policy` selects the nodes, :mod:`calibration.scheme` computes their scales and
weights, :mod:`calibration.write` writes the Q/DQ pairs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.config import QuantizeConfig, stored_settings
from calibration.distribution import Distribution
from calibration.fitting import FEWEST_IMAGES, fit_linears
from calibration.formats import NumberFormat
from calibration.measuring import Setting, measure_settings
from calibration.policy import (
    HEAD,
    PATCH,
    LinearSite,
    Placement,
    find_linears,
    find_node,
    find_products,
    find_sums,
    place,
    qkv_output,
)
from calibration.quality import Judge, Quality, Weakest, check_quality
from calibration.scheme import (
    LinearScheme,
    add_to_bias,
    fold_all,
    fold_all_gelu,
    linear_scheme,
    product_steps,
)
from calibration.smoothing import Folding
from calibration.table import JUDGED_CROPS, CalibrationTable, load_table
from calibration.views import coarse_views, mirrored, other_views
from calibration.weights import quantize_weight
from calibration.write import QdqWriter
from clipdeploy.core.display import Renderable, Shown, stacked
from clipdeploy.core.errors import ArtifactError, CalibrationError, GraphError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import (
    FINDINGS_KEY,
    Passport,
    Preprocess,
    TensorSpec,
    settings_of,
)
from exporters.checks import check_structure
from exporters.graphs import load_graph, save_graph
from exporters.headers import GraphArtifact, graph_sha256, read_passport
from exporters.initializers import values_of
from exporters.overflow import near_limit
from exporters.precision import Fp16Config, half_precision
from exporters.samples import Samples

__all__ = [
    "QuantizedGraph",
    "quantize",
    "smooth",
]

# First opset whose QuantizeLinear and DequantizeLinear take float16 scales.
_FIRST_WITH_HALF_SCALES = 19
# On how many images strengths and ranges are measured: views like the images, and coarse ones.
_SHARP_VIEWS, _COARSE_VIEWS = 12, 6


@dataclass(frozen=True)
class QuantizedGraph(Shown):
    """The quantised graph, its placement, and its quality; None if it was not measured."""

    artifact: GraphArtifact
    placement: Placement
    quality: Quality | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was found about the calibration, and about the quality of the graph."""
        findings = self.artifact.passport.calibration_findings
        quality = () if self.quality is None else self.quality.warnings
        return (*(f"the calibration: {text}" for text in findings), *quality)

    def __rich__(self) -> Renderable:
        return stacked(self.artifact, "", *self.warnings, self.placement)


def smooth(
    model: ir.Model,
    table: CalibrationTable,
    chosen: frozenset[str],
    strength: float | None = None,
    settings: Mapping[str, Setting] = MappingProxyType({}),
) -> dict[str, Folding]:
    """Fold the activation outliers of the chosen Linears into ``model``; its outputs stay the same.

    Raises:
        CalibrationError: the table lacks a Linear.
    """
    sites = find_linears(model)
    statistics = {site.name: table.of(site.name) for site in sites if site.name in chosen}
    return fold_all(sites, statistics, strength, settings)


def _linear_schemes(
    sites: list[LinearSite],
    table: CalibrationTable,
    foldings: dict[str, Folding],
    settings: Mapping[str, Setting],
    config: QuantizeConfig,
) -> dict[str, LinearScheme]:
    """The quantisation of each Linear by the statistics."""
    return {
        site.name: linear_scheme(
            site,
            table.of(site.name),
            foldings.get(site.name),
            config.scheme,
            config.number_format,
            one_scale=config.weight_scales == "tensor",
            part=settings[site.name].part if site.name in settings else None,
        )
        for site in sites
    }


def _kept(schemes: dict[str, LinearScheme], config: QuantizeConfig) -> dict[str, LinearScheme]:
    """The schemes of the Linears that reach ``min_sqnr``."""
    minimum = config.min_sqnr
    return {n: each for n, each in schemes.items() if minimum is None or each.sqnr_db >= minimum}


def _write_linears(
    writer: QdqWriter, sites: list[LinearSite], schemes: dict[str, LinearScheme]
) -> None:
    for site in sites:
        if (scheme := schemes.get(site.name)) is None:
            continue
        if site.bias is not None:
            lost = scheme.shift_output if not writer.unsigned else 0.0
            add_to_bias(site, scheme.correction + lost)
        writer.activation(site.matmul, 0, site.name, scheme.step, scheme.zero)
        writer.weight(site.matmul, site.name, scheme.numbers, scheme.weight_scale, axis=1)


@dataclass(frozen=True)
class _Images:
    """Graph inputs (N, ...) that a calibration stores.

    ``fitted``: to fit weights and biases to, with mirrored and some coarse views of them too.
    ``checks``: others.  ``unseen``: views of the first that the statistics do not include, some of
    low resolution.
    """

    fitted: NDArray[Any]
    checks: NDArray[Any]
    unseen: NDArray[Any]


def _stored_images(table: CalibrationTable, tensor: TensorSpec) -> _Images:
    """The images of ``table``.

    Raises:
        CalibrationError: there are too few.
    """
    fitted, checks = table.fitted(), table.samples()
    if fitted is None or checks is None or len(fitted.crops) < FEWEST_IMAGES:
        needed = JUDGED_CROPS + FEWEST_IMAGES
        raise CalibrationError(
            f"--effort best needs {needed} different calibration images, {JUDGED_CROPS} of them to "
            f"judge the graph; the calibration stores {len(table.crops)}: it is of too few images "
            "or of an earlier clipdeploy",
            hint="clipdeploy calibrate --force --data CALIBRATION_IMAGES, or --effort fast",
        )
    views = [other_views(fitted.crops[:_SHARP_VIEWS]), coarse_views(fitted.crops[-_COARSE_VIEWS:])]
    unseen = Samples(np.concatenate(views), fitted.spec)
    # More tokens: most pictures are as likely as their mirror image, and some are less sharp.
    more = np.concatenate([mirrored(fitted.crops), coarse_views(fitted.crops[::2])])
    every = fitted.concat(Samples(more, fitted.spec))
    inputs = (each.as_input(tensor) for each in (every, checks, unseen))
    return _Images(*inputs)


def _write_products(
    writer: QdqWriter,
    model: ir.Model,
    table: CalibrationTable,
    foldings: dict[str, Folding],
    chosen: frozenset[str],
    number_format: NumberFormat,
) -> None:
    for product in find_products(model):
        if product.name not in chosen:
            continue
        statistics = table.of(qkv_output(f"blocks.{product.block}.attn.qkv"))
        folding = foldings.get(f"blocks.{product.block}.attn.proj")
        steps = product_steps(product.role, statistics, folding, number_format)
        for index, step in enumerate(steps):
            writer.activation(product.node, index, f"{product.name}.{index}", step)


def _write_head(
    writer: QdqWriter, node: ir.Node, table: CalibrationTable, config: QuantizeConfig
) -> None:
    array = values_of(node.inputs[1])
    # With transB, which torch.onnx sets, Gemm's weight is (Cout, Cin), else (Cin, Cout).
    transposed = bool(node.attributes.get_int("transB", 0))
    numbers, scale = _minmax_weight(np.ascontiguousarray(array.T if transposed else array), config)
    amax = Distribution.of(table.of(HEAD)).amax
    writer.activation(node, 0, HEAD, config.number_format.step(amax))
    if transposed:
        numbers = np.ascontiguousarray(numbers.T)
    writer.weight(node, HEAD, numbers, scale, axis=0 if transposed else 1)


def _minmax_weight(
    weight: NDArray[np.float32], config: QuantizeConfig
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    one_scale = config.weight_scales == "tensor"
    return quantize_weight(weight, None, config.number_format, one_scale=one_scale)


def _write_patch(
    writer: QdqWriter, node: ir.Node, spec: Preprocess, config: QuantizeConfig
) -> None:
    kernel = values_of(node.inputs[1])
    numbers, scale = _minmax_weight(np.ascontiguousarray(kernel.reshape(len(kernel), -1).T), config)
    # Pixels are from 0 to 255, so the range is known without calibration.
    mean, std = np.asarray(spec.mean), np.asarray(spec.std)
    amax = float(np.maximum(mean / std, (1 - mean) / std).max())
    writer.activation(node, 0, PATCH, config.number_format.step(amax))
    writer.weight(node, PATCH, numbers.T.reshape(kernel.shape).copy(), scale, axis=0)


@dataclass(frozen=True)
class _Written:
    """The expected SQNR of each Linear, and the Linears that fitting to images did not improve."""

    linears: dict[str, Weakest]
    nearest: tuple[str, ...] = ()


def _write(
    model: ir.Model,
    table: CalibrationTable,
    chosen: frozenset[str],
    config: QuantizeConfig,
    tensor: TensorSpec,
) -> _Written:
    fits = config.effort == "best" and any(site.name in chosen for site in find_linears(model))
    images = _stored_images(table, tensor) if fits else None
    settings: dict[str, Setting] = {}
    if images is not None and config.scheme.searches and config.number_format.even:
        statistics = {s.name: table.of(s.name) for s in find_linears(model) if s.name in chosen}
        gelu = config.scheme.shifts_gelu
        settings = measure_settings(model, statistics, images.unseen, gelu=gelu)
    foldings = _fold(model, table, chosen, settings, config)
    writer = QdqWriter(
        model.graph,
        unsigned=config.remainder == "fp32",
        scales=config.weight_scales or "channel",
        number_format=config.number_format,
    )
    sites = [site for site in find_linears(model) if site.name in chosen]
    schemes = _linear_schemes(sites, table, foldings, settings, config)
    kept = _kept(schemes, config)
    nearest: tuple[str, ...] = ()
    if images is not None and kept:
        correct = config.scheme.correct_bias
        fit = fit_linears(
            model,
            kept,
            images.fitted,
            images.checks,
            config.number_format,
            correct_bias=correct,
        )
        kept, nearest = fit.schemes, fit.nearest
    products = find_products(model)
    _write_linears(writer, sites, kept)
    if any(product.name in chosen for product in products):
        _write_products(writer, model, table, foldings, chosen, config.number_format)
    if HEAD in chosen and (node := find_node(model, HEAD, "Gemm")) is not None:
        _write_head(writer, node, table, config)
    if PATCH in chosen and (node := find_node(model, PATCH, "Conv")) is not None:
        _write_patch(writer, node, table.preprocess, config)
    expected = {n: Weakest(n, each.sqnr_db, each.cause) for n, each in schemes.items()}
    return _Written(expected, nearest)


def _fold(
    model: ir.Model,
    table: CalibrationTable,
    chosen: frozenset[str],
    settings: Mapping[str, Setting],
    config: QuantizeConfig,
) -> dict[str, Folding]:
    scheme = config.scheme
    if not (scheme.smooth and config.number_format.even):
        return {}
    foldings = smooth(model, table, chosen, scheme.strength, settings)
    if config.effort == "best" and scheme.shifts_gelu:
        sites = [site for site in find_linears(model) if site.name in chosen]
        statistics = {site.name: table.of(site.name) for site in sites}
        foldings |= fold_all_gelu(sites, statistics, scheme.strength, settings)
    return foldings


def _write_outputs(
    model: ir.Model, chosen: Iterable[str], judge: Judge, number_format: NumberFormat
) -> None:
    """Quantise the sums of qkv and fc1 to their range on the judge's images."""
    sums = find_sums(model, chosen)
    peaks = judge.peaks_of(model)
    writer = QdqWriter(model.graph, unsigned=False, number_format=number_format)
    for name, value in sums:
        step = number_format.step(peaks[value.name or ""])
        for node, index in list(value.uses()):
            writer.activation(node, index, f"{name}.output", step)


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
            f"a remainder in FP16 needs opset {_FIRST_WITH_HALF_SCALES} or newer, "
            f"{passport.model} was exported with {opset}",
            hint="export again with a newer --opset",
        )


def _left_out(found: dict[str, Weakest], minimum: float | None, label: str) -> dict[str, str]:
    """The Linears below ``minimum`` dB, each with the reason to leave it unquantised.

    Raises:
        CalibrationError: all Linears are below it.
    """
    if minimum is None:
        return {}
    low = {name: each for name, each in found.items() if each.sqnr_db < minimum}
    if low and len(low) == len(found):
        raise CalibrationError(
            f"{label} would leave every Linear below {minimum:g} dB; "
            f"{min(found.values(), key=lambda each: each.sqnr_db)}",
            hint="calibrate with other images, build with --fp16, or give a lower --min-sqnr",
        )
    return {
        name: f"{label} would give it an SQNR of {each.sqnr_db:.1f} dB: {each.cause}"
        for name, each in low.items()
    }


def _stored_findings(table: CalibrationTable) -> dict[str, list[str]]:
    found = [finding.sentence for finding in table.findings]
    return {FINDINGS_KEY: found} if found else {}


def _measured(
    judge: Judge,
    model: ir.Model,
    table: CalibrationTable,
    kept: Collection[Weakest],
    minimum: float | None,
    label: str,
) -> Quality | None:
    """Measure a graph with the quantised Linears ``kept``; None without a ``minimum``.

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
    return replace(quality, warnings=check_quality(quality, table, minimum, label))


def quantize(
    source: Path,
    calibration: Path,
    target: Path,
    samples: Samples,
    config: QuantizeConfig = QuantizeConfig(),
) -> QuantizedGraph:
    """Write the INT8 or FP8 graph of the FP32 graph ``source`` to ``target``.

    The images stored in the calibration and ``samples`` (a few real images) decide which tensors of
    an FP16 remainder stay float32, and the result is measured on them before it is saved.

    Raises:
        ArtifactError: the calibration is damaged, or of another model or preprocessing.
        CalibrationError: the calibration lacks a Linear, or the result is below ``min_sqnr``.
        GraphError: clipdeploy did not export the graph, a tensor overflows, or the result is not
            valid.
        FileError: a file cannot be read or written.
    """
    config = replace(config, weight_scales=config.weight_scales or config.default_scales)
    passport = read_passport(source)
    table = load_table(calibration)
    source_hash = graph_sha256(source)
    _check_table(table, passport, source_hash, calibration)
    model = load_graph(source)
    placement = place(model, config.exclude, config.scope)
    half = config.remainder == "fp16"
    written = _write(model, table, frozenset(placement.quantized), config, passport.input)
    found = written.linears
    label = config.number_format.label
    left_out = _left_out(found, config.min_sqnr, label)
    placement = placement.without(left_out)
    judge = Judge(source, passport.input, table.samples(), samples, half=half)
    if config.scope.outputs:
        _write_outputs(model, placement.quantized, judge, config.number_format)
    keep = near_limit(judge.peaks)
    if half:
        _need_opset(model, passport)
        half_precision(model, Fp16Config(keep))
    passport = replace(
        passport,
        precision=config.precision,
        parents={"source_graph": source_hash, "calibration": sha256_file(calibration)},
        settings={
            **passport.settings,
            **stored_settings(config),
            f"{config.format}_nodes": len(placement.quantized),
            f"{config.format}_left_out": left_out,
            **({"rounded_to_nearest": written.nearest} if written.nearest else {}),
            **_stored_findings(table),
            "keep_fp32": list(keep),
        },
    )
    check_structure(model, passport)
    kept = [each for name, each in found.items() if name not in left_out]
    quality = _measured(judge, model, table, kept, config.min_sqnr, label)
    if quality is not None:
        passport = replace(
            passport, settings={**passport.settings, "quality": settings_of(quality)}
        )
    return QuantizedGraph(save_graph(model, target, passport), placement, quality)
