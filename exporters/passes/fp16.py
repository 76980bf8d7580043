"""Converts the float32 tensors of a graph to float16.

Every float32 weight and every float32 tensor between nodes becomes float16.  A Cast after the image
and one before the logits keep the interface float32.  A node with a tensor named in ``keep`` stays
float32, between Casts; ``keep`` is for tensors with values near float16's maximum, 65504.
LayerNormalization must remain one node, whose kernels accumulate in float32 (``stash_type`` 1): if
decomposed, its x ** 2 overflows on a ViT's residual stream.

A graph with local functions, If or Loop is an error: tensors inside would silently stay float32.

The pass also converts Q/DQ graphs: QuantizeLinear and DequantizeLinear take their type from
their scale (ONNX operators, opset 19 and later), which is converted like any other constant.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from clipdeploy.core.errors import GraphError
from exporters.initializers import add_initializer, remove_unused, values_of
from exporters.storage import refuse_nested

__all__ = ["FP16_MAX", "ToFloat16"]

FP16_MAX = float(np.finfo(np.float16).max)

_WIDE, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


class ToFloat16(ir.passes.InPlacePass):
    """See the module's docstring; ``keep`` holds names of tensors that stay float32."""

    def __init__(self, keep: Collection[str] = (), *, half_io: bool = False) -> None:
        super().__init__()
        self._keep = frozenset(keep)
        self._half_io = half_io

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change ``model`` in place; see the module's docstring."""
        refuse_nested(model, "the conversion to float16")
        graph = model.graph
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        nodes = list(graph)
        # Determined first, because inserted casts change the inputs of nodes.
        precision = {node: _WIDE if self._is_wide(node) else _HALF for node in nodes}
        halves: dict[ir.Value, ir.Value] = {}
        for node in nodes:
            if precision[node] is _HALF:
                self._halve_constants(graph, node, halves)
        for node in nodes:
            for value in node.outputs:
                if value.dtype == _WIDE and precision[node] is _HALF:
                    value.dtype = _HALF
        if self._half_io:
            for value in graph.inputs:
                if value.dtype == _WIDE:
                    value.dtype = _HALF
        for node in nodes:
            self._align_inputs(graph, node, precision[node])
        self._restore_outputs(graph)
        remove_unused(graph)
        return ir.passes.PassResult(model, modified=True)

    def _is_wide(self, node: ir.Node) -> bool:
        values = [*node.inputs, *node.outputs]
        return any(value is not None and value.name in self._keep for value in values)

    @staticmethod
    def _halve_constants(graph: ir.Graph, node: ir.Node, halves: dict[ir.Value, ir.Value]) -> None:
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value.dtype != _WIDE:
                continue
            if value not in halves:
                halves[value] = _half_initializer(graph, value)
            node.replace_input_with(index, halves[value])

    def _align_inputs(self, graph: ir.Graph, node: ir.Node, dtype: ir.DataType) -> None:
        for index, value in enumerate(node.inputs):
            if value is None or value.is_initializer() or value.dtype not in (_WIDE, _HALF):
                continue
            if value.dtype != dtype:
                node.replace_input_with(index, self._cast(graph, value, dtype, before=node))

    def _cast(
        self, graph: ir.Graph, value: ir.Value, dtype: ir.DataType, *, before: ir.Node
    ) -> ir.Value:
        key = (value, dtype)
        if key not in self._casts:
            name = f"{value.name}/{'fp16' if dtype is _HALF else 'fp32'}"
            cast = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
            cast.outputs[0].name = name
            cast.outputs[0].type = ir.TensorType(dtype)
            cast.outputs[0].shape = value.shape
            producer = value.producer()
            if producer is None:
                graph.insert_before(before, cast)
            else:
                graph.insert_after(producer, cast)
            self._casts[key] = cast.outputs[0]
        return self._casts[key]

    def _restore_outputs(self, graph: ir.Graph) -> None:
        if self._half_io:
            return
        for index, value in enumerate(graph.outputs):
            producer = value.producer()
            if value.dtype != _HALF or producer is None:
                continue
            name = value.name
            value.name = f"{name}/fp16"
            cast = ir.node("Cast", [value], {"to": int(_WIDE)}, name=f"{name}/Cast")
            cast.outputs[0].name = name
            cast.outputs[0].type = ir.TensorType(_WIDE)
            cast.outputs[0].shape = value.shape
            graph.append(cast)
            graph.outputs[index] = cast.outputs[0]


def _half_initializer(graph: ir.Graph, value: ir.Value) -> ir.Value:
    array = values_of(value)
    largest = float(np.abs(array).max(initial=0.0))
    if largest > FP16_MAX:
        raise GraphError(
            f"the weight {value.name} reaches {largest:.3g}, above float16's {FP16_MAX:.0f}",
            hint="keep this model in FP32",
        )
    return add_initializer(graph, f"{value.name}/fp16", array.astype(np.float16))
