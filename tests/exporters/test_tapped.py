from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from exporters.graphs import load_graph
from exporters.session import OnnxSession
from exporters.tapped import add_tap, free_batch, serialised


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """logits = (2 x) + 1, for a batch of exactly two."""
    one, two = (helper.make_tensor(n, TensorProto.FLOAT, [], [v]) for n, v in (("a", 1), ("b", 2)))
    nodes = [
        helper.make_node("Mul", ["x", "b"], ["doubled"]),
        helper.make_node("Add", ["doubled", "a"], ["logits"]),
    ]
    x, logits, doubled = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3])
        for name in ("x", "logits", "doubled")
    )
    inner = helper.make_graph(nodes, "g", [x], [logits], [one, two], value_info=[doubled])
    path = tmp_path / "graph.onnx"
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(inner, opset_imports=[opset], ir_version=9), path)
    return path


def tapped(path: Path) -> ir.Model:
    model = load_graph(path)
    (doubled,) = (node.outputs[0] for node in model.graph if node.op_type == "Mul")
    size = ir.node("Abs", [doubled])
    add_tap(model, "peak", [size, ir.node("ReduceMax", [size.outputs[0]], {"keepdims": 0})])
    return model


def x(batch: int) -> NDArray[np.float32]:
    return np.arange(-3 * batch, 0, dtype=np.float32).reshape(batch, 3)


def test_a_tap_is_a_further_output(graph: Path) -> None:
    session = OnnxSession(serialised(tapped(graph)), threads=1)
    assert session.output_names == ["logits", "peak"]
    logits, peak = session.run(x(2))
    np.testing.assert_array_equal(logits, 2 * x(2) + 1)
    assert peak == 12


@pytest.mark.parametrize("batch", [1, 5])
def test_any_batch_runs_through_a_graph_of_a_fixed_one(graph: Path, batch: int) -> None:
    model = tapped(graph)
    free_batch(model)
    session = OnnxSession(serialised(model), threads=1)
    assert session.batch is None
    logits, peak = session.run(x(batch))
    np.testing.assert_array_equal(logits, 2 * x(batch) + 1)
    assert peak == 6 * batch


def test_the_names_of_two_taps_do_not_meet(graph: Path) -> None:
    model = tapped(graph)
    (doubled,) = (node.outputs[0] for node in model.graph if node.op_type == "Mul")
    add_tap(model, "peak/0", [ir.node("Neg", [doubled])])
    logits, peak, negative = OnnxSession(serialised(model), threads=1).run(x(2))
    assert peak == 12
    np.testing.assert_array_equal(negative, 1 - logits)
