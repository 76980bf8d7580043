"""Writes QuantizeLinear and DequantizeLinear pairs into a graph.

    x ── Q(s_x) ── DQ(s_x) ──┐
                             MatMul ── Add(bias)
    W int8 ────── DQ(s_w) ───┘

There are two dialects with the same integers.  TensorRT requires int8 with a zero point of zero, so
a Sub shifts inputs with asymmetric levels first.  ONNX Runtime's CPU kernels are fastest on uint8,
whose zero point replaces the Sub.  Biases stay floating point, because TensorRT-RTX refuses an
int32 DequantizeLinear.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.initializers import add_initializer, own_initializer

__all__ = ["QdqWriter"]

_MIDDLE = 128


class QdqWriter:
    """Writes Q/DQ pairs into ``graph``; ``unsigned`` selects the dialect of ONNX Runtime's CPU.

    With a ``zero`` level other than 0, the int8 dialect subtracts step * zero from the node's
    input; the caller must compensate for it in the bias.
    """

    def __init__(self, graph: ir.Graph, *, unsigned: bool) -> None:
        self._graph = graph
        self.unsigned = unsigned

    def _constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        return add_initializer(self._graph, name, array)

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
        """Quantise input ``index`` of ``node`` as step * (q + zero), q from -127 to 127."""
        value = node.inputs[index]
        assert value is not None
        nodes = []
        kind: type[np.generic] = np.uint8 if self.unsigned else np.int8
        point = _MIDDLE - zero if self.unsigned else 0
        if zero and not self.unsigned:
            shift = self._constant(f"{name}.input_shift", np.asarray(step * zero, np.float32))
            nodes.append(
                self._node("Sub", f"{name}/Sub", [value, shift], ir.DataType.FLOAT, value, -1)
            )
        source = nodes[0].outputs[0] if nodes else value
        scale = self._constant(f"{name}.input_scale", np.asarray(step, np.float32))
        zero_point = self._constant(f"{name}.input_zero_point", np.asarray(point, kind))
        integer = ir.DataType.UINT8 if self.unsigned else ir.DataType.INT8
        q = self._node(
            "QuantizeLinear", f"{name}/Q", [source, scale, zero_point], integer, value, -1
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
        integers: NDArray[np.int8],
        scale: NDArray[np.float32],
        axis: int,
    ) -> None:
        """Replace the weight, input 1, by int8 of its shape and scales (C,) along ``axis``."""
        value = own_initializer(node, 1)
        stored = self._constant(f"{value.name}/int8", integers)
        scales = self._constant(f"{value.name}/scale", scale)
        inputs = [stored, scales]
        if self.unsigned:
            # ONNX Runtime's exact kernels (session.x64quantprecision) need a zero point.
            zeros = np.zeros(scale.shape, np.int8)
            inputs.append(self._constant(f"{value.name}/zero_point", zeros))
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
        del self._graph.initializers[value.name or ""]
