"""Functions that change nodes and weights of an ONNX graph in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

__all__ = ["Edit", "Steps", "add_weight", "captured", "initializer", "read", "redirect", "write"]

Edit = Callable[[ModelProto], None]
Array = NDArray[Any]


def initializer(model: ModelProto, name: str) -> TensorProto:
    """Return the initializer with this name, or its float16 version."""
    return next(w for w in model.graph.initializer if w.name in (name, f"{name}/fp16"))


def read(model: ModelProto, name: str) -> Array:
    """Return a copy of the values of an initializer."""
    return numpy_helper.to_array(initializer(model, name)).copy()


def write(model: ModelProto, name: str, array: Array) -> None:
    """Replace the values of an initializer, with the same type."""
    tensor = initializer(model, name)
    kept = array.astype(numpy_helper.to_array(tensor).dtype)
    tensor.CopyFrom(numpy_helper.from_array(kept, tensor.name))


def add_weight(model: ModelProto, name: str, array: Array) -> str:
    """Add an initializer and return its name."""
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return name


def redirect(model: ModelProto, old: str, new: str) -> None:
    """Replace the tensor ``old`` by ``new`` in all its readers."""
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new


def captured(node: NodeProto) -> Iterator[str]:
    """Return the tensors that a node and its subgraphs read."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from captured(inner)
            yield from (output.name for output in attribute.g.output)


class Steps:
    """Inserts nodes between a tensor and its readers.

    ``steps = Steps(model, "norm")``, then ``steps.finish(steps.op("Mul", "norm", factor))``: all
    former readers of "norm" read the product.  An output of the graph keeps its name.
    """

    def __init__(self, model: ModelProto, value: str) -> None:
        self.model = model
        self.value = value
        self._given = value
        self._nodes: list[NodeProto] = []
        if any(output.name == value for output in model.graph.output):
            self.value = f"{value}/before"
            for node in model.graph.node:
                node.output[:] = [self.value if name == value else name for name in node.output]
            redirect(model, value, self.value)

    def _name(self) -> str:
        return f"{self._given}/step{len(self._nodes)}"

    def const(self, values: Any, dtype: Any = np.float32) -> str:
        """Add an initializer with these values."""
        number = len(self.model.graph.initializer)
        return add_weight(self.model, f"{self._given}/const{number}", np.asarray(values, dtype))

    def like(self, values: Any, tensor: str) -> str:
        """Add a float constant with the type of ``tensor``."""
        return self.op("CastLike", self.const(values), tensor)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        output = self._name()
        self._nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def ops(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node with ``count`` outputs and return their names."""
        name = self._name()
        outputs = [f"{name}:{index}" for index in range(count)]
        self._nodes.append(helper.make_node(kind, inputs, outputs, name=name, **attributes))
        return outputs

    def choose(self, condition: str, yes: str, no: str, *, branches: bool = False) -> str:
        """Select ``yes`` if the condition (1,) is true, else ``no``; ``branches`` uses an If."""
        if not branches:
            return self.op("Where", condition, yes, no)
        graphs = {}
        for key, value in (("then_branch", yes), ("else_branch", no)):
            output = f"{self._name()}/{key}"
            same = helper.make_node("Identity", [value], [output])
            info = onnx.ValueInfoProto(name=output)
            info.type.tensor_type.elem_type = self._element_type()
            graphs[key] = helper.make_graph([same], key, [], [info])
        return self.op("If", self.op("Squeeze", condition), **graphs)

    def _element_type(self) -> int:
        """Return float16 for inner tensors of a graph with float16 weights, else float32."""
        half = any(w.name == "head.weight/fp16" for w in self.model.graph.initializer)
        inner = self._given == self.value
        return int(TensorProto.FLOAT16 if half and inner else TensorProto.FLOAT)

    def finish(self, result: str) -> None:
        """Insert the nodes; the readers of the tensor read ``result``."""
        graph = self.model.graph
        if self.value != self._given:
            self._nodes.append(helper.make_node("Identity", [result], [self._given]))
        else:
            redirect(self.model, self._given, result)
        needed = {name for node in self._nodes for name in captured(node)}
        places = [i for i, node in enumerate(graph.node) if needed.intersection(node.output)]
        for node in reversed(self._nodes):
            graph.node.insert(max(places) + 1, node)
