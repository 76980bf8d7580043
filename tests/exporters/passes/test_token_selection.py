"""The end of a text in one node, and graphs that only look as if they selected tokens."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from exporters.passes.token_selection import SelectTokens

TOKENS, WIDTH = 5, 4


def _graph(edits: dict[str, str], **constants: list[int]) -> ir.Model:
    """x, i -> the tokens i of x, as torch.onnx writes it; ``edits`` change the text."""
    text = f"""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[batch, {TOKENS}, {WIDTH}] x, int64[batch, 1] i) => (float[batch, {WIDTH}] y)
        {{
            deep = Unsqueeze(i, axis)
            wide = Expand(deep, shape)
            found = GatherElements<axis = 1>(x, wide)
            token = Gather<axis = 1>(found, first)
            y = Neg(token)
        }}
    """
    for old, new in edits.items():
        assert old in text
        text = text.replace(old, new)
    proto = onnx.parser.parse_model(text)
    values = {"axis": [2], "shape": [1, 1, WIDTH], **constants}
    arrays = {name: np.array(value, np.int64) for name, value in values.items()}
    for name, array in (arrays | {"first": np.array(constants.get("first", [0])[0])}).items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def _run(model: ir.Model) -> list[NDArray[np.float32]]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    x = np.random.default_rng(0).standard_normal((3, TOKENS, WIDTH)).astype(np.float32)
    return session.run(None, {"x": x, "i": np.array([[1], [0], [4]])})


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_four_nodes_become_one() -> None:
    model = _graph({})
    before = _run(model)
    assert SelectTokens()(model).modified
    assert _operators(model) == ["GatherND", "Neg"]
    assert set(model.graph.initializers) == set()
    np.testing.assert_array_equal(_run(model), before)


@pytest.mark.parametrize(
    ("edits", "constants"),
    [
        ({"GatherElements<axis = 1>": "GatherElements<axis = 2>"}, {}),
        # An index for each token, of which the second is taken.
        ({"int64[batch, 1] i": "int64[batch, 2] i"}, {"first": [1]}),
        ({"y = Neg(token)": "y = Neg(token) other = Identity(wide) z = ReduceSum(other)"}, {}),
        ({"=> (float[batch, 4] y)": "=> (float[batch, 4] y, int64[batch, 1, 4] wide)"}, {}),
    ],
)
def test_other_graphs_stay_as_they_are(
    edits: dict[str, str], constants: dict[str, list[int]]
) -> None:
    model = _graph(edits, **constants)
    before = _operators(model)
    assert not SelectTokens()(model).modified
    assert _operators(model) == before
