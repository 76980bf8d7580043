from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from calibration.write import QdqWriter, ratio_name
from exporters.graphs import structure, weight_proto
from exporters.session import OnnxSession


def _model() -> ir.Model:
    """y = x W + b on (batch, 8), and z = relu(x), a second reader of x."""
    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.standard_normal((8, 4)).astype("f4"), "fc.weight")
    bias = onnx.numpy_helper.from_array(rng.standard_normal(4).astype("f4"), "fc.bias")
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "fc.weight"], ["product"], name="fc/MatMul"),
        onnx.helper.make_node("Add", ["product", "fc.bias"], ["y"], name="fc/Add"),
        onnx.helper.make_node("Relu", ["x"], ["z"], name="relu"),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, ["batch", 8])],
        [
            onnx.helper.make_tensor_value_info("y", kind, ["batch", 4]),
            onnx.helper.make_tensor_value_info("z", kind, ["batch", 8]),
        ],
        [weight, bias],
        value_info=[onnx.helper.make_tensor_value_info("product", kind, ["batch", 4])],
    )
    opsets = [onnx.helper.make_opsetid("", 20)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))


def _node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def _array(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    array: NDArray[Any] = value.const_value.numpy()
    return array


def _run(model: ir.Model, x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    proto = structure(model)
    proto.graph.initializer.extend(weight_proto(v) for v in model.graph.initializers.values())
    onnx.checker.check_model(proto, full_check=True)
    return OnnxSession(proto.SerializeToString(), optimise=False).run(x)


def _images(seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 4, (64, 8)).astype(np.float32)


@pytest.mark.parametrize("zero", [0, 55, -31, 127, -127])
@pytest.mark.parametrize("unsigned", [False, True])
def test_activation_is_quantised_on_the_promised_grid(unsigned: bool, zero: int) -> None:
    model, x, step = _model(), _images(), 0.0125
    weight, bias = (_array(model.graph.initializers[f"fc.{part}"]) for part in ("weight", "bias"))
    node = _node(model, "fc/MatMul")
    QdqWriter(model.graph, unsigned=unsigned).activation(node, 0, "fc", step, zero)
    found, other = _run(model, x)
    # int8 starts at -128, uint8 at 0: one more level at the bottom, 128 - zero as zero point.
    low, high = (-(128 - zero), 127 + zero) if unsigned else (-128 + zero, 127 + zero)
    if not unsigned:
        grid = np.clip(np.rint((x - np.float32(step * zero)) / np.float32(step)), -128, 127)
        expected = (grid * step) @ weight + bias
    else:
        grid = np.clip(np.rint(x / np.float32(step)), low, high)
        expected = (grid * step) @ weight + bias
    # float32 rounding of sums of eight terms, and a few values on the edge of a level.
    close = np.abs(found - expected) < 1e-4
    assert close.mean() > 0.98
    assert np.abs(found - expected).max() < 4 * step
    # The other reader of x is unchanged.
    assert np.array_equal(other, np.maximum(x, 0))


@pytest.mark.parametrize("zero", [0, 55])
def test_both_dialects_hold_one_grid(zero: int) -> None:
    x, step = _images(), 0.0125
    models = []
    for unsigned in (False, True):
        model = _model()
        node = _node(model, "fc/MatMul")
        QdqWriter(model.graph, unsigned=unsigned).activation(node, 0, "fc", step, zero)
        models.append((model, _run(model, x)[0]))
    (signed, one), (_, two) = models
    # The Sub changes each row by the same amount: step * zero times the weight's column sums.
    lost = step * zero * _array(signed.graph.initializers["fc.weight"]).sum(axis=0)
    close = np.abs(one + lost - two) < 1e-3
    # As above: edges of levels.
    assert close.mean() > 0.98
    assert zero == 0 or not (np.abs(one - two) < 1e-3).all()


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("zero", [0, 55])
def test_nodes_are_those_of_the_dialect(unsigned: bool, zero: int) -> None:
    model = _model()
    node = _node(model, "fc/MatMul")
    QdqWriter(model.graph, unsigned=unsigned).activation(node, 0, "fc", 0.5, zero)
    added = [n.op_type for n in model.graph if n.name.startswith("fc/") and "MatMul" not in n.name]
    shift = ["Sub"] if zero and not unsigned else []
    assert added == [*shift, "QuantizeLinear", "DequantizeLinear", "Add"]
    point = _array(model.graph.initializers["fc.input_zero_point"])
    assert point.dtype == (np.uint8 if unsigned else np.int8)
    assert int(point) == (128 - zero if unsigned else 0)
    assert float(_array(model.graph.initializers["fc.input_scale"])) == 0.5
    assert ("fc.input_shift" in model.graph.initializers) == bool(shift)
    pair = _node(model, "fc/Q"), _node(model, "fc/DQ")
    assert list(pair[0].inputs[1:]) == list(pair[1].inputs[1:])


def test_weight_is_replaced_by_int8() -> None:
    model, x = _model(), _images()
    integers = np.random.default_rng(2).integers(-127, 128, (8, 4)).astype(np.int8)
    scale = np.float32([0.5, 0.25, 2.0, 0.125])
    bias = _array(model.graph.initializers["fc.bias"])
    node = _node(model, "fc/MatMul")
    QdqWriter(model.graph, unsigned=False).weight(node, "fc", integers, scale, axis=1)
    assert "fc.weight" not in model.graph.initializers
    assert _array(model.graph.initializers["fc.weight/int8"]).dtype == np.int8
    # float32 sums of eight terms up to 1000.
    np.testing.assert_allclose(_run(model, x)[0], x @ (integers * scale) + bias, atol=2e-3)
    wrong = x @ (integers * scale[::-1]) + bias
    assert np.abs(_run(model, x)[0] - wrong).max() > 1


def test_weight_with_a_second_reader_stays_for_it() -> None:
    model = _model()
    weight = model.graph.initializers["fc.weight"]
    second = ir.node("MatMul", [model.graph.inputs[0], weight], name="second/MatMul")
    second.outputs[0].name = "w"
    model.graph.append(second)
    node = _node(model, "fc/MatMul")
    integers, scale = np.ones((8, 4), np.int8), np.ones(4, np.float32)
    QdqWriter(model.graph, unsigned=False).weight(node, "fc", integers, scale, axis=1)
    assert model.graph.initializers["fc.weight"] is weight
    assert second.inputs[1] is weight
    assert node.inputs[1] is not weight


def _product(op: str, *, bias: bool, output: str = "y") -> ir.Model:
    """One product with a weight for four output channels; its output is the graph's."""
    rng = np.random.default_rng(0)
    shapes = {"MatMul": (8, 4), "Gemm": (4, 8), "Conv": (4, 8, 1, 1)}
    images = {"MatMul": ["batch", 8], "Gemm": ["batch", 8], "Conv": ["batch", 8, 1, 1]}
    answers = {"MatMul": ["batch", 4], "Gemm": ["batch", 4], "Conv": ["batch", 4, 1, 1]}
    weights = [onnx.numpy_helper.from_array(rng.standard_normal(shapes[op]).astype("f4"), "w")]
    if bias:
        weights.append(onnx.numpy_helper.from_array(rng.standard_normal(4).astype("f4"), "b"))
    extra = {"transB": 1} if op == "Gemm" else {}
    inputs = ["x", *(weight.name for weight in weights)]
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, inputs, [output], name=f"fc/{op}", **extra)],
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, images[op])],
        [onnx.helper.make_tensor_value_info(output, kind, answers[op])],
        weights,
    )
    opsets = [onnx.helper.make_opsetid("", 20)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))


@pytest.mark.parametrize(
    ("op", "bias"), [("MatMul", False), ("Gemm", False), ("Gemm", True), ("Conv", True)]
)
def test_both_forms_of_the_scales_compute_the_same(op: str, bias: bool) -> None:
    axis = {"MatMul": 1, "Gemm": 0, "Conv": 0}[op]
    # Powers of two, so that the ratios are exact.
    scale = np.float32([0.5, 0.25, 2.0, 0.125])
    shape = {"MatMul": (8, 4), "Gemm": (4, 8), "Conv": (4, 8, 1, 1)}[op]
    integers = np.random.default_rng(2).integers(-127, 128, shape).astype(np.int8)
    x = _images().reshape((64, 8, 1, 1) if op == "Conv" else (64, 8))
    found = []
    for scales in ("channel", "ratio"):
        model = _product(op, bias=bias)
        writer = QdqWriter(model.graph, unsigned=False, scales=scales)  # type: ignore[arg-type]
        writer.weight(_node(model, f"fc/{op}"), "fc", integers, scale, axis)
        stored = next(v for n, v in model.graph.initializers.items() if n.endswith("/int8"))
        assert np.array_equal(_array(stored), integers)
        dq = _node(model, "fc/weight_DQ")
        assert _array(dq.inputs[1]).shape == (() if scales == "ratio" else (4,))
        (found_y,) = _run(model, x)
        found.append(found_y)
    # float32 sums of eight terms up to 1000.
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)
    # The largest scale for all channels, without the ratios, would be far off.
    assert np.abs(found[0]).max() > 10


def test_the_ratio_form_keeps_the_names_of_tensors() -> None:
    model = _model()
    integers, scale = np.ones((8, 4), np.int8), np.float32([0.5, 0.25, 2.0, 0.125])
    node = _node(model, "fc/MatMul")
    QdqWriter(model.graph, unsigned=False, scales="ratio").weight(node, "fc", integers, scale, 1)
    ratio = _node(model, ratio_name("fc"))
    assert ratio.outputs[0].name == "product"
    assert ratio.inputs[0] is node.outputs[0]
    assert _node(model, "fc/Add").inputs[0] is ratio.outputs[0]
    np.testing.assert_array_equal(_array(ratio.inputs[1]), scale / 2)
