"""Moves nodes of a graph into local functions and branches; the function is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from exporters.nested import captured

__all__ = ["MOVES", "Move", "into_branch", "into_function", "into_functions_and_branches"]

Move = Callable[[ModelProto, str], None]
_DOMAIN = "local"


def _reads(nodes: Sequence[NodeProto]) -> list[str]:
    """Return the tensors that nodes read, including their branches."""
    return [name for node in nodes for name in (*node.input, *sorted(captured(node)))]


def _cut(graph: GraphProto, prefix: str) -> tuple[int, list[NodeProto], list[str], list[str]]:
    """Remove the nodes from the first to the last whose output's name starts with ``prefix``.

    Returns their position, the nodes, the outer tensors that they read, and those of their outputs
    that others read.
    """
    nodes = list(graph.node)
    places = [i for i, node in enumerate(nodes) if node.output[0].startswith(prefix)]
    first, last = places[0], places[-1]
    taken = []
    for node in nodes[first : last + 1]:
        copy = NodeProto()
        copy.CopyFrom(node)
        taken.append(copy)
    made = {name for node in taken for name in node.output}
    rest = [*nodes[:first], *nodes[last + 1 :]]
    read = dict.fromkeys(name for name in _reads(taken) if name not in made)
    wanted = set(_reads(rest)) | {v.name for v in graph.output}
    outputs = [name for node in taken for name in node.output if name in wanted]
    del graph.node[first : last + 1]
    kept = [value for value in graph.value_info if value.name not in made - set(outputs)]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    return first, taken, [name for name in read if name], outputs


def into_function(model: ModelProto, prefix: str) -> None:
    """Replace the nodes of ``prefix`` by a call of a function."""
    first, nodes, inputs, outputs = _cut(model.graph, prefix)
    name = f"F{len(model.functions)}"
    if all(each.domain != _DOMAIN for each in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    imports = list(model.opset_import)
    model.functions.append(helper.make_function(_DOMAIN, name, inputs, outputs, nodes, imports))
    call = helper.make_node(name, inputs, outputs, domain=_DOMAIN, name=f"{prefix}/call")
    model.graph.node.insert(first, call)


def into_branch(model: ModelProto, prefix: str) -> None:
    """Move the nodes of ``prefix`` to both branches of an If, which captures outer tensors."""
    first, nodes, _, outputs = _cut(model.graph, prefix)
    there = f"{prefix}/choice"
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(True), there))
    inner = [f"{name}/inside" for name in outputs]
    ends = [helper.make_node("Identity", [a], [b]) for a, b in zip(outputs, inner, strict=True)]
    # Inner names must differ from outer ones, which are used for the outputs of the If.
    for node in [*nodes, *ends]:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name in outputs:
                    names[index] = f"{name}/own"
    branch = helper.make_graph(
        [*nodes, *ends], "branch", [], [helper.ValueInfoProto(name=name) for name in inner]
    )
    choice = helper.make_node(
        "If", [there], outputs, name=f"{prefix}/If", then_branch=branch, else_branch=branch
    )
    model.graph.node.insert(first, choice)


def into_functions_and_branches(model: ModelProto, prefix: str) -> None:
    """Create a function inside a branch inside a function."""
    into_function(model, prefix)
    called = model.graph.node[[n.name for n in model.graph.node].index(f"{prefix}/call")].output[0]
    into_branch(model, called)
    into_function(model, called)


MOVES: dict[str, Move] = {
    "a function": into_function,
    "a branch": into_branch,
    "a function in a branch in a function": into_functions_and_branches,
}
