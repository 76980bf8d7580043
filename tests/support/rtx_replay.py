"""A quantised graph computed as a TensorRT-RTX plan says that it computes it.

Each 8-bit product of the plan sums its products in int32 or, of FP8, in float32, multiplies the
sums by its alpha in float32 and writes float16 (:mod:`clipdeploy.engines.plan_text`).  What follows
in the graph runs as it is; in the channel form that begins with a Mul by float16(s_w s_x), which
the plan does in its next kernel.  ONNX Runtime runs the result on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from exporters.storage import store_float16
from exporters.typed_graphs import flat

__all__ = ["replayed"]

_FLOAT, _HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def _sums(name: str, x: str, w: str, sums: str, *, fp8: bool) -> list[onnx.NodeProto]:
    """The nodes that write the sums of a product of ``x`` and ``w``, without any scale."""
    make = onnx.helper.make_node
    if not fp8:
        return [make("MatMulInteger", [x, w], [sums])]
    wide = [f"{name}/replay_{side}" for side in ("x", "w")]
    casts = [make("Cast", [each], [to], to=_FLOAT) for each, to in zip((x, w), wide, strict=True)]
    return [*casts, make("MatMul", wide, [sums])]


def replayed(graph: Path, alphas: Mapping[str, float]) -> bytes:
    """``graph``, quantised with an FP16 remainder, with its products as the plan has them.

    ``alphas``: the alpha of each 8-bit MatMul, by the node's name.
    """
    model = onnx.load(graph)
    producers = {name: node for node in model.graph.node for name in node.output}
    weights = {each.name: each for each in model.graph.initializer}
    floats8 = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
        and weights[node.input[2]].data_type == onnx.TensorProto.FLOAT8E4M3FN
    }
    nodes = []
    for node in model.graph.node:
        if node.name not in alphas:
            nodes.append(node)
            continue
        x, w = (producers[name] for name in node.input)
        assert {x.op_type, w.op_type} == {"DequantizeLinear"}
        step, scale = (numpy_helper.to_array(weights[each.input[1]]) for each in (x, w))
        # In the ratio form the plan has folded both scales into alpha.
        rest = np.float16(np.float32(step) * np.float32(scale)) if scale.ndim else np.float16(1)
        made = {"alpha": np.float32(alphas[node.name]), "rest": np.asarray(rest, np.float16)}
        for key, array in made.items():
            model.graph.initializer.append(numpy_helper.from_array(array, f"{node.name}/{key}"))
        steps = ("replay_sums", "replay_floats", "replay_scaled", "replay_half")
        sums, floats, scaled, half = (f"{node.name}/{step}" for step in steps)
        make = onnx.helper.make_node
        nodes += [
            *_sums(node.name, x.input[0], w.input[0], sums, fp8=x.input[0] in floats8),
            make("Cast", [sums], [floats], to=_FLOAT),
            make("Mul", [floats, f"{node.name}/alpha"], [scaled]),
            make("Cast", [scaled], [half], to=_HALF),
            make("Mul", [half, f"{node.name}/rest"], [node.output[0]]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    # ONNX Runtime's CPU kernels would keep float16 tensors in float32.
    typed = ir.from_proto(flat(model))
    store_float16(typed)
    return ir.to_proto(typed).SerializeToString()
