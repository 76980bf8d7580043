"""Cuts a ViT's graph into segments, and finds the coordinates that smoothing gave a candidate.

Segments are the stem (image to the first block's input), each block, and the head.  A block's parts
are its four Linears, each with the LayerNorm or Sub before it, and the nodes between them:

    x ── norm1, qkv ── attention ── proj ── + ── norm2, fc1 ── GELU ── fc2 ── +

Attention is a part with a switch of its own if the candidate quantises its products.

A smoothed candidate computes the same function in other coordinates (:mod:`calibration.smoothing`).
Those of qkv and fc1 stay inside the part.  Those of V pass from qkv's part to proj's:

    v_candidate = (v - m) / s        per channel

s and m follow from both weights.  With W' = diag(s1) W, the reference's qkv weight in the
candidate's coordinates (s1 and m1 are the exact ratios of the two LayerNorms),

    W_candidate[:, v_c] = W'[:, v_c] / s[c]        columns of V in qkv
    P_candidate[c, :]   = s[c] P[c, :]             rows of proj
    m[c] = b[v_c] + m1 W[:, v_c] - s[c] b_candidate[v_c]

Each of the first two is a regression whose regressor has no noise.  The logarithms of the two
estimates are averaged, weighted by inverse variance, so that a damaged weight counts little.  If
the estimates differ by a common factor, one of them has a wrong scale: the estimate with the
geometric mean nearer to 1 is used, because smoothing normalises it to 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.policy import HEAD, PATCH, LinearSite, find_linears
from clipdeploy.core.errors import GraphError
from clipdeploy.engines.roofline import attention_name
from clipdeploy.tuning.segments import Bridge, GraphSource, Part, Segment

__all__ = ["find_bridges", "find_segments", "rest_of", "weight_pair"]

F64 = NDArray[np.float64]
# Two estimates agree if their common factor is below this.
_AGREE = 1.5


def _residual_sum(site: LinearSite) -> str:
    """The sum of a Linear's output and the residual stream."""
    adds = [consumer for consumer in site.output.consumers() if consumer.op_type == "Add"]
    if len(adds) != 1:
        raise GraphError(
            f"{site.output.name} is not added to the residual stream",
            hint="use a graph that `clipdeploy export` wrote",
        )
    return adds[0].outputs[0].name or ""


def rest_of(block: int) -> str:
    """The switch of the nodes between a block's Linears."""
    return f"blocks.{block}.rest"


def find_segments(model: ir.Model, *, attention: bool = False) -> list[Segment]:
    """The segments of an FP32 graph, from its image to its logits.

    With ``attention``, the attention of each block has a switch of its own.

    Raises:
        GraphError: clipdeploy did not export the graph.
    """
    sites = {site.name: site for site in find_linears(model)}
    depth = 1 + max(site.block for site in sites.values())
    border = _stem_output(sites["blocks.0.attn.qkv"])
    image = model.graph.inputs[0].name or ""
    segments = [Segment(PATCH, image, (Part(PATCH, border),))]
    for block in range(depth):
        rest = rest_of(block)
        roles = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        qkv, proj, fc1, fc2 = (sites[f"blocks.{block}.{role}"] for role in roles)
        parts = (
            Part(qkv.name, qkv.output.name or ""),
            Part(attention_name(block) if attention else rest, proj.activation.name or ""),
            Part(proj.name, proj.output.name or ""),
            Part(rest, _residual_sum(proj)),
            Part(fc1.name, fc1.output.name or ""),
            Part(rest, fc2.activation.name or ""),
            Part(fc2.name, fc2.output.name or ""),
            Part(rest, _residual_sum(fc2)),
        )
        segments.append(Segment(f"blocks.{block}", border, parts))
        border = segments[-1].output
    logits = model.graph.outputs[0].name or ""
    return [*segments, Segment(HEAD, border, (Part(HEAD, logits),))]


def _stem_output(qkv: LinearSite) -> str:
    norm = qkv.activation.producer()
    if norm is None or norm.op_type != "LayerNormalization" or norm.inputs[0] is None:
        raise GraphError(
            f"{qkv.name} does not read a LayerNormalization",
            hint="use a graph that `clipdeploy export` wrote",
        )
    return norm.inputs[0].name or ""


def _weight(source: GraphSource, name: str) -> F64:
    """A Linear's weight (Cin, Cout), int8 dequantised."""
    found = source.constant(_matmul(source, name)[1])
    if found is None:
        raise GraphError(f"{name} of {source.name} has no constant weight")
    weight = found.astype(np.float64)
    ratio = source.product(name)[1]
    return weight if ratio is None else weight * ratio


def _matmul(source: GraphSource, name: str) -> list[str]:
    return list(source.product(name)[0].input)


def _bias(source: GraphSource, name: str) -> F64:
    constants = (source.constant(tensor) for tensor in source.need(name).input)
    found = next((array for array in constants if array is not None), None)
    if found is None:
        raise GraphError(f"{name} of {source.name} has no bias")
    return found.astype(np.float64)


def _norm(source: GraphSource, name: str) -> tuple[F64, F64] | None:
    """Gain and offset of the LayerNorm that a Linear reads; None if it reads another node."""
    tensor = _matmul(source, name)[0]
    while (node := source.producer(tensor)) is not None:
        if node.op_type == "LayerNormalization":
            gain, offset = source.constant(node.input[1]), source.constant(node.input[2])
            if gain is None or offset is None:
                return None
            return gain.astype(np.float64), offset.astype(np.float64)
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Cast", "Sub", "Identity"):
            return None
        tensor = node.input[0]
    return None


def input_folding(
    reference: GraphSource, candidate: GraphSource, name: str
) -> tuple[F64, F64] | None:
    """Scale and shift (C,) folded into the LayerNorm before ``name``; None without a LayerNorm."""
    ours, theirs = _norm(candidate, name), _norm(reference, name)
    if ours is None or theirs is None:
        return None
    known = (ours[0] != 0) & (theirs[0] != 0)
    scale = np.where(known, theirs[0] / np.where(known, ours[0], 1.0), 1.0)
    return scale, theirs[1] - ours[1] * scale


def weight_pair(
    reference: GraphSource, candidate: GraphSource, bridges: Mapping[str, Bridge], name: str
) -> tuple[F64, F64]:
    """A Linear's weights (Cin, Cout) in the candidate's coordinates: the expected, the actual.

    ``bridges`` are those of :func:`find_bridges`.

    Raises:
        GraphError: a graph has no such Linear, or its weight is not a constant.
    """
    expected, found = _weight(reference, name), _weight(candidate, name)
    if name.endswith("attn.proj"):
        bridge = bridges.get(_matmul(reference, name)[0])
        return (expected if bridge is None else bridge.scale[:, None] * expected), found
    folded = input_folding(reference, candidate, name)
    if folded is not None:
        expected = folded[0][:, None] * expected
    if name.endswith("attn.qkv") and (bridge := bridges.get(name)) is not None:
        expected = expected / bridge.scale
    return expected, found


def _slopes(regressor: F64, found: F64, axis: int) -> tuple[F64, F64]:
    """found = slope * regressor along ``axis``: slopes, and the variance of their logarithms."""
    power = np.maximum((regressor**2).sum(axis=axis), 1e-30)
    slope = (regressor * found).sum(axis=axis) / power
    rest = found - np.expand_dims(slope, axis) * regressor
    variance = (rest**2).mean(axis=axis) / power
    slope = np.where(slope > 0, slope, np.nan)
    # float16 rounding of a weight is the lowest possible uncertainty.
    return slope, variance / slope**2 + 1e-9


def _join(one: F64, one_var: F64, other: F64, other_var: F64) -> F64:
    """Combine two estimates of log s, (C,) each; NaN marks a missing value."""
    apart = float(np.nanmedian(one - other)) if np.isfinite(one - other).any() else 0.0
    if abs(apart) > np.log(_AGREE):
        if abs(np.nanmean(one)) < abs(np.nanmean(other)):
            other = other + apart
        else:
            one = one - apart
    weights = (
        np.where(np.isfinite(one), 1 / one_var, 0),
        np.where(np.isfinite(other), 1 / other_var, 0),
    )
    total = np.nan_to_num(one) * weights[0] + np.nan_to_num(other) * weights[1]
    joined: F64 = total / np.maximum(weights[0] + weights[1], 1e-30)
    return joined


def _value_bridge(
    reference: GraphSource, candidate: GraphSource, block: int
) -> tuple[Bridge, Bridge]:
    """The bridges of qkv's output and of proj's input."""
    qkv, proj = f"blocks.{block}.attn.qkv", f"blocks.{block}.attn.proj"
    weight, found = _weight(reference, qkv), _weight(candidate, qkv)
    width = weight.shape[1] // 3
    v = slice(2 * width, None)
    folded = input_folding(reference, candidate, qkv)
    scale, shift = folded if folded is not None else (np.ones(len(weight)), np.zeros(len(weight)))
    columns, columns_var = _slopes(scale[:, None] * weight[:, v], found[:, v], axis=0)
    rows, rows_var = _slopes(_weight(reference, proj), _weight(candidate, proj), axis=1)
    s = np.exp(_join(-np.log(columns), columns_var, np.log(rows), rows_var))
    bias = _bias(reference, qkv) + shift @ weight
    m = bias[v] - s * _bias(candidate, qkv)[v]
    ones, zeros = np.ones(2 * width), np.zeros(2 * width)
    whole = Bridge(_f32(ones, s), _f32(zeros, m))
    return whole, Bridge(_f32(s), _f32(m))


def _f32(*parts: F64) -> NDArray[np.float32]:
    return np.concatenate(parts).astype(np.float32)


def find_bridges(
    reference: GraphSource, candidate: GraphSource, segments: list[Segment]
) -> dict[str, Bridge]:
    """Bridges by the name of the tensor that the candidate stores in other coordinates.

    Raises:
        GraphError: a Linear is missing, or its weight is not a constant.
    """
    bridges = {}
    for segment in segments:
        if not segment.name.startswith("blocks."):
            continue
        block = int(segment.name.split(".")[1])
        outputs = [part.output for part in segment.parts]
        bridges[outputs[0]], bridges[outputs[1]] = _value_bridge(reference, candidate, block)
    return bridges
