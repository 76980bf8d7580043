"""Measures the input of Linears: max |x| of each channel, and the share outside its range.

Both are reduced inside the graph, so that no activation is copied out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto

from clipdeploy.tuning.segments import GraphSource
from exporters.initializers import add_initializer
from exporters.session import OnnxSession
from exporters.tapped import add_tap, free_batch, serialised

__all__ = ["InputMeter", "InputPeaks", "Tap", "find_tap"]

_FIRST_WITH_AXES_INPUT = 18
_RANGES = {
    int(TensorProto.INT8): (-128, 127),
    int(TensorProto.UINT8): (0, 255),
    int(TensorProto.FLOAT8E4M3FN): (-448, 448),
}


@dataclass(frozen=True)
class Tap:
    """The input tensor of a Linear before quantisation, and the range of its 8 bits.

    The range is infinite if the input is not quantised.
    """

    name: str
    tensor: str
    low: float = -np.inf
    high: float = np.inf


@dataclass(frozen=True)
class InputPeaks:
    """Statistics of a Linear's input.

    ``peaks`` (C,): max |x| of each channel.  ``clipped``: share of values outside the range.
    ``limit``: the larger end of the range, infinite without quantisation.
    """

    peaks: NDArray[np.float32]
    clipped: float
    limit: float


def find_tap(source: GraphSource, name: str) -> Tap:
    """Find the input tensor and range of the Linear ``name``.

    Raises:
        GraphError: the graph has no such Linear.
    """
    tensor = source.product(name)[0].input[0]
    node = source.producer(tensor)
    if node is None or node.op_type != "DequantizeLinear":
        return Tap(name, tensor)
    quantize = source.need(node.input[0])
    scale = source.constant(quantize.input[1])
    if scale is None or quantize.op_type != "QuantizeLinear":
        return Tap(name, quantize.input[0])
    kind, zero = int(TensorProto.INT8), 0.0
    if len(quantize.input) > 2 and quantize.input[2]:
        kind = source.type_of(quantize.input[2])
        point = source.constant(quantize.input[2])
        zero = 0.0 if point is None else float(np.ravel(point)[0])
    low, high = _RANGES.get(kind, (-np.inf, np.inf))
    step = float(np.ravel(scale)[0])
    tensor, shift = _before_shift(source, quantize.input[0])
    return Tap(name, tensor, step * (low - zero) + shift, step * (high - zero) + shift)


def _before_shift(source: GraphSource, tensor: str) -> tuple[str, float]:
    """The input and constant of the Sub that shifts a one-sided tensor; 0.0 without a Sub."""
    node = source.producer(tensor)
    shift = source.constant(node.input[1]) if node is not None and node.op_type == "Sub" else None
    if node is None or shift is None or shift.size != 1:
        return tensor, 0.0
    return node.input[0], float(np.ravel(shift)[0])


class InputMeter:
    """Runs a graph on images and accumulates statistics of the inputs of its Linears."""

    def __init__(self, source: GraphSource, taps: Sequence[Tap], threads: int = 0) -> None:
        self._taps = tuple(taps)
        self._session = OnnxSession(
            _tapped(source, self._taps),
            name=source.name,
            exact_int8=source.unsigned,
            fp8=source.fp8,
            threads=threads,
        )
        self._peaks: list[NDArray[np.float32]] = []
        self._clipped = np.zeros(len(self._taps))
        self._images = 0

    def add(self, images: NDArray[np.float32]) -> None:
        """Run one batch of images (B, ...) in the graph's input format."""
        found = self._session.run(images, outputs=[_output(i) for i in range(2 * len(self._taps))])
        peaks = found[::2]
        if self._peaks:
            peaks = [np.maximum(old, new) for old, new in zip(self._peaks, peaks, strict=True)]
        self._peaks = peaks
        self._clipped += len(images) * np.asarray([float(share) for share in found[1::2]])
        self._images += len(images)

    def result(self) -> dict[str, InputPeaks]:
        """The statistics so far, by the name of the Linear."""
        shares = self._clipped / max(self._images, 1)
        return {
            tap.name: InputPeaks(peaks, float(share), max(-tap.low, tap.high))
            for tap, peaks, share in zip(self._taps, self._peaks, shares, strict=True)
        }


def _output(index: int) -> str:
    return f"tap/{index}"


def _tapped(source: GraphSource, taps: Sequence[Tap]) -> bytes:
    """The graph with two outputs for each tap: the peaks (C,) and the clipped share ()."""
    model = ir.from_proto(source.model)
    free_batch(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    axes = add_initializer(model.graph, "tap/axes", np.asarray([0, 1], np.int64))
    for index, tap in enumerate(taps):
        peak, share = _output(2 * index), _output(2 * index + 1)
        low = add_initializer(model.graph, f"{peak}/low", np.asarray(tap.low, np.float32))
        high = add_initializer(model.graph, f"{peak}/high", np.asarray(tap.high, np.float32))
        wide = _cast(values[tap.tensor])
        size = ir.node("Abs", wide.outputs)
        under = ir.node("Less", [wide.outputs[0], low])
        over = ir.node("Greater", [wide.outputs[0], high])
        out = ir.node("Or", [under.outputs[0], over.outputs[0]])
        ones = _cast(out.outputs[0])
        add_tap(model, peak, [wide, size, _channel_max(size.outputs[0], axes, source.opset)])
        mean = ir.node("ReduceMean", ones.outputs, {"keepdims": 0})
        add_tap(model, share, [under, over, out, ones, mean])
    return serialised(model)


def _cast(value: ir.Value) -> ir.Node:
    return ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value})


def _channel_max(value: ir.Value, axes: ir.Value, opset: int) -> ir.Node:
    if opset < _FIRST_WITH_AXES_INPUT:
        return ir.node("ReduceMax", [value], {"axes": [0, 1], "keepdims": 0})
    return ir.node("ReduceMax", [value, axes], {"keepdims": 0})
