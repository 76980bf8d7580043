"""Builds small graphs that compute each part from either of two graphs, chosen by switches.

A segment computes one tensor of a network from an earlier one, such as a block's output from its
input.  It consists of parts, each of which computes one named tensor from earlier ones:

    input ── part ── part ── .. ── output          part = If(switch, candidate's nodes, reference's)

Both branches are unmodified copies of their graphs' nodes: with every switch on a segment computes
what the candidate does, with every switch off what the reference does.  Both graphs must name their
tensors alike.  Tensors between parts are float32, which holds float16 values exactly.

If the candidate stores a tensor t in other coordinates, a bridge converts them:

    t_candidate = (t - shift) / scale
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from calibration.write import ratio_name
from clipdeploy.core.errors import GraphError

__all__ = ["Bridge", "GraphSource", "Part", "Segment", "switch_input", "switchable"]

_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Part:
    """The nodes that compute the tensor ``output``; parts with one ``switch`` switch together."""

    switch: str
    output: str


@dataclass(frozen=True)
class Segment:
    """The parts that compute a tensor from the tensor ``input``, in topological order."""

    name: str
    input: str
    parts: tuple[Part, ...]

    @property
    def output(self) -> str:
        """The last part's tensor, which is the next segment's input."""
        return self.parts[-1].output

    @property
    def outputs(self) -> tuple[str, ...]:
        """The tensors of all parts; the last is :attr:`output`."""
        return tuple(part.output for part in self.parts)

    def first_output(self, switches: Collection[str]) -> str:
        """The first tensor that depends on one of ``switches``."""
        return next(part.output for part in self.parts if part.switch in switches)

    @property
    def switches(self) -> tuple[str, ...]:
        """All switches without repeats, in topological order."""
        return tuple(dict.fromkeys(part.switch for part in self.parts))


@dataclass(frozen=True)
class Bridge:
    """The candidate's coordinates of a tensor's last axis: (t - shift) / scale, both (C,)."""

    scale: NDArray[np.float32]
    shift: NDArray[np.float32]


class GraphSource:
    """A graph whose nodes and constants are looked up by tensor name."""

    def __init__(self, model: ModelProto, name: str) -> None:
        self.name = name
        self.model = model
        graph = model.graph
        self._nodes = list(graph.node)
        self._producers = {
            output: index for index, node in enumerate(self._nodes) for output in node.output
        }
        self._weights = {weight.name: weight for weight in graph.initializer}
        typed = (*graph.input, *graph.value_info, *graph.output)
        self._types = {value.name: value.type.tensor_type.elem_type for value in typed}

    @property
    def opset(self) -> int:
        """The opset version of the default ONNX domain."""
        ours = (o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx"))
        return int(max(ours))

    @property
    def unsigned(self) -> bool:
        """Whether activations are quantised to uint8, as for ONNX Runtime's CPU kernels."""
        return self._quantises_to(TensorProto.UINT8)

    @property
    def fp8(self) -> bool:
        """Whether activations are quantised to FP8."""
        return self._quantises_to(TensorProto.FLOAT8E4M3FN)

    @property
    def attention(self) -> bool:
        """Whether the inputs of attention's products are quantised in any block."""
        return any(
            node.op_type == "QuantizeLinear" and ".attn.scores." in node.name
            for node in self._nodes
        )

    def _quantises_to(self, kind: int) -> bool:
        return any(
            self.type_of(node.input[2]) == kind
            for node in self._nodes
            if node.op_type == "QuantizeLinear" and len(node.input) > 2
        )

    def producer(self, tensor: str) -> NodeProto | None:
        """The node that computes ``tensor``; None for an input or an initializer."""
        index = self._producers.get(tensor)
        return None if index is None else self._nodes[index]

    def need(self, tensor: str) -> NodeProto:
        """The node that computes ``tensor``.

        Raises:
            GraphError: no node does.
        """
        if (node := self.producer(tensor)) is None:
            raise GraphError(
                f"{self.name} has no tensor {tensor}",
                hint="compare graphs that clipdeploy exported from the same model",
            )
        return node

    def product(self, linear: str) -> tuple[NodeProto, NDArray[np.float32] | None]:
        """The MatMul of a Linear, and the (Cout,) ratios that its output is multiplied by.

        The ratios are None in a graph without them; see :mod:`calibration.write`.

        Raises:
            GraphError: the graph has no such Linear.
        """
        node = self.need(f"{linear}/MatMul")
        if node.name != ratio_name(linear):
            return node, None
        product = self.need(node.input[0])
        while product.op_type in ("QuantizeLinear", "DequantizeLinear"):
            product = self.need(product.input[0])
        return product, self.constant(node.input[1])

    def type_of(self, tensor: str) -> int:
        """The ONNX element type of ``tensor``; UNDEFINED if it is not declared."""
        if tensor in self._weights:
            return int(self._weights[tensor].data_type)
        return int(self._types.get(tensor, TensorProto.UNDEFINED))

    def constant(self, tensor: str) -> NDArray[np.float32] | None:
        """A constant tensor of any shape, int8 dequantised; None if it depends on an input."""
        if tensor in self._weights:
            return numpy_helper.to_array(self._weights[tensor]).astype(np.float32)
        node = self.producer(tensor)
        if node is None or node.op_type not in ("DequantizeLinear", "Cast", "Identity"):
            return None
        parts = [self.constant(name) for name in node.input if name]
        if any(part is None for part in parts):
            return None
        values = [part for part in parts if part is not None]
        return values[0] if node.op_type != "DequantizeLinear" else _dequantise(node, values)

    def integers(self, linear: str) -> NDArray[np.integer[Any]] | None:
        """The integers (Cin, Cout) from which a Linear's weight is dequantised.

        None if the weight is not a dequantised constant.
        """
        node = self.producer(self.product(linear)[0].input[1])
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in self._weights:
            return None
        stored: NDArray[np.integer[Any]] = numpy_helper.to_array(self._weights[node.input[0]])
        return stored

    def branch(
        self, part: Part, known: Collection[str], bridges: Mapping[str, Bridge], prefix: str
    ) -> GraphProto:
        """The nodes that compute ``part.output`` from the tensors ``known``, as an If branch.

        Raises:
            GraphError: it depends on other inputs, or the graph has no such tensor.
        """
        needed: set[int] = set()
        weights: dict[str, TensorProto] = {}
        read: dict[str, None] = {}
        waiting = [part.output]
        self.need(part.output)
        while waiting:
            tensor = waiting.pop()
            if tensor in known:
                read[tensor] = None
            elif tensor in self._weights:
                weights[tensor] = self._weights[tensor]
            else:
                node = self.need(tensor)
                if (index := self._producers[tensor]) not in needed:
                    needed.add(index)
                    waiting.extend(name for name in node.input if name)
        names = _Names(prefix, part.output)
        nodes = [*self._entrances(read, bridges, names)]
        nodes.extend(names.renamed(self._nodes[index]) for index in sorted(needed))
        nodes.extend(self._exit(part.output, bridges, names))
        graph = helper.make_graph(
            nodes,
            names.base,
            [],
            [helper.make_tensor_value_info(names.result, TensorProto.FLOAT, None)],
        )
        for name, weight in weights.items():
            copied = graph.initializer.add()
            copied.CopyFrom(weight)
            copied.name = names.of(name)
        graph.initializer.extend(names.constants)
        return graph

    def _entrances(
        self, read: Collection[str], bridges: Mapping[str, Bridge], names: _Names
    ) -> list[NodeProto]:
        nodes = []
        for tensor in read:
            chain = tensor
            if (bridge := bridges.get(tensor)) is not None:
                shift = names.constant(f"{tensor}/shift", bridge.shift)
                scale = names.constant(f"{tensor}/scale", bridge.scale)
                nodes.append(names.node("Sub", [chain, shift], f"{tensor}/centred"))
                nodes.append(names.node("Div", [nodes[-1].output[0], scale], f"{tensor}/scaled"))
                chain = nodes[-1].output[0]
            if (kind := self.type_of(tensor)) in _HALVES:
                nodes.append(names.node("Cast", [chain], f"{tensor}/half", to=kind))
                chain = nodes[-1].output[0]
            names.map(tensor, chain)
        return nodes

    def _exit(self, output: str, bridges: Mapping[str, Bridge], names: _Names) -> list[NodeProto]:
        nodes = []
        chain = names.of(output)
        if self.type_of(output) in _HALVES:
            nodes.append(names.node("Cast", [chain], f"{output}/wide", to=TensorProto.FLOAT))
            chain = nodes[-1].output[0]
        if (bridge := bridges.get(output)) is not None:
            scale = names.constant(f"{output}/scale", bridge.scale)
            shift = names.constant(f"{output}/shift", bridge.shift)
            nodes.append(names.node("Mul", [chain, scale], f"{output}/unscaled"))
            chain = nodes[-1].output[0]
            nodes.append(names.node("Add", [chain, shift], f"{output}/moved"))
            chain = nodes[-1].output[0]
        # An If's output must be computed inside the branch.
        nodes.append(helper.make_node("Identity", [chain], [names.result], name=names.result))
        return nodes


class _Names:
    """Renames tensors inside a branch, whose names must not shadow outer ones."""

    def __init__(self, prefix: str, output: str) -> None:
        self.base = f"{prefix}/{output}"
        self.result = f"{self.base}/result"
        self.constants: list[TensorProto] = []
        self._outside: dict[str, str] = {}

    def map(self, tensor: str, name: str) -> None:
        """Map ``tensor`` to the outer tensor ``name``."""
        self._outside[tensor] = name

    def of(self, tensor: str) -> str:
        """The name of ``tensor`` in the branch; an omitted optional input stays empty."""
        return self._outside.get(tensor, f"{self.base}//{tensor}") if tensor else ""

    def constant(self, name: str, array: NDArray[np.float32]) -> str:
        """Add a constant of any shape to the branch and return its full name."""
        full = f"{self.base}//bridge/{name}"
        if all(tensor.name != full for tensor in self.constants):
            self.constants.append(numpy_helper.from_array(array.astype(np.float32), full))
        return full

    def node(self, op: str, inputs: list[str], name: str, to: int | None = None) -> NodeProto:
        """A node that converts coordinates or types."""
        full = f"{self.base}//bridge/{name}"
        node = helper.make_node(op, inputs, [full], name=full)
        if to is not None:
            node.attribute.append(helper.make_attribute("to", to))
        return node

    def renamed(self, node: NodeProto) -> NodeProto:
        """A copy of ``node`` with this branch's names."""
        copied = NodeProto()
        copied.CopyFrom(node)
        copied.name = f"{self.base}//{node.name}"
        copied.input[:] = [self.of(name) for name in node.input]
        copied.output[:] = [self.of(name) for name in node.output]
        return copied


def _dequantise(node: NodeProto, values: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    integers, scale = values[:2]
    zero = values[2] if len(values) > 2 else np.zeros_like(scale)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    if scale.ndim == 1 and integers.ndim > 1:
        shape = [1] * integers.ndim
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    result: NDArray[np.float32] = (integers - zero) * scale
    return result


def switch_input(switch: str) -> str:
    """Name of the graph input for ``switch``, a bool scalar that is true for the candidate."""
    return f"switch/{switch}"


def switchable(
    segment: Segment,
    reference: GraphSource,
    candidate: GraphSource,
    bridges: Mapping[str, Bridge] = {},
) -> bytes:
    """Build ``segment`` as a serialised model.

    Its inputs are the segment's input and a bool scalar for each switch, its outputs the tensors of
    the parts.

    Raises:
        GraphError: a graph lacks a tensor of the segment, or their opsets differ.
    """
    if reference.opset != candidate.opset:
        raise GraphError(
            f"{reference.name} has opset {reference.opset}, {candidate.name} {candidate.opset}",
            hint="make the candidate again from this reference",
        )
    known = [segment.input]
    nodes = []
    for part in segment.parts:
        then = candidate.branch(part, known, bridges, "candidate")
        other = reference.branch(part, known, {}, "reference")
        nodes.append(
            helper.make_node(
                "If",
                [switch_input(part.switch)],
                [part.output],
                name=f"If/{part.output}",
                then_branch=then,
                else_branch=other,
            )
        )
        known.append(part.output)
    kind = reference.type_of(segment.input) or TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(segment.input, kind, None)]
    inputs += [
        helper.make_tensor_value_info(switch_input(switch), TensorProto.BOOL, [])
        for switch in segment.switches
    ]
    outputs = [
        helper.make_tensor_value_info(part.output, TensorProto.FLOAT, None)
        for part in segment.parts
    ]
    model = helper.make_model(
        helper.make_graph(nodes, segment.name, inputs, outputs),
        opset_imports=list(reference.model.opset_import),
        ir_version=max(reference.model.ir_version, candidate.model.ir_version),
    )
    return bytes(model.SerializeToString())
