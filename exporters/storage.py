"""Rewrites a float16 graph so that every tensor is rounded to float16.

    y = node(x)    becomes    w = node(x), h = Cast(w, float16), y = Cast(h, float32)

Nodes compute in float32.  Values inside one operator (LayerNormalization, Gelu, Softmax, Attention)
are assumed to stay in float32, as in TensorRT's kernels, although ONNX defines some of these
operators as functions.  The output of every node is rounded, in the main graph, in local functions
and in branches.  An operator with attributes that request float16 inside (``stash_type``,
``softmax_precision``) is an error, because this rewrite cannot reproduce it.

Local functions must be inlined before, see :func:`exporters.typed_graphs.flat`.  Graphs inside If,
Loop, Scan and SequenceMap are rewritten like the main graph: their inputs and outputs are float32.
Tensors are rounded before they enter a sequence or an optional.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from clipdeploy.core.errors import GraphError
from exporters.initializers import set_values, values_of
from exporters.typed_graphs import TYPE_ATTRIBUTES

__all__ = ["refuse_nested", "store_float16"]

_WIDE, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
# Operators that contain graphs and do not change the types of the tensors they pass in and out.
_WITH_GRAPHS = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_INNER_PRECISION = ("stash_type", "softmax_precision", "precision")
_NARROW = (int(ir.DataType.FLOAT16), int(ir.DataType.BFLOAT16))
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def refuse_nested(model: ir.Model, what: str) -> None:
    """Raise an error if the graph contains other graphs, which ``what`` does not process.

    Raises:
        GraphError: the graph has local functions, or operators such as If and Loop.
    """
    containers = [str(function.name) for function in model.functions.values()]
    containers += [node.op_type for node in model.graph for _ in _graphs_of(node)]
    if containers:
        raise GraphError(
            f"{what} does not support graphs inside {containers[0]}",
            hint="export the graph without local functions and control flow",
        )


def _graphs_of(node: ir.Node) -> list[ir.Graph]:
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def _all_graphs(graph: ir.Graph) -> list[ir.Graph]:
    inner = [each for node in graph for each in _graphs_of(node)]
    return [graph, *(below for each in inner for below in _all_graphs(each))]


def _is_half(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == _HALF


def store_float16(model: ir.Model) -> list[ir.Value]:
    """Make ``model`` compute in float32 and round to float16, in place; return the rounded values.

    float16 inputs become float32.  ``model`` is the result of :func:`exporters.typed_graphs.flat`.

    Raises:
        GraphError: the type of a tensor is unknown, or an operator cannot be rewritten.
    """
    graphs = _all_graphs(model.graph)
    # All nodes are checked before the rewrite changes their types.
    for graph in graphs:
        for node in graph:
            _check_node(node)
    for graph in graphs:
        for value in (*graph.inputs, *graph.initializers.values()):
            _widen(value)
    stored = []
    for graph in graphs:
        for node in list(graph):
            _widen_attributes(node)
            for value in list(node.outputs):
                if not _is_half(value):
                    continue
                if isinstance(value.type, ir.TensorType):
                    stored.append(_store(graph, node, value))
                else:
                    value.dtype = _WIDE
    return stored


def _check_node(node: ir.Node) -> None:
    what = f"{node.op_type} {node.name or ''}".strip()
    for value in node.outputs:
        if value.name and (value.type is None or not value.dtype):
            raise GraphError(
                f"the type of {value.name} is unknown, so it may be float16",
                hint="save the graph with the types of its inner tensors (value_info)",
            )
    if _graphs_of(node) and (node.domain or node.op_type not in _WITH_GRAPHS):
        raise GraphError(f"{what} contains a graph that cannot be rewritten to store float16")
    for value in node.outputs:
        if _is_half(value) and not isinstance(value.type, _TYPES):
            raise GraphError(f"{value.name} is float16 with an unsupported type: {value.type}")
    touches = any(_is_half(value) for value in (*node.inputs, *node.outputs))
    if touches and node.op_type == "BitCast":
        raise GraphError(f"{what} reads the bits of a float16 tensor")
    for name in _INNER_PRECISION:
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.value in _NARROW:
            raise GraphError(
                f"{what} computes in float16 inside ({name}), which cannot be reproduced on a CPU",
                hint="verify this graph on a GPU",
            )


_TYPES = (ir.TensorType, ir.SequenceType, ir.OptionalType)


def _widen(value: ir.Value) -> None:
    if not _is_half(value):
        return
    if value.const_value is None:
        value.dtype = _WIDE
    else:
        set_values(value, values_of(value).astype(np.float32))


def _widen_attributes(node: ir.Node) -> None:
    """Change float16 values and types in the attributes of ``node`` to float32."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype == _HALF:
                wide = ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)
                node.attributes[name] = ir.AttrTensor(name, wide)
        elif attribute.type == ir.AttributeType.INT and name in TYPE_ATTRIBUTES:
            # A Cast to float16 already rounds.
            if node.op_type != "Cast" and attribute.as_int() == int(_HALF):
                node.attributes[name] = ir.AttrInt64(name, int(_WIDE))
        elif attribute.type == ir.AttributeType.TYPE_PROTO:
            kind = attribute.value.type
            if kind is not None and kind.dtype == _HALF:
                kind.dtype = _WIDE
    if node.op_type == "CastLike" and _is_half(node.outputs[0]):
        # The tensor that gives CastLike its type is float32 now.
        node.op_type = "Cast"
        node.resize_inputs(1)
        node.attributes["to"] = ir.AttrInt64("to", int(_HALF))


def _store(graph: ir.Graph, node: ir.Node, value: ir.Value) -> ir.Value:
    """Round ``value``, an output of ``node``, to float16; return the value that readers now use."""
    readers = [(user, index) for user, index in value.uses()]
    was_cast = node.op_type == "Cast"
    steps = [] if was_cast else [ir.node("Cast", [value], {"to": int(_HALF)})]
    half = value if was_cast else steps[0].outputs[0]
    wide = ir.node("Cast", [half], {"to": int(_WIDE)})
    steps.append(wide)
    half.dtype = _HALF
    if not was_cast:
        half.name = f"{value.name}/half"
        value.dtype = _WIDE
    stored = wide.outputs[0]
    stored.name, stored.shape = f"{value.name}/stored", value.shape
    stored.type = ir.TensorType(_WIDE)
    graph.insert_after(node, steps)
    # These include readers in the graphs inside other nodes.
    for user, index in readers:
        user.replace_input_with(index, stored)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = stored
    return stored
