"""What an ONNX graph asks for: the precision of every matrix product, a block at a time.

    x ── Q ── DQ ──┐
                   MatMul        int8, since both of its operands are dequantised int8
    W int8 ── DQ ──┘

A strongly typed compiler takes the rest from the types of the tensors.  What the engine then really
does may differ; :mod:`clipdeploy.engines.inspector` tells that in the same terms.

Products inside local functions, If, Loop and Scan count like all others, those of a function once
for each call; see :mod:`exporters.typed_graphs`.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from clipdeploy.core.errors import GraphError
from exporters.blocks import UNKNOWN, BlockPrecision, Product, block_of, by_block
from exporters.functions import inlined
from exporters.nested import captured, element_type, is_nested, subgraphs
from exporters.typed_graphs import element_types, flat

__all__ = ["asked_precision", "find_products", "tensor_types"]

# The operators, and where their two operands stand among the inputs.
_PRODUCTS = {
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "Conv": (0, 1),
    "Einsum": (0, 1),
    "MatMulInteger": (0, 1),
    "ConvInteger": (0, 1),
    "QLinearMatMul": (0, 3),
    "QLinearConv": (0, 3),
}
# TensorRT moves these across a DequantizeLinear, so that the product still reads integers.
_LAYOUT = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.DOUBLE: "fp64",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT8E5M2: "fp8",
    TensorProto.FLOAT4E2M1: "fp4",
    TensorProto.INT8: "int8",
    # ONNX Runtime's CPU kernels take uint8 activations with int8 weights: both are INT8 products.
    TensorProto.UINT8: "int8",
}


def _name(kind: int) -> str | None:
    if kind == TensorProto.UNDEFINED:
        return None
    return _NAMES.get(kind, str(TensorProto.DataType.Name(kind)).lower())


class _Graph:
    """What is known of the tensors of a graph, by name; those of ``outer`` are seen from inside."""

    def __init__(self, graph: GraphProto, outer: _Graph | None = None) -> None:
        typed = (*graph.input, *graph.value_info, *graph.output)
        self._types: dict[str, int] = dict(outer._types) if outer else {}
        self._types |= {value.name: element_type(value.type) for value in typed}
        self._types |= {weight.name: weight.data_type for weight in graph.initializer}
        self._producers: dict[str, NodeProto] = dict(outer._producers) if outer else {}
        self._producers |= {name: node for node in graph.node for name in node.output}
        # Everything that does not depend on the graph's inputs.
        self.constants: set[str] = set(outer.constants) if outer else set()
        self.constants |= {weight.name for weight in graph.initializer}
        for node in graph.node:
            read = {*node.input, *captured(node)} - {""}
            if read <= self.constants:
                self.constants.update(node.output)

    def _type(self, name: str) -> str | None:
        """Its precision, None if nothing says it."""
        return _name(self._types.get(name, TensorProto.UNDEFINED))

    def _dequantised(self, node: NodeProto) -> str:
        # The zero point has the type of the integers, and as a constant it always says so.
        kinds = [self._type(name) for name in node.input[::2] if name]
        return next((kind for kind in kinds if kind is not None), UNKNOWN)

    def _stored(self, name: str) -> str | None:
        """The type of the integers behind a tensor if it is dequantised; None otherwise."""
        while (node := self._producers.get(name)) is not None:
            if node.op_type == "DequantizeLinear":
                return self._dequantised(node)
            if node.op_type not in _LAYOUT:
                return None
            name = node.input[0]
        return None

    def precision(self, operands: list[str]) -> str:
        """What a product of these tensors runs in."""
        stored = {self._stored(name) for name in operands}
        # The operators want one type of both operands: one of them speaks for the other.
        found = {self._type(name) for name in operands} if None in stored else stored
        kinds = found - {None}
        return kinds.pop() or UNKNOWN if len(kinds) == 1 else UNKNOWN


def find_products(model: ModelProto) -> list[Product]:
    """Every matrix product of ``model``, in the order of the graph; weights need no values.

    Raises:
        GraphError: local functions that cannot be read.
    """
    if is_nested(model):
        # A function's tensors have no types of their own, and a branch's seldom say theirs.
        model = _typed(model)
    return list(_products(model.graph, None))


def _typed(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(inlined(model, any_opset=True))
    try:
        return flat(copy)
    except GraphError:
        # The types contradict each other, which is for those to say who run the graph.
        return copy


def _products(graph: GraphProto, outer: _Graph | None) -> Iterator[Product]:
    known = _Graph(graph, outer)
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _products(inner, known)
        places = _PRODUCTS.get(node.op_type, ())
        operands = [node.input[i] for i in places if i < len(node.input) and node.input[i]]
        if len(operands) < 2:
            continue
        attention = not any(name in known.constants for name in operands)
        precision = known.precision(operands)
        yield Product(node.name, block_of(node.name), attention, precision)


def tensor_types(model: ModelProto) -> set[str]:
    """Every type that a tensor of ``model`` has, by the names of :class:`BlockPrecision`.

    Tensors inside local functions, If, Loop and Scan count, and so do tensors whose type is not
    written down but follows from their operator's.

    Raises:
        GraphError: local functions that cannot be read.
    """
    return {_name(kind) or UNKNOWN for kind in element_types(model)}


def asked_precision(model: ModelProto) -> tuple[BlockPrecision, ...]:
    """What ``model`` asks a compiler for, a block at a time, in the order of the network.

    A product is int8 only if both of its operands come from DequantizeLinear; otherwise it runs in
    the type of its operands.  Blocks are told by the names of nodes, see :func:`block_of`.
    """
    return by_block(find_products(model))
