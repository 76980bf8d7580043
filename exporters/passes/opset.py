"""Converts a graph traced at opset 20 to another opset, 17 to 23.

For the operators of a classifier, opsets 21 to 23 are equal to 20.  Gelu does not exist below 20,
and below 18 Pad has no axes input and Split no num_outputs.  They are replaced; Gelu by

    gelu(x) = x (1 + erf(x / sqrt(2))) / 2                             approximate = "none"
    gelu(x) = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2        approximate = "tanh"

(Hendrycks and Gimpel 2016, section 2; ONNX operators, Gelu-20).  The factor 1/2 is folded into the
weight of the next Linear if there is one: halving a float changes only its exponent.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from clipdeploy.core.errors import GraphError
from exporters.initializers import (
    add_initializer,
    shared_initializer,
    values_of,
    write_initializer,
)

__all__ = ["TRACED_OPSET", "SetOpset"]

TRACED_OPSET = 20
_FIRST_WITH_GELU = 20
_FIRST_WITH_NUM_OUTPUTS = 18


def _constant(graph: ir.Graph, name: str, number: float) -> ir.Value:
    return shared_initializer(graph, name, np.asarray(number, np.float32))


def _halve_next_weight(value: ir.Value) -> bool:
    readers = value.consumers()
    if len(readers) != 1 or readers[0].op_type != "MatMul":
        return False
    weight = readers[0].inputs[1]
    if weight is None or weight.const_value is None:
        return False
    write_initializer(readers[0], 1, values_of(weight) * np.float32(0.5))
    return True


def _erf_steps(graph: ir.Graph, x: ir.Value) -> dict[str, ir.Node]:
    """Return the nodes of erf(x / sqrt(2)) by name, the result last."""
    scaled = ir.node("Mul", [x, _constant(graph, "gelu/rsqrt2", 1 / math.sqrt(2))])
    return {"scale": scaled, "erf": ir.node("Erf", scaled.outputs)}


def _tanh_steps(graph: ir.Graph, x: ir.Value) -> dict[str, ir.Node]:
    """Return the nodes of tanh(sqrt(2 / pi) x (1 + 0.044715 x^2)) by name, the result last."""
    square = ir.node("Mul", [x, x])
    cubic = ir.node("Mul", [square.outputs[0], _constant(graph, "gelu/cubic", 0.044715)])
    factor = ir.node("Add", [cubic.outputs[0], _constant(graph, "gelu/one", 1.0)])
    inner = ir.node("Mul", [x, factor.outputs[0]])
    root = _constant(graph, "gelu/sqrt2pi", math.sqrt(2 / math.pi))
    scaled = ir.node("Mul", [inner.outputs[0], root])
    return {
        "square": square,
        "cubic": cubic,
        "factor": factor,
        "inner": inner,
        "scale": scaled,
        "tanh": ir.node("Tanh", scaled.outputs),
    }


_GELU_STEPS = {"none": _erf_steps, "tanh": _tanh_steps}


def _decompose_gelu(graph: ir.Graph, gelu: ir.Node) -> None:
    x, result = gelu.inputs[0], gelu.outputs[0]
    assert x is not None
    kind = gelu.attributes.get_string("approximate", "none")
    if kind not in _GELU_STEPS:
        raise GraphError(
            f"{gelu.name} is a Gelu with approximate={kind!r}",
            hint=f"export with --opset {_FIRST_WITH_GELU} or newer",
        )
    steps = _GELU_STEPS[kind](graph, x)
    curve = list(steps.values())[-1].outputs[0]
    steps["one"] = ir.node("Add", [curve, _constant(graph, "gelu/one", 1.0)])
    product = steps["product"] = ir.node("Mul", [x, steps["one"].outputs[0]])
    if not _halve_next_weight(result):
        half = _constant(graph, "gelu/half", 0.5)
        product = steps["half"] = ir.node("Mul", [product.outputs[0], half])
    for step, node in steps.items():
        node.name = f"{gelu.name}/{step}"
        node.outputs[0].name = node.name
        node.outputs[0].type, node.outputs[0].shape = result.type, result.shape
    graph.insert_before(gelu, list(steps.values()))
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
                self._spell_parts(graph, node)
            elif node.op_type == "Pad" and self._opset < _FIRST_WITH_NUM_OUTPUTS:
                self._spread_pads(graph, node)
        model.graph.opset_imports[""] = self._opset
        return ir.passes.PassResult(model, modified=True)

    @staticmethod
    def _spell_parts(graph: ir.Graph, node: ir.Node) -> None:
        """Remove ``num_outputs``; pass unequal part sizes as an input instead."""
        node.attributes.pop("num_outputs", None)
        axis = node.attributes.get_int("axis", 0)
        sizes = [None if part.shape is None else part.shape[axis] for part in node.outputs]
        if len(node.inputs) > 1 or len(set(sizes)) == 1:
            return
        if not all(isinstance(size, int) for size in sizes):
            raise GraphError(
                f"{node.name} splits an axis of unknown size into unequal parts",
                hint=f"export with --opset {_FIRST_WITH_NUM_OUTPUTS} or newer",
            )
        listed = add_initializer(graph, f"{node.name}/parts", np.asarray(sizes, np.int64))
        node.resize_inputs(2)
        node.replace_input_with(1, listed)

    @staticmethod
    def _spread_pads(graph: ir.Graph, node: ir.Node) -> None:
        if len(node.inputs) < 4 or node.inputs[3] is None:
            return
        pads, axes = node.inputs[1], node.inputs[3]
        rank = len(node.outputs[0].shape or ())
        if pads is None or pads.const_value is None or axes.const_value is None or not rank:
            raise GraphError(
                f"{node.name} pads axes that are not constant, or a tensor of unknown rank",
                hint=f"export with --opset {_FIRST_WITH_NUM_OUTPUTS} or newer",
            )
        # Negative axes count from the last.
        given, chosen = values_of(pads), values_of(axes) % rank
        full = np.zeros(2 * rank, np.int64)
        for position, axis in enumerate(chosen):
            full[axis] = given[position]
            full[axis + rank] = given[position + len(chosen)]
        write_initializer(node, 1, full)
        node.resize_inputs(3)
