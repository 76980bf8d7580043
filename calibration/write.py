"""Writes QuantizeLinear and DequantizeLinear pairs into a graph.

    x ── Q(s_x) ── DQ(s_x) ──┐
                             MatMul ── Add(bias)                    "channel"
    W ─────────── DQ(s_w) ───┘

    x ── Q(s_x) ── DQ(s_x) ──┐
                             MatMul ── Mul(s_w / s) ── Add(bias)    "ratio"
    W ─────────── DQ(s) ─────┘

    x ── Q(s_x) ── DQ(s_x) ──┐
                             MatMul ── Add(bias)                    "tensor"
    W ─────────── DQ(s) ─────┘

A weight has a scale s_w for each output channel, in one of two forms, or one for all of them.
TensorRT's INT8 kernels accept all forms.  TensorRT-RTX (1.5 to 1.7) multiplies a GEMM's sums by one
scale only: with several it writes the raw sums as float16, which overflow at 65504.  The ratio form
has one scale, s = max s_w, and a Mul by the ratios, which TensorRT-RTX fuses with the Add.
"channel" and "ratio" hold the same numbers.

INT8 has two dialects with the same integers.  TensorRT requires int8 with a zero point of zero, so
a Sub shifts inputs with asymmetric levels first.  ONNX Runtime's CPU kernels are fastest on uint8,
whose zero point replaces the Sub.  Biases stay floating point, because TensorRT-RTX refuses an
int32 DequantizeLinear.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.formats import INT8, NumberFormat
from clipdeploy.core.passport import ScaleForm
from exporters.initializers import add_initializer, own_initializer, remove_unused

__all__ = ["QdqWriter", "ratio_name"]

_MIDDLE = 128


def ratio_name(linear: str) -> str:
    """The name of the node that multiplies a Linear's output by the ratios of its scales."""
    return f"{linear}/ratio"


class QdqWriter:
    """Writes Q/DQ pairs into ``graph``; ``unsigned`` selects the dialect of ONNX Runtime's CPU.

    ``scales``: the form of the weight scales.  ``number_format``: of all tensors.

    With a ``zero`` level other than 0, the int8 dialect subtracts step * zero from the node's
    input; the caller must compensate for it in the bias.
    """

    def __init__(
        self,
        graph: ir.Graph,
        *,
        unsigned: bool,
        scales: ScaleForm = "channel",
        number_format: NumberFormat = INT8,
    ) -> None:
        self._graph = graph
        self.unsigned = unsigned
        self._scales = scales
        self._format = number_format

    @staticmethod
    def _node(
        op: str, name: str, inputs: list[ir.Value], dtype: ir.DataType, like: ir.Value, axis: int
    ) -> ir.Node:
        attributes = {} if axis < 0 else {"axis": axis}
        node = ir.node(op, inputs, attributes, name=name)
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(dtype)
        node.outputs[0].shape = like.shape
        return node

    def activation(self, node: ir.Node, index: int, name: str, step: float, zero: int = 0) -> None:
        """Quantise input ``index`` of ``node`` as step * (q + zero), q a number of the format."""
        value = node.inputs[index]
        assert value is not None
        nodes = []
        kind = np.dtype(np.uint8) if self.unsigned else self._format.dtype
        point = _MIDDLE - zero if self.unsigned else 0
        if zero and not self.unsigned:
            shift = add_initializer(
                self._graph, f"{name}.input_shift", np.asarray(step * zero, np.float32)
            )
            nodes.append(
                self._node("Sub", f"{name}/Sub", [value, shift], ir.DataType.FLOAT, value, -1)
            )
        source = nodes[0].outputs[0] if nodes else value
        scale = add_initializer(self._graph, f"{name}.input_scale", np.asarray(step, np.float32))
        zero_point = add_initializer(
            self._graph, f"{name}.input_zero_point", np.asarray(point, kind)
        )
        stored = ir.DataType.UINT8 if self.unsigned else self._format.onnx_type
        q = self._node(
            "QuantizeLinear", f"{name}/Q", [source, scale, zero_point], stored, value, -1
        )
        dq = self._node(
            "DequantizeLinear",
            f"{name}/DQ",
            [q.outputs[0], scale, zero_point],
            ir.DataType.FLOAT,
            value,
            -1,
        )
        self._graph.insert_before(node, [*nodes, q, dq])
        node.replace_input_with(index, dq.outputs[0])

    def weight(
        self,
        node: ir.Node,
        name: str,
        numbers: NDArray[Any],
        scale: NDArray[np.float32],
        axis: int,
    ) -> None:
        """Replace the weight, input 1, by numbers of its shape and scales (C,) along ``axis``.

        In the ratio form a bias of the node, input 2, becomes an Add of its own.
        """
        value = own_initializer(node, 1)
        if self._scales != "channel":
            largest = scale.max()
            if self._scales == "ratio":
                self._multiply_output(node, name, scale / largest)
            scale, axis = np.asarray(largest, np.float32), -1
        stored = add_initializer(self._graph, f"{value.name}/{self._format.name}", numbers)
        scales = add_initializer(self._graph, f"{value.name}/scale", scale)
        inputs = [stored, scales]
        if self.unsigned:
            # ONNX Runtime's exact kernels (session.x64quantprecision) need a zero point.
            zeros = np.zeros(scale.shape, np.int8)
            inputs.append(add_initializer(self._graph, f"{value.name}/zero_point", zeros))
        dq = self._node(
            "DequantizeLinear",
            f"{name}/weight_DQ",
            inputs,
            ir.DataType.FLOAT,
            value,
            axis,
        )
        self._graph.insert_before(node, dq)
        node.replace_input_with(1, dq.outputs[0])
        remove_unused(self._graph)

    def _multiply_output(self, node: ir.Node, name: str, ratio: NDArray[np.float32]) -> None:
        """Multiply each output channel of ``node`` by its ``ratio`` (C,), before its bias.

        The product, with its bias, takes over the name of the output and everything that reads it.
        """
        output = node.outputs[0]
        # A convolution has its channels before height and width.
        per_channel = (-1, 1, 1) if node.op_type == "Conv" else (-1,)
        constant = add_initializer(self._graph, f"{name}.weight_ratio", ratio.reshape(per_channel))
        new = [
            self._node("Mul", ratio_name(name), [output, constant], ir.DataType.FLOAT, output, -1)
        ]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            assert bias.const_value is not None
            added = add_initializer(
                self._graph, f"{name}.ratio_bias", bias.const_value.numpy().reshape(per_channel)
            )
            inputs = [new[0].outputs[0], added]
            new.append(
                self._node("Add", f"{name}/ratio_bias", inputs, ir.DataType.FLOAT, output, -1)
            )
            node.resize_inputs(2)
        last = new[-1].outputs[0]
        ir.convenience.replace_all_uses_with(output, last, replace_graph_outputs=True)
        new[0].replace_input_with(0, output)
        output.name, last.name = f"{output.name}/unscaled", output.name
        self._graph.insert_after(node, new)
