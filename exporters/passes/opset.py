"""Lower a graph traced at opset 20 to the opset that was asked for.

From 21 to 23 nothing changes for the operators that a classifier uses.  Below 20 there is no Gelu
node, below 18 Pad has no axes and Split no num_outputs, so these become what those opsets have:

    gelu(x) = x (1 + erf(x / sqrt(2))) / 2           Hendrycks and Gimpel 2016, equation 1

with the half folded into the next Linear's weight, where it is exact: halving a float only changes
its exponent.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from exporters.initializers import add_initializer, write_initializer

__all__ = ["TRACED_OPSET", "SetOpset"]

TRACED_OPSET = 20
_FIRST_WITH_GELU = 20
_FIRST_WITH_NUM_OUTPUTS = 18


def _constant(graph: ir.Graph, name: str, number: float) -> ir.Value:
    if name not in graph.initializers:
        add_initializer(graph, name, np.asarray(number, np.float32))
    return graph.initializers[name]


def _halve_next_weight(value: ir.Value) -> bool:
    readers = value.consumers()
    if len(readers) != 1 or readers[0].op_type != "MatMul":
        return False
    weight = readers[0].inputs[1]
    if weight is None or weight.const_value is None:
        return False
    write_initializer(readers[0], 1, weight.const_value.numpy() * np.float32(0.5))
    return True


def _decompose_gelu(graph: ir.Graph, gelu: ir.Node) -> None:
    x, result = gelu.inputs[0], gelu.outputs[0]
    assert x is not None
    scaled = ir.node("Mul", [x, _constant(graph, "gelu/rsqrt2", 1 / math.sqrt(2))])
    erf = ir.node("Erf", [scaled.outputs[0]])
    plus = ir.node("Add", [erf.outputs[0], _constant(graph, "gelu/one", 1.0)])
    product = ir.node("Mul", [x, plus.outputs[0]])
    nodes = [scaled, erf, plus, product]
    if not _halve_next_weight(result):
        half = _constant(graph, "gelu/half", 0.5)
        product = ir.node("Mul", [product.outputs[0], half])
        nodes.append(product)
    for step, node in zip(("scale", "erf", "one", "product", "half"), nodes, strict=False):
        node.name = f"{gelu.name}/{step}"
        node.outputs[0].name = node.name
        node.outputs[0].type, node.outputs[0].shape = result.type, result.shape
    graph.insert_before(gelu, nodes)
    ir.convenience.replace_all_uses_with(result, product.outputs[0])
    graph.remove(gelu, safe=True)
    product.outputs[0].name = result.name


class SetOpset(ir.passes.InPlacePass):
    """See the module's docstring; ``opset`` is 17 to 23."""

    def __init__(self, opset: int) -> None:
        super().__init__()
        self._opset = opset

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change ``model`` in place."""
        graph = model.graph
        for node in list(graph):
            if node.op_type == "Gelu" and self._opset < _FIRST_WITH_GELU:
                _decompose_gelu(graph, node)
            elif node.op_type == "Split" and self._opset < _FIRST_WITH_NUM_OUTPUTS:
                # Equal parts are the default there.
                node.attributes.pop("num_outputs", None)
            elif node.op_type == "Pad" and self._opset < _FIRST_WITH_NUM_OUTPUTS:
                self._spread_pads(graph, node)
        model.graph.opset_imports[""] = self._opset
        return ir.passes.PassResult(model, modified=True)

    @staticmethod
    def _spread_pads(graph: ir.Graph, node: ir.Node) -> None:
        if len(node.inputs) < 4 or node.inputs[3] is None:
            return
        pads, axes = node.inputs[1], node.inputs[3]
        rank = len(node.outputs[0].shape or ())
        assert pads is not None
        assert pads.const_value is not None
        assert axes.const_value is not None
        given, chosen = pads.const_value.numpy(), axes.const_value.numpy()
        full = np.zeros(2 * rank, np.int64)
        for position, axis in enumerate(chosen):
            full[axis] = given[position]
            full[axis + rank] = given[position + len(chosen)]
        write_initializer(node, 1, full)
        node.resize_inputs(3)
