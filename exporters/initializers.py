"""Constants of a graph: new ones, and ones that a single node may change.

Equal constants are stored once: torch.onnx merges norm gains of all ones and zero biases, and tied
weights are one tensor to begin with.  Whoever changes a constant for one node would change it for
all the others that read it, so that a pass writes through :func:`write_initializer` only.
"""

from __future__ import annotations

from itertools import count

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from clipdeploy.core.errors import GraphError

__all__ = ["add_initializer", "own_initializer", "write_initializer"]


def add_initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """Add a constant of any shape and type to ``graph``, whose names do not have ``name`` yet."""
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def own_initializer(node: ir.Node, index: int) -> ir.Value:
    """The constant that ``node`` reads at ``index``, made its own if anything else reads it.

    A copy is named by the node's module: ``blocks.3.norm1.weight`` for ``blocks.0.norm1.weight``.

    Raises:
        GraphError: the node reads no constant there.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None or node.graph is None:
        raise GraphError(f"input {index} of {node.name} is no constant")
    if value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output():
        return value
    assert isinstance(node.graph, ir.Graph)
    name = _free_name(node.graph, node, value.name or "constant")
    owned = add_initializer(node.graph, name, value.const_value.numpy())
    node.replace_input_with(index, owned)
    return owned


def write_initializer(node: ir.Node, index: int, array: NDArray[np.generic]) -> ir.Value:
    """Give ``node``, and it alone, another constant at ``index``: ``array``, of any shape.

    Raises:
        GraphError: the node reads no constant there.
    """
    value = own_initializer(node, index)
    value.const_value = ir.Tensor(array, name=value.name)
    value.shape = ir.Shape(array.shape)
    return value


def _free_name(graph: ir.Graph, node: ir.Node, name: str) -> str:
    module = (node.name or "").rpartition("/")[0]
    leaf = name.rpartition(".")[2]
    wanted = f"{module}.{leaf}" if module else name
    names = (wanted if not number else f"{wanted}_{number}" for number in count())
    return next(name for name in names if name not in graph.initializers)
