from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from clipdeploy.core.errors import GraphError
from exporters.graphs import load_graph
from exporters.passes.fp16 import FP16_MAX, ToFloat16
from exporters.session import OnnxSession

_WIDE, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def _proto(model: ir.Model) -> onnx.ModelProto:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _run(model: ir.Model, images: NDArray[np.generic]) -> NDArray[np.generic]:
    return OnnxSession(_proto(model).SerializeToString()).run(images)[0]


def _floats(model: ir.Model) -> dict[str, ir.DataType | None]:
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [value for node in model.graph for value in node.outputs]
    return {v.name or "": v.dtype for v in values if v.dtype in (_WIDE, _HALF)}


def _peaky(factor: float = 300.0) -> ir.Model:
    """y = ((x * 300) * 300) * 1e-3 : the middle passes float16's largest for x = 1."""
    proto = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 2] x) => (float[batch, 2] y)
        {
            once = Mul(x, factor)
            twice = Mul(once, factor)
            y = Mul(twice, small)
        }
    """)
    for name, number in (("factor", factor), ("small", 1e-3)):
        proto.graph.initializer.append(numpy_helper.from_array(np.float32([number]), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def test_everything_but_the_interface_is_half(tiny_graph: Path) -> None:
    model = load_graph(tiny_graph)
    assert set(_floats(model).values()) == {_WIDE}
    ToFloat16()(model)
    wide = {name for name, dtype in _floats(model).items() if dtype is _WIDE}
    assert wide == {"image", "logits"}
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert [(c.inputs[0].name, c.outputs[0].name) for c in casts] == [
        ("image", "image/fp16"),
        ("logits/fp16", "logits"),
    ]


def test_half_graph_runs_near_the_wide_one(
    tiny_graph: Path, tiny_images: NDArray[np.float32]
) -> None:
    model = load_graph(tiny_graph)
    wide = _run(model, tiny_images)
    ToFloat16()(model)
    half = _run(model, tiny_images)
    assert half.dtype == np.float32
    difference = float(np.abs(half - wide).max())
    # A half has 11 bits: a few 2 ** -11 of logits of about 2.  Zero would mean nothing was halved.
    assert 0 < difference < 2e-2


def test_weights_are_rounded_to_nearest(tiny_graph: Path) -> None:
    model = load_graph(tiny_graph)
    before = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    ToFloat16()(model)
    halves = {n: v for n, v in model.graph.initializers.items() if n.endswith("/fp16")}
    assert len(halves) == sum(array.dtype == np.float32 for array in before.values()) - _unused(
        tiny_graph
    )
    for name, value in halves.items():
        expected = before[name.removesuffix("/fp16")].astype(np.float16)
        assert value.const_value.numpy().tobytes() == expected.tobytes()


def _unused(path: Path) -> int:
    graph = load_graph(path).graph
    used = {value for node in graph for value in node.inputs}
    return sum(value not in used and value.dtype == _WIDE for value in graph.initializers.values())


def test_no_weight_is_left_behind(tiny_graph: Path) -> None:
    model = load_graph(tiny_graph)
    ToFloat16()(model)
    used = {value for node in model.graph for value in node.inputs}
    assert [name for name, v in model.graph.initializers.items() if v not in used] == []


def test_layer_normalisation_stays_one_node_with_a_float32_inside(tiny_graph: Path) -> None:
    model = load_graph(tiny_graph)
    ToFloat16()(model)
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert len(norms) == 6
    for node in norms:
        stash = node.attributes.get("stash_type")
        assert stash is None or stash.as_int() == 1


def test_kept_node_lies_between_casts(tiny_graph: Path, tiny_images: NDArray[np.float32]) -> None:
    model = load_graph(tiny_graph)
    ToFloat16(keep=["blocks.0.mlp.fc1/MatMul"])(model)
    nodes = {node.name: node for node in model.graph}
    # The tensor belongs to the node that writes it and to the one that reads it.
    for name in ("blocks.0.mlp.fc1/MatMul", "blocks.0.mlp.fc1/Add"):
        for value in (*nodes[name].inputs, *nodes[name].outputs):
            assert value is not None
            assert value.dtype == _WIDE
    before = nodes["blocks.0.mlp.fc1/MatMul"].inputs[0].producer()
    (after,) = nodes["blocks.0.mlp.fc1/Add"].outputs[0].consumers()
    assert before is not None
    assert (before.op_type, after.op_type) == ("Cast", "Cast")
    assert nodes["blocks.0.mlp/Gelu"].outputs[0].dtype == _HALF
    assert nodes["blocks.1.mlp.fc1/MatMul"].outputs[0].dtype == _HALF
    assert sum(node.op_type == "Cast" for node in model.graph) == 4
    assert np.isfinite(_run(model, tiny_images)).all()


def test_tensor_with_many_kept_readers_is_cast_once(tiny_graph: Path) -> None:
    model = load_graph(tiny_graph)
    keep = [f"blocks.0.attn/Split:{i}" for i in range(3)]
    ToFloat16(keep=keep)(model)
    names = [node.name for node in model.graph if node.op_type == "Cast"]
    assert len(set(names)) == len(names)
    _proto(model)


def test_keeping_everything_changes_no_logit(
    tiny_graph: Path, tiny_images: NDArray[np.float32]
) -> None:
    model = load_graph(tiny_graph)
    wide = _run(model, tiny_images)
    ToFloat16(keep=list(_floats(model)))(model)
    assert set(_floats(model).values()) == {_WIDE}
    assert _run(model, tiny_images).tobytes() == wide.tobytes()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_overflow_is_real_and_keep_prevents_it() -> None:
    ones = np.ones((1, 2), np.float32)
    lost = _peaky()
    ToFloat16()(lost)
    # The reference runtime: ONNX Runtime's CPU would compute a chain of halves in float32.
    (overflowed,) = ReferenceEvaluator(_proto(lost)).run(None, {"x": ones})
    assert np.isinf(overflowed).all()
    kept = _peaky()
    ToFloat16(keep=["twice"])(kept)
    # The factor 1e-3 rounds to a half; its relative error is at most 2 ** -11.
    (found,) = ReferenceEvaluator(_proto(kept)).run(None, {"x": ones})
    np.testing.assert_allclose(found, [[90, 90]], rtol=1e-3)


def test_half_interface(tiny_graph: Path, tiny_images: NDArray[np.float32]) -> None:
    model = load_graph(tiny_graph)
    wide = _run(model, tiny_images)
    ToFloat16(half_io=True)(model)
    assert set(_floats(model).values()) == {_HALF}
    assert not any(node.op_type == "Cast" for node in model.graph)
    half = _run(model, tiny_images.astype(np.float16))
    assert half.dtype == np.float16
    # As for the float32 interface, and one more rounding of the logits.
    np.testing.assert_allclose(half.astype(np.float32), wide, rtol=0, atol=2e-2)


@pytest.mark.parametrize("largest", [65536.0, -1e6, np.inf])
def test_weight_beyond_float16_is_refused(largest: float) -> None:
    with pytest.raises(GraphError, match=r"the weight factor reaches .* above float16's 65504"):
        ToFloat16()(_peaky(largest))


def test_weight_at_float16s_largest_is_accepted() -> None:
    model = _peaky(FP16_MAX)
    ToFloat16()(model)
    assert model.graph.initializers["factor/fp16"].const_value.numpy()[0] == FP16_MAX


def test_weight_beyond_float16_of_a_kept_node_is_accepted() -> None:
    model = _peaky(1e5)
    ToFloat16(keep=["factor"])(model)
    assert model.graph.initializers["factor"].const_value.numpy()[0] == 1e5


def test_weight_without_data_is_refused(tiny_graph: Path) -> None:
    model = load_graph(tiny_graph)
    model.graph.initializers["head.weight"].const_value = None
    with pytest.raises(GraphError, match=r"head\.weight has no data"):
        ToFloat16()(model)
