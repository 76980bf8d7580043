"""Fold attention's query scale into the qkv projection, where that is exact.

    s (x Wq + bq) = x (s Wq) + s bq

For a power of two, such as 64 ** -0.5, scaling a float only changes its exponent: the folded graph
computes the very same floats with one node less in every block.  Another scale is left alone.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

__all__ = ["FoldAttentionScale"]


def _scalar(value: ir.Value | None) -> float | None:
    tensor = value.const_value if value is not None else None
    if tensor is None or tensor.size != 1:
        return None
    return float(tensor.numpy().reshape(()))


def _producer(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in kinds else None


def _scale_columns(value: ir.Value, columns: int, scale: float) -> None:
    tensor = value.const_value
    assert tensor is not None
    array = tensor.numpy().copy()
    array[..., :columns] *= np.asarray(scale, array.dtype)
    value.const_value = ir.Tensor(array, name=value.name)


class FoldAttentionScale(ir.passes.InPlacePass):
    """MatMul -> Add -> Split -> (reshape, transpose) -> Mul(scale): fold the Mul."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change ``model`` in place; see the module's docstring."""
        found = [(node, linear) for node in model.graph if (linear := self._match(node))]
        for mul, (weight, bias, columns) in found:
            scale = _scalar(mul.inputs[1])
            assert scale is not None
            _scale_columns(weight, columns, scale)
            _scale_columns(bias, columns, scale)
            source = mul.inputs[0]
            assert source is not None
            ir.convenience.replace_all_uses_with(mul.outputs[0], source)
            model.graph.remove(mul, safe=True)
        return ir.passes.PassResult(model, modified=bool(found))

    @staticmethod
    def _match(node: ir.Node) -> tuple[ir.Value, ir.Value, int] | None:
        scale = _scalar(node.inputs[1]) if node.op_type == "Mul" else None
        if scale is None or scale <= 0 or math.frexp(scale)[0] != 0.5:
            return None
        value = node.inputs[0]
        while step := _producer(value, "Reshape", "Transpose", "Slice", "Gather"):
            value = step.inputs[0]
        split = _producer(value, "Split")
        if split is None or value is not split.outputs[0]:
            return None
        add = _producer(split.inputs[0], "Add")
        matmul = _producer(add.inputs[0], "MatMul") if add else None
        if add is None or matmul is None:
            return None
        bias, weight = add.inputs[1], matmul.inputs[1]
        known = all(v is not None and v.const_value is not None for v in (bias, weight))
        width = value.shape[-1] if value.shape is not None else None
        if not known or not isinstance(width, int):
            return None
        assert bias is not None
        assert weight is not None
        return weight, bias, width
