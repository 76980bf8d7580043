from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from exporters.passes.naming import NameByModule, scope_of

_SCOPES = "pkg.torch.onnx.name_scopes"

_GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 3, 4] image) => (float[batch, 3, 4] logits)
<float[4, 4] val_1, float[4] val_2, float val_3, float[4] scores_bias>
{
    linear = MatMul(image, val_1)
    add_5 = Add(linear, val_2)
    a, b = Split<axis = 1, num_outputs = 2>(add_5)
    helper = Identity(val_3)
    mul = Mul(a, helper)
    mul_1 = Mul(mul, val_3)
    cat = Concat<axis = 1>(mul_1, b)
    logits = Add(cat, scores_bias)
}
"""
# The path that torch.onnx leaves: every module from the root, then the node's own name.
_PATHS = [
    "['', 'blocks.0', 'blocks.0.fc', 'linear']",
    "['', 'blocks.0', 'blocks.0.fc', 'add_5']",
    "['', 'blocks.0', 'split']",
    None,
    "['', 'blocks.0', 'mul']",
    "['', 'blocks.0', 'mul_1']",
    "['', 'cat']",
    "['', 'logits']",
]


def _traced() -> ir.Model:
    proto = onnx.parser.parse_model(_GRAPH)
    weights = list(proto.graph.initializer)
    assert not weights
    for name, shape in (("val_1", (4, 4)), ("val_2", (4,)), ("val_3", ()), ("scores_bias", (4,))):
        size = 16 if shape == (4, 4) else 4 if shape else 1
        proto.graph.initializer.append(
            onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, shape, [0.5] * size)
        )
    model = ir.from_proto(proto)
    for node, path in zip(model.graph, _PATHS, strict=True):
        if path is not None:
            node.metadata_props[_SCOPES] = path
    return model


def test_nodes_are_named_by_module_and_operator() -> None:
    model = _traced()
    result = NameByModule()(model)
    assert result.modified
    assert [node.name for node in model.graph] == [
        "blocks.0.fc/MatMul",
        "blocks.0.fc/Add",
        "blocks.0/Split",
        "blocks.0/Identity",
        "blocks.0/Mul",
        "blocks.0/Mul_1",
        "vit/Concat",
        "vit/Add",
    ]


def test_last_node_of_a_leaf_module_bears_its_name() -> None:
    model = _traced()
    NameByModule()(model)
    assert [[value.name for value in node.outputs] for node in model.graph] == [
        ["blocks.0.fc/MatMul"],
        ["blocks.0.fc"],
        ["blocks.0/Split:0", "blocks.0/Split:1"],
        ["blocks.0/Identity"],
        ["blocks.0/Mul"],
        ["blocks.0/Mul_1"],
        ["vit/Concat"],
        ["logits"],
    ]


def test_interface_keeps_its_names() -> None:
    model = _traced()
    NameByModule()(model)
    assert [value.name for value in model.graph.inputs] == ["image"]
    assert [value.name for value in model.graph.outputs] == ["logits"]


def test_anonymous_constants_are_named_and_known_ones_kept() -> None:
    model = _traced()
    NameByModule()(model)
    assert set(model.graph.initializers) == {
        "blocks.0.fc.weight",
        "blocks.0.fc/Add.constant",
        "blocks.0/Identity.constant",
        "scores_bias",
    }


def test_torchs_metadata_is_dropped() -> None:
    model = _traced()
    NameByModule()(model)
    assert all(not node.metadata_props for node in model.graph)


def test_renamed_graph_is_valid() -> None:
    model = _traced()
    NameByModule()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("['', 'blocks.7', 'blocks.7.mlp', 'blocks.7.mlp.fc2', 'linear_3']", "blocks.7.mlp.fc2"),
        ("['', 'add']", ""),
        ("['add']", ""),
    ],
)
def test_scope_is_the_innermost_module(path: str, scope: str) -> None:
    node = ir.node("Add", [ir.val("a"), ir.val("b")])
    node.metadata_props[_SCOPES] = path
    assert scope_of(node) == scope


def test_node_without_path_takes_its_consumers() -> None:
    nodes = list(_traced().graph)
    assert scope_of(nodes[3]) == "blocks.0"
    alone = ir.node("Add", [ir.val("a"), ir.val("b")])
    assert scope_of(alone) == ""
