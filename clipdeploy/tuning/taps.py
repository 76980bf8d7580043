"""What a Linear really reads: the largest |x| of each channel, and how much its range cuts off.

Both are reduced inside the graph, so that no activation is copied out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from clipdeploy.core.passport import BATCH_AXIS
from clipdeploy.tuning.segments import GraphSource
from exporters.session import OnnxSession

__all__ = ["InputMeter", "InputPeaks", "Tap", "find_tap"]

_FIRST_WITH_AXES_INPUT = 18
_INTEGERS = {int(TensorProto.INT8): (-128, 127), int(TensorProto.UINT8): (0, 255)}


@dataclass(frozen=True)
class Tap:
    """The tensor that a Linear reads before it is quantised, and the range of its levels.

    Without quantisation the range is infinite.
    """

    name: str
    tensor: str
    low: float = -np.inf
    high: float = np.inf


@dataclass(frozen=True)
class InputPeaks:
    """``peaks`` (C,): each channel's largest |x|; ``clipped``: the share of values out of range."""

    peaks: NDArray[np.float32]
    clipped: float
    limit: float


def find_tap(source: GraphSource, name: str) -> Tap:
    """The tap of the Linear ``name``.

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
    low, high = _INTEGERS.get(kind, (-np.inf, np.inf))
    step = float(np.ravel(scale)[0])
    tensor, shift = _before_shift(source, quantize.input[0])
    return Tap(name, tensor, step * (low - zero) + shift, step * (high - zero) + shift)


def _before_shift(source: GraphSource, tensor: str) -> tuple[str, float]:
    """The tensor in front of the Sub that moves a one-sided input, and by how much it does."""
    node = source.producer(tensor)
    shift = source.constant(node.input[1]) if node is not None and node.op_type == "Sub" else None
    if node is None or shift is None or shift.size != 1:
        return tensor, 0.0
    return node.input[0], float(np.ravel(shift)[0])


class InputMeter:
    """Runs a graph and keeps what its Linears read, over all images."""

    def __init__(self, source: GraphSource, taps: Sequence[Tap], threads: int = 0) -> None:
        self._taps = tuple(taps)
        self._session = OnnxSession(
            _tapped(source, self._taps),
            name=source.name,
            exact_int8=source.unsigned,
            threads=threads,
        )
        self._peaks: list[NDArray[np.float32]] = []
        self._clipped = np.zeros(len(self._taps))
        self._images = 0

    def add(self, images: NDArray[np.float32]) -> None:
        """Run one batch of images (B, ...) as the graph takes them."""
        found = self._session.run(images, outputs=[_output(i) for i in range(2 * len(self._taps))])
        peaks = found[::2]
        if self._peaks:
            peaks = [np.maximum(old, new) for old, new in zip(self._peaks, peaks, strict=True)]
        self._peaks = peaks
        self._clipped += len(images) * np.asarray([float(share) for share in found[1::2]])
        self._images += len(images)

    def result(self) -> dict[str, InputPeaks]:
        """By the names of the taps."""
        shares = self._clipped / max(self._images, 1)
        return {
            tap.name: InputPeaks(peaks, float(share), max(-tap.low, tap.high))
            for tap, peaks, share in zip(self._taps, self._peaks, shares, strict=True)
        }


def _output(index: int) -> str:
    return f"tap/{index}"


def _tapped(source: GraphSource, taps: Sequence[Tap]) -> bytes:
    model = ModelProto()
    model.CopyFrom(source.model)
    graph = model.graph
    # Any number of images, also through a graph that was exported for a fixed batch.
    for value in (graph.input[0], graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH_AXIS
    del graph.value_info[:]
    axes = numpy_helper.from_array(np.asarray([0, 1], np.int64), "tap/axes")
    graph.initializer.append(axes)
    for index, tap in enumerate(taps):
        peak, share = _output(2 * index), _output(2 * index + 1)
        low = numpy_helper.from_array(np.asarray(tap.low, np.float32), f"{peak}/low")
        high = numpy_helper.from_array(np.asarray(tap.high, np.float32), f"{peak}/high")
        graph.initializer.extend([low, high])
        wide, size, under, over, out, ones = (f"{peak}/{i}" for i in range(6))
        graph.node.extend(
            [
                helper.make_node("Cast", [tap.tensor], [wide], to=TensorProto.FLOAT),
                helper.make_node("Abs", [wide], [size]),
                _reduce("ReduceMax", size, peak, source.opset, per_channel=True),
                helper.make_node("Less", [wide, low.name], [under]),
                helper.make_node("Greater", [wide, high.name], [over]),
                helper.make_node("Or", [under, over], [out]),
                helper.make_node("Cast", [out], [ones], to=TensorProto.FLOAT),
                _reduce("ReduceMean", ones, share, source.opset, per_channel=False),
            ]
        )
        graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (peak, share)
        )
    return bytes(model.SerializeToString())


def _reduce(op: str, value: str, output: str, opset: int, *, per_channel: bool) -> NodeProto:
    if not per_channel:
        return helper.make_node(op, [value], [output], keepdims=0)
    if opset < _FIRST_WITH_AXES_INPUT:
        return helper.make_node(op, [value], [output], axes=[0, 1], keepdims=0)
    return helper.make_node(op, [value, "tap/axes"], [output], keepdims=0)
