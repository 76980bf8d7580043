"""Walks through every node and tensor of an ONNX model, also those of functions and branches."""

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
    """The graphs in the attributes of ``node``: the branches of an If, the body of a Loop."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """``graph`` and every graph inside it, at any depth, outer ones first."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from all_graphs(inner)


def all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Every node of ``model``, those of functions and branches too; they may be changed."""
    tops = [*model.graph.node, *(node for each in model.functions for node in each.node)]
    for node in tops:
        yield node
        for inner in subgraphs(node):
            for graph in all_graphs(inner):
                yield from graph.node


def inner_graphs(model: ModelProto) -> Iterator[GraphProto]:
    """The graph of ``model``, and every graph inside a node of it or of its functions."""
    yield model.graph
    for node in all_nodes(model):
        yield from subgraphs(node)


def all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every constant of ``model``: initializers and attributes, also of functions and branches."""
    for graph in inner_graphs(model):
        yield from graph.initializer
    for node in all_nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def is_nested(model: ModelProto) -> bool:
    """Whether ``model`` has local functions, or nodes with graphs inside."""
    inner = (graph for node in model.graph.node for graph in subgraphs(node))
    return bool(model.functions) or next(inner, None) is not None


def captured(node: NodeProto) -> set[str]:
    """Names of the tensors that the graphs inside ``node`` read from outside."""
    read: set[str] = set()
    for graph in subgraphs(node):
        own = {value.name for value in graph.input}
        own |= {weight.name for weight in graph.initializer}
        wanted = {value.name for value in graph.output}
        for inner in graph.node:
            wanted |= set(inner.input) | captured(inner)
            own |= set(inner.output)
        read |= wanted - own
    return read - {""}


def element_type(kind: TypeProto) -> int:
    """The ONNX element type of a tensor, or of the tensors in a sequence or an optional."""
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        return int(getattr(kind, which).elem_type)
    if which in ("sequence_type", "optional_type"):
        return element_type(getattr(kind, which).elem_type)
    return int(TensorProto.UNDEFINED)
