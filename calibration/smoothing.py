"""Move activation outliers into the weights, exactly and without a node more.

A Linear y = x W + b whose input was shifted and scaled per channel gives the same y:

    x' = (x - m) / s,    W' = diag(s) W,    b' = b + m W

and both can be had where x is made (SmoothQuant, Xiao et al. 2022; the shift: Outlier
Suppression+, Wei et al. 2023):

    qkv, fc1   x = LayerNorm(r) gamma + beta:      gamma' = gamma / s,  beta' = (beta - m) / s
    proj       x = softmax(..) V, rows of softmax sum to one:
               columns of V in qkv:  W_v' = W_v / s,  b_v' = (b_v - m) / s

fc2 reads GELU's output, through which nothing can be moved.

A common factor k of all channels is free: s k in the place of s leaves both errors as they are.  It
is 1 unless float16 could not hold what follows: scales below its smallest normal number are lost
(a norm's gain 10^4 times as large and the next weight 10^4 times as small give the same function),
and so is a step above its largest.  Then k brings x' and W' to the same size.

m is the middle of each channel's range.  s is searched among a[c] ** t / w[c] ** (1 - t), a[c] half
the channel's range and w[c] its largest weight, t from 0 to 1, by the expected squared error of y:

    (R / 127) ** 2 / 12  sum_c |W'[c, :]| ** 2 / 4                 input, R = max_c a[c] / s[c]
    sum_j (max_c |W'[c, j]| / 127) ** 2 / 12  sum_c var(x'[c])     weight
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.distribution import LEVELS, Distribution
from calibration.policy import LinearSite
from exporters.initializers import values_of, write_initializer

__all__ = ["Folding", "Source", "find_source", "fold", "search_folding"]

F64 = NDArray[np.float64]

# A weight's error is the same for every token and adds up; the input's is another for each and
# averages out in attention. Of shares 1, 0.3, 0.1, 0.03 and 0 the demo model's logits were best at
# 0.1 (by 1.6 dB over 1), ViT-B/16's with random weights at 0.3 (by 0.3 dB): a quarter suits both.
_INPUT_SHARE = 0.25
_STRENGTHS = np.linspace(0.0, 1.0, 21)
# The largest value of a tensor whose steps float16 holds well: a channel's step may be a sixteenth
# of the largest channel's; and a sixteenth of float16's largest number.
_SMALLEST = 16 * LEVELS * float(np.finfo(np.float16).tiny)
_LARGEST = float(np.finfo(np.float16).max) / 16
# A channel that hardly moves is not blown up by more than this, beside the widest one.
_NARROWEST = 1e-4


@dataclass(frozen=True)
class Folding:
    """x' = (x - shift) / scale per channel, both (C,); ``strength`` is t, None for no scaling."""

    shift: F64
    scale: F64
    strength: float | None = None

    @classmethod
    def none(cls, channels: int) -> Folding:
        """The folding that changes nothing."""
        return cls(np.zeros(channels), np.ones(channels))


@dataclass(frozen=True)
class Source:
    """Where a Linear's input is made: its gain and offset per channel, each an input of a node.

    ``gain`` has the channels along its last axis, in columns ``first`` and following.
    """

    gain_at: tuple[ir.Node, int]
    offset_at: tuple[ir.Node, int]
    first: int = 0

    @property
    def gain(self) -> ir.Value:
        """The gain as it is now."""
        return _at(*self.gain_at)

    @property
    def offset(self) -> ir.Value:
        """The offset (C,) as it is now."""
        return _at(*self.offset_at)


def _at(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _expected_error(
    spread: F64, variance: F64, squares: F64, magnitudes: NDArray[np.float32], scale: F64
) -> float:
    step = float((spread / scale).max()) / LEVELS
    activations = step**2 / 12 * float((squares * scale**2).sum())
    largest = (magnitudes * scale[:, None].astype(np.float32)).max(axis=0).astype(np.float64)
    weights = float(((largest / LEVELS) ** 2).sum()) / 12 * float((variance / scale**2).sum())
    return _INPUT_SHARE * activations + weights


def search_folding(
    values: Distribution, weight: NDArray[np.float32], strength: float | None = None
) -> Folding:
    """The shift and scale of a Linear's input, from its statistics and its weight (C, Cout).

    ``strength``: t, None for the one with the least expected error.
    """
    shift = (values.smallest + values.largest) / 2
    spread = (values.largest - values.smallest) / 2
    spread = np.maximum(spread, max(float(spread.max()) * _NARROWEST, 1e-12))
    # Of identical images nothing is known but the middle.
    moves = float(spread.max()) > _NARROWEST * float(np.abs(shift).max())
    magnitudes = np.abs(weight)
    top = magnitudes.max(axis=1).astype(np.float64)
    top = np.maximum(top, max(float(top.max()) * _NARROWEST, 1e-12))
    squares = np.einsum("ij,ij->i", weight, weight).astype(np.float64)
    variance = np.maximum(values.second_moment() - values.mean**2, 0.0)

    def error(scale: F64) -> float:
        return _expected_error(spread, variance, squares, magnitudes, scale)

    def folding(strength: float) -> Folding:
        scale = spread**strength / top ** (1 - strength)
        scale /= np.exp(np.log(scale).mean())
        factor = _common_factor(spread / scale, top * scale) if moves else 1.0
        return Folding(shift, scale * factor, strength)

    if strength is not None:
        return folding(strength)
    ones = np.full_like(shift, _common_factor(spread, top) if moves else 1.0)
    best, least = Folding(shift, ones), error(ones)
    for candidate in map(folding, _STRENGTHS.tolist()):
        if (found := error(candidate.scale)) < least:
            best, least = candidate, found
    return best


def _common_factor(spread: F64, top: F64) -> float:
    """A power of two k, so that float16 holds the steps of x' / k and of k W'.

    ``spread`` (C,) is half of each channel's range, ``top`` (C,) its largest weight.
    """
    activations, weights = float(spread.max()), float(top.max())
    if all(_SMALLEST <= size <= _LARGEST for size in (activations, weights)):
        return 1.0
    # The exponent alone changes: the integers are those of k = 1 in infinite precision.
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
    """Whether a LayerNormalization or Softmax works along the last axis, which is its default."""
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
    """Where the input of ``site`` is made, if a folding can be moved there; else None."""
    if site.role in ("attn.qkv", "mlp.fc1"):
        return _layernorm(site.activation)
    qkv = sites.get(f"blocks.{site.block}.attn.qkv")
    return _values(site, qkv) if site.role == "attn.proj" and qkv is not None else None


def _array(value: ir.Value) -> F64:
    return values_of(value).astype(np.float64)


def fold(site: LinearSite, source: Source, folding: Folding) -> None:
    """Write ``folding`` into the graph: the function of the model stays the same."""
    assert site.bias is not None
    assert site.add is not None
    gain, offset = _array(source.gain), _array(source.offset)
    columns = slice(source.first, source.first + len(folding.shift))
    gain[..., columns] /= folding.scale
    offset[columns] = (offset[columns] - folding.shift) / folding.scale
    write_initializer(*source.gain_at, gain.astype(np.float32))
    write_initializer(*source.offset_at, offset.astype(np.float32))
    weight = _array(site.weight)
    bias = _array(site.bias) + folding.shift @ weight
    write_initializer(site.add, 1, bias.astype(np.float32))
    write_initializer(site.matmul, 1, (folding.scale[:, None] * weight).astype(np.float32))
