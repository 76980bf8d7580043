"""Iterates over every node and tensor of an ONNX model, including functions and branches."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto

__all__ = [
    "all_graphs",
    "all_nodes",
    "all_tensors",
    "captured",
    "element_type",
    "inner_graphs",
    "is_nested",
    "subgraphs",
]


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Yield the graphs in the attributes of ``node``: branches of an If, the body of a Loop."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield ``graph`` and every graph inside it, at any depth, outer ones first."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from all_graphs(inner)


def all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Yield every node of ``model``, including functions and branches; nodes may be changed."""
    tops = [*model.graph.node, *(node for each in model.functions for node in each.node)]
    for node in tops:
        yield node
        for inner in subgraphs(node):
            for graph in all_graphs(inner):
                yield from graph.node


def inner_graphs(model: ModelProto) -> Iterator[GraphProto]:
    """Yield the graph of ``model`` and every graph inside its nodes and functions."""
    yield model.graph
    for node in all_nodes(model):
        yield from subgraphs(node)


def all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every constant of ``model``: initializers and attributes, at any depth."""
    for graph in inner_graphs(model):
        yield from graph.initializer
    for node in all_nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def is_nested(model: ModelProto) -> bool:
    """Return whether ``model`` has local functions or nodes that contain graphs."""
    inner = (graph for node in model.graph.node for graph in subgraphs(node))
    return bool(model.functions) or next(inner, None) is not None


def captured(node: NodeProto) -> set[str]:
    """Return the names of the outer tensors that the graphs inside ``node`` read."""
    read: set[str] = set()
    for graph in subgraphs(node):
        own = {value.name for value in graph.input}
        own |= {weight.name for weight in graph.initializer}
        needed = {value.name for value in graph.output}
        for inner in graph.node:
            needed |= set(inner.input) | captured(inner)
            own |= set(inner.output)
        read |= needed - own
    return read - {""}


def element_type(kind: TypeProto) -> int:
    """Return the ONNX element type of a tensor, a sequence of tensors or an optional."""
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        return int(getattr(kind, which).elem_type)
    if which in ("sequence_type", "optional_type"):
        return element_type(getattr(kind, which).elem_type)
    return int(TensorProto.UNDEFINED)
