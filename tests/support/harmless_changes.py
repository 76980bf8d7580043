"""Changes of a graph that keep its function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

__all__ = ["FP32_CHANGES", "INT8_CHANGES"]

Edit = Callable[[ModelProto], None]


def _another_order(model: ModelProto) -> None:
    """Sort the nodes as late as possible, each tensor still computed before it is read."""
    waiting, done = list(model.graph.node), {""}
    done |= {weight.name for weight in model.graph.initializer}
    done |= {value.name for value in model.graph.input}
    generator, order = np.random.default_rng(0), []
    while waiting:
        ready = [node for node in waiting if done.issuperset(node.input)]
        node = ready[generator.integers(len(ready))]
        waiting.remove(node)
        done.update(node.output)
        order.append(node)
    weights = list(model.graph.initializer)
    del model.graph.node[:]
    model.graph.node.extend(order)
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights[::-1])


def _other_names(model: ModelProto) -> None:
    graph = model.graph
    names: dict[str, str] = {"": ""}

    def renamed(name: str) -> str:
        return names.setdefault(name, f"t{len(names)}")

    for values in (graph.input, graph.output, graph.value_info, graph.initializer):
        for value in values:
            value.name = renamed(value.name)
    for number, node in enumerate(graph.node):
        node.name = f"n{number}"
        for side in (node.input, node.output):
            side[:] = [renamed(name) for name in side]


def _own_copies(model: ModelProto) -> None:
    """Give each reader of an initializer a separate copy."""
    weights = {weight.name: weight for weight in model.graph.initializer}
    del model.graph.initializer[:]
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in weights:
                copy = onnx.TensorProto()
                copy.CopyFrom(weights[name])
                copy.name = f"{name}/of/{node.name}"
                model.graph.initializer.append(copy)
                node.input[index] = copy.name


def _merged(model: ModelProto) -> None:
    """Merge equal initializers."""
    first: dict[bytes, str] = {}
    names: dict[str, str] = {}
    kept = []
    for weight in model.graph.initializer:
        nameless = onnx.TensorProto()
        nameless.CopyFrom(weight)
        nameless.name = ""
        names[weight.name] = first.setdefault(nameless.SerializeToString(), weight.name)
        if names[weight.name] == weight.name:
            kept.append(weight)
    assert len(kept) < len(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def _constant_nodes(model: ModelProto) -> None:
    nodes = [
        helper.make_node("Constant", [], [weight.name], value=weight)
        for weight in model.graph.initializer
    ]
    del model.graph.initializer[:]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


def _newer_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 21


def _fixed_batch(model: ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 16
    del model.graph.value_info[:]


def _no_types(model: ModelProto) -> None:
    del model.graph.value_info[:]


def _identities(model: ModelProto) -> None:
    for node in [node for node in model.graph.node if node.op_type == "LayerNormalization"]:
        inner, outer = f"{node.output[0]}/inner", node.output[0]
        at = list(model.graph.node).index(node)
        node.output[0] = inner
        model.graph.node[at].output[0] = inner
        model.graph.node.insert(at + 1, helper.make_node("Identity", [inner], [outer]))


def _key_bias_dropped(model: ModelProto) -> None:
    """Add a constant to all scores of a query, which does not change softmax."""
    for weight in model.graph.initializer:
        if weight.name.endswith("attn.qkv.bias"):
            bias = numpy_helper.to_array(weight).copy()
            width = len(bias) // 3
            bias[width : 2 * width] = 0
            weight.CopyFrom(numpy_helper.from_array(bias, weight.name))


FP32_CHANGES: dict[str, Edit] = {
    "nodes and weights in another order": _another_order,
    "other names": _other_names,
    "initializers duplicated": _own_copies,
    "initializers as Constant nodes": _constant_nodes,
    "a newer opset": _newer_opset,
    "a fixed batch": _fixed_batch,
    "no types of inner tensors": _no_types,
    "Identity nodes": _identities,
    "key biases dropped": _key_bias_dropped,
}
INT8_CHANGES: dict[str, Edit] = {
    "initializers merged": _merged,
    "int8 with other names": _other_names,
    "int8 nodes in another order": _another_order,
}
