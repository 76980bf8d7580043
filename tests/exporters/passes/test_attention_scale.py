from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from clipdeploy.core.passport import Passport
from clipdeploy.models.vit import VisionTransformer
from exporters.graphs import load_graph
from exporters.onnx import ExportConfig, trace
from exporters.passes.attention_scale import FoldAttentionScale
from exporters.passes.naming import NameByModule

HEADS, TOKENS = 2, 3


def _attention(head_width: int, scale: float, *, scaled: str = "q", also: str = "k") -> ir.Model:
    """x -> qkv Linear -> Split -> heads -> Mul(scale); ``also`` is a second output, unscaled."""
    width = HEADS * head_width
    proto = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, {TOKENS}, {width}] x)
        => (float[batch, {HEADS}, {TOKENS}, {head_width}] y, float[batch, {TOKENS}, {width}] other)
        {{
            matmul = MatMul(x, weight)
            added = Add(matmul, bias)
            q, k, v = Split<axis = -1, num_outputs = 3>(added)
            reshaped = Reshape({scaled}, shape)
            heads = Transpose<perm = [0, 2, 1, 3]>(reshaped)
            scaled = Mul(heads, scale)
            y = Neg(scaled)
            other = Identity({also})
        }}
    """)
    rng = np.random.default_rng(head_width)
    for name, array in (
        ("weight", rng.standard_normal((width, 3 * width)).astype(np.float32)),
        ("bias", rng.standard_normal(3 * width).astype(np.float32)),
        ("shape", np.array([-1, TOKENS, HEADS, head_width], np.int64)),
        ("scale", np.array(scale, np.float32)),
    ):
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def _run(model: ir.Model, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    # ONNX Runtime's own fusions would move the scale about: every node runs as it is written.
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: images})


def _batch(head_width: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(1)
    return rng.standard_normal((4, TOKENS, HEADS * head_width)).astype(np.float32)


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("head_width", [4, 16, 64])
def test_power_of_two_is_folded_bit_for_bit(head_width: int) -> None:
    model = _attention(head_width, head_width**-0.5)
    before = _run(model, _batch(head_width))
    result = FoldAttentionScale()(model)
    assert result.modified
    assert "Mul" not in _operators(model)
    for old, new in zip(before, _run(model, _batch(head_width)), strict=True):
        assert new.tobytes() == old.tobytes()
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_only_the_querys_columns_change() -> None:
    model = _attention(16, 0.25)
    names = ("weight", "bias")
    before = {name: model.graph.initializers[name].const_value.numpy().copy() for name in names}
    FoldAttentionScale()(model)
    for name in names:
        after = model.graph.initializers[name].const_value.numpy()
        assert np.array_equal(after[..., :32], before[name][..., :32] * np.float32(0.25))
        assert np.array_equal(after[..., 32:], before[name][..., 32:])


def test_wrong_fold_would_be_seen() -> None:
    model = _attention(16, 0.25)
    before = _run(model, _batch(16))
    FoldAttentionScale()(model)
    bias = model.graph.initializers["bias"]
    array = bias.const_value.numpy().copy()
    # One bit of one folded bias.
    array[0] = np.nextafter(array[0], np.float32(np.inf))
    bias.const_value = ir.Tensor(array, name="bias")
    assert _run(model, _batch(16))[0].tobytes() != before[0].tobytes()


@pytest.mark.parametrize("scale", [8**-0.5, 24**-0.5, 0.3, 0.0, -0.25])
def test_other_scale_is_left_alone(scale: float) -> None:
    model = _attention(8, scale)
    before = ir.to_proto(model).SerializeToString()
    assert not FoldAttentionScale()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("part", ["k", "v"])
def test_scaled_key_or_value_is_left_alone(part: str) -> None:
    model = _attention(16, 0.25, scaled=part, also="q")
    assert not FoldAttentionScale()(model).modified
    assert "Mul" in _operators(model)


def test_scale_computed_in_the_graph_is_left_alone() -> None:
    model = _attention(16, 0.25)
    (mul,) = (node for node in model.graph if node.op_type == "Mul")
    square = ir.node("Mul", [mul.inputs[1], mul.inputs[1]], name="square")
    model.graph.insert_before(mul, square)
    mul.replace_input_with(1, square.outputs[0])
    assert not FoldAttentionScale()(model).modified


def test_query_with_another_reader_keeps_its_value() -> None:
    model = _attention(16, 0.25, also="q")
    before = _run(model, _batch(16))
    FoldAttentionScale()(model)
    for old, new in zip(before, _run(model, _batch(16)), strict=True):
        assert new.tobytes() == old.tobytes()


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(("heads", "left"), [(2, 0), (4, 2)])
def test_exported_model_has_a_scale_only_where_it_must(
    heads: int,
    left: int,
    make_vit: Callable[..., VisionTransformer],
    make_passport: Callable[[VisionTransformer], Passport],
    tiny_images: NDArray[np.float32],
) -> None:
    # Width 32: two heads of 16 scale by 1/4, four heads of 8 by 8 ** -0.5.
    module = make_vit(heads=heads)
    model = trace(module, make_passport(module), ExportConfig())
    scales = [node.name for node in model.graph if node.op_type == "Mul"]
    assert scales == [f"blocks.{block}.attn/Mul" for block in range(left)]


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
def test_folded_model_gives_the_unfolded_models_bits(
    make_vit: Callable[..., VisionTransformer], tiny_graph: Path, tiny_images: NDArray[np.float32]
) -> None:
    program = torch.onnx.export(
        make_vit(),
        (torch.zeros(2, 3, 16, 16),),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        input_names=["image"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    model = program.model
    NameByModule()(model)
    assert _operators(model).count("Mul") == 2
    (unfolded,) = _run(model, tiny_images)
    (folded,) = _run(load_graph(tiny_graph), tiny_images)
    assert folded.tobytes() == unfolded.tobytes()
