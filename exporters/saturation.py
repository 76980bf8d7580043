"""Measures how much of each quantised tensor is clipped at the ends of its range.

    u = x / s + z       of QuantizeLinear(x, s, z) to numbers from low to high
    e = max(|u - (low + high) / 2| - (high - low) / 2 - r, 0)

    share = mean [e > 0]
    lost  = sum e^2 / sum (x / s)^2

A value that is rounded to the last number is not clipped: r is half a step there.  ``lost`` is the
noise that clipping adds, relative to the signal: 0.01 are 20 dB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.functions import inlined
from exporters.graphs import load_graph
from exporters.initializers import add_initializer
from exporters.session import OnnxSession
from exporters.tapped import add_tap, serialised
from exporters.typed_graphs import dense

__all__ = ["Saturation", "saturation"]

# The numbers at the ends, and half a step there; see the ONNX specification of QuantizeLinear.
_ENDS = {
    ir.DataType.INT8: (-128, 127, 0.5),
    ir.DataType.UINT8: (0, 255, 0.5),
    ir.DataType.INT16: (-32768, 32767, 0.5),
    ir.DataType.UINT16: (0, 65535, 0.5),
    ir.DataType.INT4: (-8, 7, 0.5),
    ir.DataType.UINT4: (0, 15, 0.5),
    ir.DataType.FLOAT8E4M3FN: (-448, 448, 16),
    ir.DataType.FLOAT8E5M2: (-57344, 57344, 4096),
}
_FLOAT = ir.DataType.FLOAT
# What is measured of each tensor: over a batch, and joined over batches.
_SUMS = ("lost", "signal", "share")


@dataclass(frozen=True)
class Saturation:
    """The clipping of one quantised tensor, named after its Linear; see the module.

    ``share`` of the values and ``lost`` of the signal are from 0 to 1.
    """

    name: str
    share: float
    lost: float


@dataclass(frozen=True)
class _Site:
    """A QuantizeLinear of an activation: its constants, and the numbers at its ends."""

    name: str
    value: ir.Value
    scale: NDArray[np.float32]
    zero: NDArray[np.float32]
    ends: tuple[float, float, float]


def saturation(path: Path, images: NDArray[Any]) -> list[Saturation]:
    """Measure the quantised activations of a graph on ``images`` (N, ...), which match its input.

    The list is in graph order; it is empty if nothing is quantised with constant scales.  Images
    run in small batches, and only sums leave the graph.

    Raises:
        GraphError, FileError: the graph cannot be read or run.
    """
    model = load_graph(path, lambda proto: inlined(dense(proto)))
    sites = list(_sites(model.graph))
    if not sites or not len(images):
        return []
    for number, site in enumerate(sites):
        _tap(model, number, site)
    session = OnnxSession(
        serialised(model), name=str(path), lean=True, optimise=False, fp8=True, in_order=True
    )
    return _joined(sites, session.run_all(images), session.batch)


def _sites(graph: ir.Graph) -> Iterator[_Site]:
    for node in graph:
        if node.op_type != "QuantizeLinear" or (value := node.inputs[0]) is None:
            continue
        scale, zero = (_constant(node, index) for index in (1, 2))
        ends = _ENDS.get(_stored(node, zero))
        if ends is None or scale is None or ir.convenience.get_const_tensor(value) is not None:
            continue
        zeros = np.zeros(()) if zero is None else zero.numpy()
        yield _Site(_name(node), value, _along(node, scale.numpy()), _along(node, zeros), ends)


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else ir.convenience.get_const_tensor(value)


def _stored(node: ir.Node, zero: ir.TensorProtocol | None) -> ir.DataType:
    """The type of a QuantizeLinear's result: that of its zero point, else its attribute."""
    if zero is not None:
        return zero.dtype
    return ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)


def _along(node: ir.Node, array: NDArray[Any]) -> NDArray[np.float32]:
    """Shape scales (C,) so that they broadcast along the node's axis."""
    array = array.astype(np.float32)
    if array.size == 1:
        return np.asarray(array.reshape(()))
    axis = node.attributes.get_int("axis", 1)
    value = node.inputs[0]
    rank = len(value.shape) if value is not None and value.shape is not None else axis + 1
    behind = rank - 1 - axis if axis >= 0 else -1 - axis
    return array.reshape((-1, *[1] * behind))


def _name(node: ir.Node) -> str:
    """The Linear that a QuantizeLinear belongs to; the tensor's name in foreign graphs."""
    name = node.name or ""
    value = node.inputs[0]
    return name.removesuffix("/Q") if name.endswith("/Q") else str(value.name if value else name)


def _tap(model: ir.Model, number: int, site: _Site) -> None:
    low, high, half_step = site.ends
    constants = {
        "scale": site.scale,
        "centre": (low + high) / 2 - site.zero,
        "reach": np.asarray((high - low) / 2 + half_step),
        "none": np.zeros(()),
    }
    scale, centre, reach, none = (
        add_initializer(model.graph, f"saturation/{number}/{name}", array.astype(np.float32))
        for name, array in constants.items()
    )
    wide = ir.node("Cast", [site.value], {"to": _FLOAT})
    steps = ir.node("Div", [wide.outputs[0], scale])
    moved = ir.node("Sub", [steps.outputs[0], centre])
    size = ir.node("Abs", [moved.outputs[0]])
    beyond = ir.node("Sub", [size.outputs[0], reach])
    excess = ir.node("Relu", [beyond.outputs[0]])
    over = excess.outputs[0]
    clipped = ir.node("Greater", [over, none])
    counted = ir.node("Cast", [clipped.outputs[0]], {"to": _FLOAT})
    taps = {
        "lost": [wide, steps, moved, size, beyond, excess, _reduced("ReduceSumSquare", over)],
        "signal": [_reduced("ReduceSumSquare", steps.outputs[0])],
        "share": [clipped, counted, _reduced("ReduceMean", counted.outputs[0])],
    }
    for name in _SUMS:
        add_tap(model, f"{name}/{number}", taps[name])


def _reduced(kind: str, value: ir.Value) -> ir.Node:
    return ir.node(kind, [value], {"keepdims": 0})


def _joined(
    sites: list[_Site], batches: Iterable[list[NDArray[np.float32]]], fixed: int | None
) -> list[Saturation]:
    """Join the sums of all batches; a mean counts as often as its batch has images."""
    sums = np.zeros((len(sites), len(_SUMS)))
    ran = 0
    for logits, *found in batches:
        count = fixed or len(logits)
        values = np.asarray(found, np.float64).reshape(len(sites), len(_SUMS))
        sums += values * np.asarray([1, 1, count])
        ran += count
    return [
        Saturation(site.name, share / ran, lost / signal if signal else 0.0)
        for site, (lost, signal, share) in zip(sites, sums.tolist(), strict=True)
    ]
