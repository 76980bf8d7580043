"""Finds the precision of every matrix product of an ONNX graph, grouped by block.

    x ── Q ── DQ ──┐
                   MatMul        int8, because both operands are dequantised int8
    W int8 ── DQ ──┘

All other products run in the type of their tensors: the compiler is strongly typed.  The built
engine may differ; :mod:`clipdeploy.engines.inspector` reports its precision in the same form.

Products inside local functions, If, Loop and Scan are counted too, those of a function once per
call; see :mod:`exporters.typed_graphs`.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from clipdeploy.core.errors import GraphError
from exporters.blocks import UNKNOWN, BlockPrecision, Product, block_of, by_block
from exporters.functions import inlined
from exporters.nested import captured, element_type, is_nested, subgraphs
from exporters.typed_graphs import element_types, flat

__all__ = ["find_products", "requested_precision", "tensor_types"]

# Operators and the indices of their two operands among the inputs.
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
# TensorRT moves DequantizeLinear past these, so the product still reads integers.
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
    # Products of uint8 activations and int8 weights, as in ONNX Runtime's CPU kernels.
    TensorProto.UINT8: "int8",
}


def _name(kind: int) -> str | None:
    if kind == TensorProto.UNDEFINED:
        return None
    return _NAMES.get(kind, str(TensorProto.DataType.Name(kind)).lower())


class _Graph:
    """Types, producers and constants of a graph's tensors, including those of ``outer``."""

    def __init__(self, graph: GraphProto, outer: _Graph | None = None) -> None:
        typed = (*graph.input, *graph.value_info, *graph.output)
        self._types: dict[str, int] = dict(outer._types) if outer else {}
        self._types |= {value.name: element_type(value.type) for value in typed}
        self._types |= {weight.name: weight.data_type for weight in graph.initializer}
        self._producers: dict[str, NodeProto] = dict(outer._producers) if outer else {}
        self._producers |= {name: node for node in graph.node for name in node.output}
        # Tensors that do not depend on the graph's inputs.
        self.constants: set[str] = set(outer.constants) if outer else set()
        self.constants |= {weight.name for weight in graph.initializer}
        for node in graph.node:
            read = {*node.input, *captured(node)} - {""}
            if read <= self.constants:
                self.constants.update(node.output)

    def _type(self, name: str) -> str | None:
        """Return the precision of a tensor, None if its type is unknown."""
        return _name(self._types.get(name, TensorProto.UNDEFINED))

    def _dequantised(self, node: NodeProto) -> str:
        # The zero point has the type of the integers, and its type is known if it is a constant.
        kinds = [self._type(name) for name in node.input[::2] if name]
        return next((kind for kind in kinds if kind is not None), UNKNOWN)

    def _stored(self, name: str) -> str | None:
        """Return the integer type of a dequantised tensor, None for other tensors."""
        while (node := self._producers.get(name)) is not None:
            if node.op_type == "DequantizeLinear":
                return self._dequantised(node)
            if node.op_type not in _LAYOUT:
                return None
            name = node.input[0]
        return None

    def precision(self, operands: list[str]) -> str:
        """Return the precision of a product of these tensors."""
        stored = {self._stored(name) for name in operands}
        # Both operands have the same type, so one known type is enough.
        found = {self._type(name) for name in operands} if None in stored else stored
        kinds = found - {None}
        return kinds.pop() or UNKNOWN if len(kinds) == 1 else UNKNOWN


def find_products(model: ModelProto) -> list[Product]:
    """Return every matrix product of ``model`` in graph order; weights may lack values.

    Raises:
        GraphError: a local function cannot be inlined.
    """
    if is_nested(model):
        # Tensors of functions have no declared types, and those of branches often lack them.
        model = _typed(model)
    return list(_products(model.graph, None))


def _typed(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(inlined(model, any_opset=True))
    try:
        return flat(copy)
    except GraphError:
        # Contradicting types are an error only when the graph is run.
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
    """Return the types of all tensors of ``model``, named as in :class:`BlockPrecision`.

    Tensors inside local functions, If, Loop and Scan are included, and so are inferred types.

    Raises:
        GraphError: a local function cannot be inlined.
    """
    return {_name(kind) or UNKNOWN for kind in element_types(model)}


def requested_precision(model: ModelProto) -> tuple[BlockPrecision, ...]:
    """Return the precision that ``model`` requests, by block, in network order.

    A product is int8 only if both operands come from DequantizeLinear; otherwise it runs in the
    type of its operands.  Blocks are identified by node names, see :func:`block_of`.
    """
    return by_block(find_products(model))
