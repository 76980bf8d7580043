"""Lowering to an older opset keeps what a node's attributes say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

from clipdeploy.core.errors import GraphError
from exporters.graphs import load_graph, write_model
from exporters.passes.opset import SetOpset
from exporters.session import OnnxSession

Array = NDArray[np.float32]
VALUES = np.linspace(-6, 6, 480, dtype=np.float32).reshape(10, 48)


Constants = dict[str, NDArray[np.generic]]


def _saved(path: Path, nodes: list[onnx.NodeProto], constants: Constants) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [10, 48])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def _lowered(path: Path, opset: int, folder: Path) -> tuple[ir.Model, Array]:
    model = load_graph(path)
    SetOpset(opset)(model)
    write_model(model, folder / "lowered.onnx")
    (found,) = OnnxSession(folder / "lowered.onnx").run(VALUES)
    return model, found


@pytest.mark.parametrize("opset", [17, 18, 19, 20, 23])
@pytest.mark.parametrize("before", ["MatMul", "Identity"])
@pytest.mark.parametrize("approximate", ["tanh", "none", None])
def test_gelu_is_the_one_that_the_node_names(
    approximate: str | None, before: str, opset: int, tmp_path: Path
) -> None:
    named = {} if approximate is None else {"approximate": approximate}
    weight = np.random.default_rng(0).standard_normal((48, 4)).astype(np.float32)
    inputs = ["g", "w"] if before == "MatMul" else ["g"]
    nodes = [helper.make_node("Gelu", ["x"], ["g"], name="mlp/Gelu", **named)]
    nodes.append(helper.make_node(before, inputs, ["y"], name="next"))
    path = _saved(tmp_path / "gelu.onnx", nodes, {"w": weight} if before == "MatMul" else {})
    model, found = _lowered(path, opset, tmp_path)
    expected = F.gelu(torch.from_numpy(VALUES), approximate=approximate or "none").numpy()
    expected = expected @ weight if before == "MatMul" else expected
    # The two formulas are up to 5e-4 apart; float32 rounding of sums of 48 is 1e-5.
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert ("Gelu" in {node.op_type for node in model.graph}) == (opset >= 20)


def test_a_gelu_of_another_kind_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Gelu", ["x"], ["y"], name="mlp/Gelu", approximate="sigmoid")
    model = load_graph(_saved(tmp_path / "gelu.onnx", [node], {}))
    with pytest.raises(GraphError, match="mlp/Gelu is a Gelu with approximate='sigmoid'"):
        SetOpset(17)(model)
    SetOpset(21)(model)


@pytest.mark.parametrize("axes", [[1], [-1], [0], [-2], [1, 0], [-1, -2]])
def test_pad_keeps_its_axes(axes: list[int], tmp_path: Path) -> None:
    pads = np.arange(1, 2 * len(axes) + 1, dtype=np.int64)
    constants: Constants = {
        "pads": pads,
        "value": np.asarray(3, np.float32),
        "axes": np.asarray(axes, np.int64),
    }
    node = helper.make_node("Pad", ["x", "pads", "value", "axes"], ["y"], name="pad")
    path = _saved(tmp_path / "pad.onnx", [node], constants)
    (expected,) = OnnxSession(path).run(VALUES)
    assert np.array_equal(_lowered(path, 17, tmp_path)[1], expected)


@pytest.mark.parametrize(("parts", "axis"), [(3, 1), (5, 1), (5, -1), (2, 0), (3, 0)])
def test_split_keeps_its_parts(parts: int, axis: int, tmp_path: Path) -> None:
    outputs = [f"part_{number}" for number in range(parts)]
    split = helper.make_node("Split", ["x"], outputs, name="split", axis=axis, num_outputs=parts)
    joined = helper.make_node("Concat", outputs[::-1], ["y"], name="join", axis=axis)
    path = _saved(tmp_path / "split.onnx", [split, joined], {})
    (expected,) = OnnxSession(path).run(VALUES)
    assert np.array_equal(_lowered(path, 17, tmp_path)[1], expected)
