from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from calibration.config import QuantizeConfig
from calibration.policy import Scope
from calibration.qdq import quantize
from clipdeploy.core.passport import Recipe, from_json, to_json
from clipdeploy.models import cards
from clipdeploy.pipeline import sample_images
from clipdeploy.workspace.folder import Workspace
from exporters.blocks import BlockPrecision
from exporters.graphs import load_graph
from exporters.products import find_products, requested_precision

Make = Callable[[QuantizeConfig], ir.Model]
DEPTH = 6


def _vit(ends: str, gemms: dict[str, int], attention: dict[str, int]) -> list[BlockPrecision]:
    """The demo's blocks: patch convolution and head in ``ends``, the same in every block."""
    return [
        BlockPrecision("patch_embed", {ends: 1}),
        *(BlockPrecision(f"blocks.{i}", dict(gemms), dict(attention)) for i in range(DEPTH)),
        BlockPrecision("head", {ends: 1}),
    ]


@pytest.fixture
def quantized(demo_workspace: Workspace, tmp_path: Path) -> Make:
    """The demo's INT8 graph with another config."""
    samples = sample_images(cards.find(cards.DEMO).preprocess(Recipe()), 3)

    def make(config: QuantizeConfig) -> ir.Model:
        source = demo_workspace.graph(cards.DEMO, "fp32")
        table = demo_workspace.calibration(cards.DEMO)
        return load_graph(
            quantize(source, table, tmp_path / "q.onnx", samples, config).artifact.path
        )

    return make


def _node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def _unquantize(model: ir.Model, name: str) -> None:
    """Let the product read what the DequantizeLinear ``name`` stands for."""
    dq = _node(model, name)
    stored = dq.inputs[0]
    assert stored is not None
    q = stored.producer()
    if q is not None:
        ir.convenience.replace_all_uses_with(dq.outputs[0], q.inputs[0])
        return
    weight = ir.Value(name=f"{name}/plain", type=dq.outputs[0].type, shape=stored.shape)
    weight.const_value = ir.Tensor(np.zeros(stored.shape.numpy(), np.float16))
    model.graph.register_initializer(weight)
    ir.convenience.replace_all_uses_with(dq.outputs[0], weight)


def _foreign(text: str, **weights: int) -> tuple[BlockPrecision, ...]:
    """What a graph in ONNX's text form asks for; ``weights`` are 4 by 4, of an ONNX type each.

    Only its inputs, outputs and weights have types.
    """
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>' + text)
    proto.graph.initializer.extend(
        onnx.helper.make_tensor(name, kind, (4, 4), np.zeros(16)) for name, kind in weights.items()
    )
    return requested_precision(proto)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_graph_of_one_type_asks_for_it_everywhere(
    demo_workspace: Workspace, precision: str
) -> None:
    model = load_graph(demo_workspace.graph(cards.DEMO, precision))
    assert list(requested_precision(ir.to_proto(model))) == _vit(
        precision, {precision: 4}, {precision: 2}
    )


def test_the_int8_graph_asks_for_int8_linears_and_fp16_around_them(
    demo_workspace: Workspace,
) -> None:
    model = load_graph(demo_workspace.graph(cards.DEMO, "int8"))
    assert list(requested_precision(ir.to_proto(model))) == _vit("fp16", {"int8": 4}, {"fp16": 2})


def test_everything_quantised_is_int8_everywhere(quantized: Make) -> None:
    model = quantized(QuantizeConfig(scope=Scope(attention=True, head=True, patch=True)))
    expected = _vit("int8", {"int8": 4}, {"int8": 2})
    # The last block's attention has only the class token's row.
    expected[6] = BlockPrecision("blocks.5", {"int8": 4}, {"fp16": 2})
    assert list(requested_precision(ir.to_proto(model))) == expected


def test_the_cpu_dialect_is_int8_though_its_activations_are_uint8(quantized: Make) -> None:
    model = quantized(QuantizeConfig(remainder="fp32"))
    assert list(requested_precision(ir.to_proto(model))) == _vit("fp32", {"int8": 4}, {"fp32": 2})


def test_an_excluded_block_shows(quantized: Make) -> None:
    model = quantized(QuantizeConfig(exclude=("blocks.3.*", "blocks.4.mlp.fc2")))
    blocks = requested_precision(ir.to_proto(model))
    expected = _vit("fp16", {"int8": 4}, {"fp16": 2})
    expected[4] = BlockPrecision("blocks.3", {"fp16": 4}, {"fp16": 2})
    expected[5] = BlockPrecision("blocks.4", {"int8": 3, "fp16": 1}, {"fp16": 2})
    assert list(blocks) == expected


@pytest.mark.parametrize("half", ["DQ", "weight_DQ"])
def test_a_product_with_one_quantised_operand_is_not_int8(
    demo_workspace: Workspace, half: str
) -> None:
    model = load_graph(demo_workspace.graph(cards.DEMO, "int8"))
    _unquantize(model, f"blocks.2.mlp.fc1/{half}")
    (block,) = [b for b in requested_precision(ir.to_proto(model)) if b.block == "blocks.2"]
    assert block.gemms == {"int8": 3, "fp16": 1}


def test_without_types_only_what_a_weight_tells_is_told(demo_workspace: Workspace) -> None:
    proto = onnx.load(demo_workspace.graph(cards.DEMO, "fp16"))
    del proto.graph.value_info[:]
    blocks = requested_precision(proto)
    assert list(blocks) == _vit("fp16", {"fp16": 4}, {"unknown": 2})


def test_weights_are_told_without_their_data(demo_workspace: Workspace) -> None:
    proto = onnx.load(demo_workspace.graph(cards.DEMO, "int8"))
    for weight in proto.graph.initializer:
        weight.ClearField("raw_data")
    assert list(requested_precision(proto)) == _vit("fp16", {"int8": 4}, {"fp16": 2})


def test_products_are_listed_by_name_in_the_order_of_the_graph(demo_workspace: Workspace) -> None:
    products = find_products(onnx.load(demo_workspace.graph(cards.DEMO, "int8")))
    assert [(p.name, p.attention) for p in products[:5]] == [
        ("patch_embed/Conv", False),
        ("blocks.0.attn.qkv/MatMul", False),
        ("blocks.0.attn/MatMul", True),
        ("blocks.0.attn/MatMul_1", True),
        ("blocks.0.attn.proj/MatMul", False),
    ]
    assert len(products) == 1 + DEPTH * 6 + 1


def test_a_graph_that_was_named_by_others() -> None:
    blocks = _foreign(
        """
        g (float16[1,4] x, bfloat16[1,4] b) => (float16[1,1] y, bfloat16[1,4] z) {
            ["/encoder/q/MatMul"] q = MatMul(x, w)
            ["/encoder/Transpose"] t = Transpose(q)
            ["/encoder/MatMul"] y = MatMul(q, t)
            ["fc"] z = Gemm(b, v)
        }
        """,
        w=TensorProto.FLOAT16,
        v=TensorProto.BFLOAT16,
    )
    assert blocks == (
        BlockPrecision("encoder", {"fp16": 1}, {"unknown": 1}),
        BlockPrecision("graph", {"bf16": 1}),
    )


@pytest.mark.parametrize(
    # Arithmetic on what was dequantised leaves a floating-point operand, here of unknown type.
    ("between", "precision"),
    [("Transpose", "int8"), ("Neg", "unknown")],
)
def test_a_weight_transposed_after_its_dequantisation_is_quantised(
    between: str, precision: str
) -> None:
    blocks = _foreign(
        f"""
        g (float[1,4] x, float s) => (float[1,4] y)
        <int8 z = {{0}}> {{
            q = QuantizeLinear(x, s, z)
            a = DequantizeLinear(q, s, z)
            d = DequantizeLinear(w, one)
            t = {between}(d)
            y = MatMul(a, t)
        }}
        """,
        w=TensorProto.INT8,
        one=TensorProto.FLOAT,
    )
    assert blocks == (BlockPrecision("graph", {precision: 1}),)


@pytest.mark.parametrize(
    ("left", "right", "precision"),
    [
        ("float8e4m3fn", "float8e4m3fn", "fp8"),
        ("int4", "int4", "int4"),
        ("int16", "int16", "int16"),
        ("int8", "int4", "unknown"),
    ],
)
def test_other_stored_types_are_named(left: str, right: str, precision: str) -> None:
    blocks = _foreign(
        f"""
        g ({left}[2,2] x, {right}[2,2] w, float s) => (float[2,2] y) {{
            a = DequantizeLinear(x, s)
            b = DequantizeLinear(w, s)
            y = MatMul(a, b)
        }}
        """
    )
    assert blocks == (BlockPrecision("graph", {}, {precision: 1}),)


def test_integer_operators_are_int8() -> None:
    blocks = _foreign(
        """
        g (float[1,4] x, float s) => (int32[1,4] y, uint8[1,4] z)
        <uint8 p = {0}, int8 n = {0}> {
            q, qs, qz = DynamicQuantizeLinear(x)
            y = MatMulInteger(q, w, qz)
            z = QLinearMatMul(q, qs, qz, w, s, n, s, p)
        }
        """,
        w=TensorProto.INT8,
    )
    assert blocks == (BlockPrecision("graph", {"int8": 2}),)


def test_a_graph_without_products_asks_for_nothing() -> None:
    assert _foreign("g (float[1] x) => (float[1] y) { y = Relu(x) }") == ()


def test_a_block_survives_a_passport() -> None:
    block = BlockPrecision("blocks.3", {"int8": 3, "fp16": 1}, {"fp16": 2})
    assert from_json(to_json(block), BlockPrecision, "a block") == block
