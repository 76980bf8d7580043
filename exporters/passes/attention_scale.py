"""Folds the scale of attention's query into the qkv projection, if that is exact.

    s (x Wq + bq) = x (s Wq) + s bq

Scaling by a power of two, such as 64 ** -0.5, changes only the exponent of a float, so the folded
graph computes identical values with one node less per block.  Other scales are not folded.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from exporters.initializers import remove_unused, values_of, write_initializer

__all__ = ["FoldAttentionScale"]

_MOVES = ("Reshape", "Transpose", "Slice", "Gather")


def _scalar(value: ir.Value | None) -> float | None:
    tensor = value.const_value if value is not None else None
    if tensor is None or tensor.size != 1:
        return None
    return float(tensor.numpy().reshape(()))


def _producer(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in kinds else None


def _single(value: ir.Value) -> bool:
    return len(value.consumers()) == 1 and not value.is_graph_output()


def _only_reader(value: ir.Value | None, kinds: tuple[str, ...]) -> ir.Value | None:
    """Follow ``value`` back through layout operators; None if anything else reads it."""
    while step := _producer(value, *kinds):
        assert value is not None
        if not _single(value):
            return None
        value = step.inputs[0]
    return value


def _scale_columns(node: ir.Node, columns: int, scale: float) -> None:
    constant = node.inputs[1]
    assert constant is not None
    array = values_of(constant).copy()
    array[..., :columns] *= np.asarray(scale, array.dtype)
    write_initializer(node, 1, array)


class FoldAttentionScale(ir.passes.InPlacePass):
    """MatMul -> Add -> (reshape, transpose) -> Split -> (...) -> Mul(scale): fold the Mul."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change ``model`` in place; see the module's docstring."""
        found = [(node, linear) for node in model.graph if (linear := self._match(node))]
        for mul, (matmul, add, columns) in found:
            source, constant = mul.inputs
            scale = _scalar(constant)
            assert source is not None
            assert scale is not None
            _scale_columns(matmul, columns, scale)
            _scale_columns(add, columns, scale)
            ir.convenience.replace_all_uses_with(mul.outputs[0], source)
            model.graph.remove(mul, safe=True)
        if found:
            remove_unused(model.graph)
        return ir.passes.PassResult(model, modified=bool(found))

    @staticmethod
    def _match(node: ir.Node) -> tuple[ir.Node, ir.Node, int] | None:
        scale = _scalar(node.inputs[1]) if node.op_type == "Mul" else None
        if scale is None or scale <= 0 or math.frexp(scale)[0] != 0.5:
            return None
        query = _only_reader(node.inputs[0], _MOVES)
        split = _producer(query, "Split")
        if query is None or split is None or query is not split.outputs[0] or not _single(query):
            return None
        add = _producer(_only_reader(split.inputs[0], _MOVES), "Add")
        matmul = _producer(add.inputs[0], "MatMul") if add else None
        if add is None or matmul is None or len({str(out.shape) for out in split.outputs}) != 1:
            return None
        bias, weight = add.inputs[1], matmul.inputs[1]
        if bias is None or weight is None or bias.const_value is None or weight.const_value is None:
            return None
        return matmul, add, bias.const_value.size // len(split.outputs)
