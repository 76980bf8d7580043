"""Reads, adds and changes the constants of a graph.

Several nodes may read one constant: torch.onnx merges equal ones, such as norm gains of all ones
and zero biases, and tied weights are one tensor from the start.  A pass that changes a constant
for one node must not change it for the others, so it writes with :func:`write_initializer`.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from clipdeploy.core.errors import GraphError

__all__ = [
    "add_initializer",
    "drop_weights",
    "own_initializer",
    "remove_unused",
    "set_values",
    "shared_initializer",
    "tensor_of",
    "values_of",
    "write_initializer",
]


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol:
    """Return the tensor of a constant.

    Raises:
        GraphError: ``value`` is not a constant, its values were dropped, or it is an input that the
            node leaves out.
    """
    if value is None or value.const_value is None:
        name = "that a node needs" if value is None else value.name
        raise GraphError(f"the weight {name} has no data", hint="export the graph again")
    return value.const_value


def values_of(value: ir.Value | None) -> NDArray[Any]:
    """Return the values of a constant, of any shape and type.

    Raises:
        GraphError: see :func:`tensor_of`.
    """
    return tensor_of(value).numpy()


def set_values(value: ir.Value, array: NDArray[np.generic]) -> None:
    """Replace the values, type and shape of a constant for every node that reads it."""
    value.const_value = ir.Tensor(array, name=value.name)
    value.type = ir.TensorType(value.const_value.dtype)
    value.shape = ir.Shape(array.shape)


def add_initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """Add a constant of any shape and type to ``graph``, which must not contain ``name`` yet."""
    value = ir.Value(name=name)
    set_values(value, array)
    graph.register_initializer(value)
    return value


def shared_initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """Return the constant ``name``; add it with ``array``, of any shape, if it is missing."""
    return graph.initializers.get(name) or add_initializer(graph, name, array)


def own_initializer(node: ir.Node, index: int) -> ir.Value:
    """Return the constant input ``index`` of ``node``, copied first if anything else reads it.

    A copy is named after the node's module: ``blocks.3.norm1.weight`` for
    ``blocks.0.norm1.weight``.

    Raises:
        GraphError: the input is not a constant.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None or node.graph is None:
        raise GraphError(f"input {index} of {node.name} is not a constant")
    if value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output():
        return value
    assert isinstance(node.graph, ir.Graph)
    name = _free_name(node.graph, node, value.name or "constant")
    owned = add_initializer(node.graph, name, values_of(value))
    node.replace_input_with(index, owned)
    return owned


def write_initializer(node: ir.Node, index: int, array: NDArray[np.generic]) -> ir.Value:
    """Replace the constant input ``index`` of ``node``, and of no other node.

    ``array`` may have another shape and type.

    Raises:
        GraphError: the input is not a constant.
    """
    value = own_initializer(node, index)
    set_values(value, array)
    return value


def remove_unused(graph: ir.Graph) -> None:
    """Remove the constants that no node reads and that are not outputs of the graph."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def drop_weights(graph: ir.Graph) -> None:
    """Free the values of all constants.

    Nodes and values refer to each other, so that those of an unused graph stay until Python next
    looks for such cycles.
    """
    for value in graph.initializers.values():
        value.const_value = None


def _free_name(graph: ir.Graph, node: ir.Node, name: str) -> str:
    module = (node.name or "").rpartition("/")[0]
    leaf = name.rpartition(".")[2]
    base = f"{module}.{leaf}" if module else name
    names = (base if not number else f"{base}_{number}" for number in count())
    return next(name for name in names if name not in graph.initializers)
