"""Moves activation outliers into the weights, without changing outputs or adding nodes.

It serves INT8, whose error is the same for large and small values.  FP8's error is relative to each
value, so scaling a channel changes nothing.

A Linear y = x W + b with its input shifted and scaled per channel gives the same y:

    x' = (x - m) / s,    W' = diag(s) W,    b' = b + m W

Both are applied where x is computed (SmoothQuant, Xiao et al. 2022; the shift: Outlier
Suppression+, Wei et al. 2023):

    qkv, fc1   x = LayerNorm(r) gamma + beta:      gamma' = gamma / s,  beta' = (beta - m) / s
    proj       x = softmax(..) V, where rows of softmax sum to one:
               columns of V in qkv:  W_v' = W_v / s,  b_v' = (b_v - m) / s

fc2 reads GELU's output, and GELU does not commute with a shift or scale: they are two nodes behind
it, Sub and Mul, which TensorRT-RTX computes in GELU's own kernel.  :func:`fold_gelu` adds them.

A common factor k of all channels is free: s k instead of s leaves both errors unchanged.  k is 1
unless the result exceeds float16: it loses scales below its smallest normal number and steps above
its largest, which occurs if, say, a norm's gain is 10^4 times larger and the next weight 10^4 times
smaller, for the same function.  k then brings x' and W' to the same size.

m is the middle of each channel's range.  s is a[c] ** t / w[c] ** (1 - t), with a[c] half the
channel's range, w[c] its largest weight, and the t from 0 to 1 with the least expected squared
error of y:

    (R / 127) ** 2 / 12  sum_c |W'[c, :]| ** 2 / 4                 input, R = max_c a[c] / s[c]
    sum_j (max_c |W'[c, j]| / 127) ** 2 / 12  sum_c var(x'[c])     weight
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.distribution import Distribution
from calibration.formats import INT8
from calibration.policy import LinearSite
from exporters.initializers import add_initializer, values_of, write_initializer

__all__ = ["Folding", "Source", "find_source", "fold", "fold_gelu", "search_folding"]

F64 = NDArray[np.float64]

# A weight's error is the same for all tokens and adds up; the input's differs by token and averages
# out in attention. Of shares 1, 0.3, 0.1, 0.03 and 0 the demo model's logits were best at 0.1 (by
# 1.6 dB over 1), ViT-B/16's with random weights at 0.3 (by 0.3 dB): a quarter suits both.
_INPUT_SHARE = 0.25
_STRENGTHS = np.linspace(0.0, 1.0, 21)
# Bounds of a tensor's largest value so that float16 holds its steps: a channel's step may be a
# sixteenth of the largest channel's, and there is a margin of 16 to float16's largest number.
_SMALLEST = 16 * INT8.largest * float(np.finfo(np.float16).tiny)
_LARGEST = float(np.finfo(np.float16).max) / 16
# Lower limit of a channel's range relative to the widest channel's.
_NARROWEST = 1e-4


@dataclass(frozen=True)
class Folding:
    """x' = (x - shift) / scale per channel, both (C,); ``strength`` is t, None without scaling."""

    shift: F64
    scale: F64
    strength: float | None = None

    @classmethod
    def none(cls, channels: int) -> Folding:
        """The identity folding of ``channels`` channels."""
        return cls(np.zeros(channels), np.ones(channels))


@dataclass(frozen=True)
class Source:
    """The per-channel gain and offset that produce a Linear's input, each an input of a node.

    The channels are along the last axis of ``gain``, from column ``first`` on.
    """

    gain_at: tuple[ir.Node, int]
    offset_at: tuple[ir.Node, int]
    first: int = 0

    @property
    def gain(self) -> ir.Value:
        """The current gain."""
        return _at(*self.gain_at)

    @property
    def offset(self) -> ir.Value:
        """The current offset (C,)."""
        return _at(*self.offset_at)


def _at(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _expected_error(
    spread: F64, variance: F64, squares: F64, magnitudes: NDArray[np.float32], scale: F64
) -> float:
    step = float((spread / scale).max()) / INT8.largest
    activations = step**2 / 12 * float((squares * scale**2).sum())
    largest = (magnitudes * scale[:, None].astype(np.float32)).max(axis=0).astype(np.float64)
    weights = float(((largest / INT8.largest) ** 2).sum()) / 12 * float((variance / scale**2).sum())
    return _INPUT_SHARE * activations + weights


def search_folding(
    values: Distribution, weight: NDArray[np.float32], strength: float | None = None
) -> Folding:
    """Choose shift and scale of a Linear's input from its distribution and weight (C, Cout).

    ``strength``: t, None to use the t with the least expected error.
    """
    shift = (values.smallest + values.largest) / 2
    spread = (values.largest - values.smallest) / 2
    spread = np.maximum(spread, max(float(spread.max()) * _NARROWEST, 1e-12))
    # Identical images show the middle of each range, but not its width.
    varies = float(spread.max()) > _NARROWEST * float(np.abs(shift).max())
    magnitudes = np.abs(weight)
    top = magnitudes.max(axis=1).astype(np.float64)
    top = np.maximum(top, max(float(top.max()) * _NARROWEST, 1e-12))
    squares = np.einsum("ij,ij->i", weight, weight).astype(np.float64)
    variance = values.variance()

    def error(scale: F64) -> float:
        return _expected_error(spread, variance, squares, magnitudes, scale)

    def folding(strength: float) -> Folding:
        scale = spread**strength / top ** (1 - strength)
        scale /= np.exp(np.log(scale).mean())
        factor = _common_factor(spread / scale, top * scale) if varies else 1.0
        return Folding(shift, scale * factor, strength)

    if strength is not None:
        return folding(strength)
    ones = np.full_like(shift, _common_factor(spread, top) if varies else 1.0)
    best, least = Folding(shift, ones), error(ones)
    for candidate in map(folding, _STRENGTHS.tolist()):
        if (found := error(candidate.scale)) < least:
            best, least = candidate, found
    return best


def _common_factor(spread: F64, top: F64) -> float:
    """A power of two k for which float16 holds the steps of x' / k and of k W'.

    ``spread`` (C,) is half of each channel's range, ``top`` (C,) its largest weight.
    """
    activations, weights = float(spread.max()), float(top.max())
    if all(_SMALLEST <= size <= _LARGEST for size in (activations, weights)):
        return 1.0
    # A power of two changes only exponents: the integers equal those for k = 1.
    return float(2.0 ** np.rint(np.log2(activations / weights) / 2))


def _layernorm(value: ir.Value) -> Source | None:
    node = value.producer()
    if node is None or node.op_type != "LayerNormalization" or len(node.inputs) < 3:
        return None
    if not _reduces_channels(node):
        return None
    constants = [each is not None and each.const_value is not None for each in node.inputs[1:3]]
    if not all(constants) or len(value.consumers()) != 1:
        return None
    return Source((node, 1), (node, 2))


def _reduces_channels(node: ir.Node) -> bool:
    """Whether a LayerNormalization or Softmax reduces the last axis, as by default."""
    rank = len(node.outputs[0].shape or ())
    return node.attributes.get_int("axis", -1) in (-1, rank - 1)


def _step(value: ir.Value | None, kind: str, index: int = 0) -> ir.Value | None:
    node = value.producer() if value is not None else None
    return node.inputs[index] if node is not None and node.op_type == kind else None


def _values(proj: LinearSite, qkv: LinearSite) -> Source | None:
    mixed = _step(_step(proj.activation, "Reshape"), "Transpose")
    v = _step(mixed, "MatMul", 1)
    rows = _step(mixed, "MatMul")
    softmax = rows.producer() if rows is not None else None
    # The shift is exact because each row of softmax sums to one.
    if softmax is None or softmax.op_type != "Softmax" or not _reduces_channels(softmax):
        return None
    split = v.producer() if v is not None else None
    if split is None or split.op_type != "Split" or v is not split.outputs[2]:
        return None
    joined = _step(_step(_step(split.outputs[2], "Split"), "Transpose"), "Reshape")
    bias = qkv.bias
    if (
        qkv.add is None
        or bias is None
        or bias.const_value is None
        or _step(joined, "Add") is not qkv.matmul.outputs[0]
    ):
        return None
    return Source((qkv.matmul, 1), (qkv.add, 1), 2 * bias.const_value.size // 3)


def find_source(site: LinearSite, sites: dict[str, LinearSite]) -> Source | None:
    """The source into which the folding of ``site`` can be written; None without one."""
    if site.role in ("attn.qkv", "mlp.fc1"):
        return _layernorm(site.activation)
    qkv = sites.get(f"blocks.{site.block}.attn.qkv")
    return _values(site, qkv) if site.role == "attn.proj" and qkv is not None else None


def fold(site: LinearSite, source: Source, folding: Folding) -> None:
    """Write ``folding`` into the graph; the model's outputs stay the same."""
    assert site.add is not None
    gain, offset, weight, bias = (
        values_of(value).astype(np.float64)
        for value in (source.gain, source.offset, site.weight, site.bias)
    )
    columns = slice(source.first, source.first + len(folding.shift))
    gain[..., columns] /= folding.scale
    offset[columns] = (offset[columns] - folding.shift) / folding.scale
    write_initializer(*source.gain_at, gain.astype(np.float32))
    write_initializer(*source.offset_at, offset.astype(np.float32))
    bias += folding.shift @ weight
    write_initializer(site.add, 1, bias.astype(np.float32))
    write_initializer(site.matmul, 1, (folding.scale[:, None] * weight).astype(np.float32))


def fold_gelu(site: LinearSite, folding: Folding) -> None:
    """Write ``folding`` into two nodes before fc2 and into fc2; the outputs stay the same."""
    graph, value = site.matmul.graph, site.matmul.inputs[0]
    assert isinstance(graph, ir.Graph)
    assert value is not None
    assert site.add is not None
    weight, bias = (values_of(each).astype(np.float64) for each in (site.weight, site.bias))
    for op, array in (("Sub", folding.shift), ("Mul", 1 / folding.scale)):
        constant = add_initializer(graph, f"{site.name}.input_{op}", array.astype(np.float32))
        node = ir.node(op, [value, constant], name=f"{site.name}/{op}")
        node.outputs[0].name = node.name
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        graph.insert_before(site.matmul, node)
        value = node.outputs[0]
    site.matmul.replace_input_with(0, value)
    write_initializer(site.add, 1, (bias + folding.shift @ weight).astype(np.float32))
    write_initializer(site.matmul, 1, (folding.scale[:, None] * weight).astype(np.float32))
