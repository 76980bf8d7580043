from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from shared_constants import KINDS, alike, shared

from clipdeploy.core.errors import GraphError
from exporters.graphs import load_graph, write_model
from exporters.initializers import (
    add_initializer,
    own_initializer,
    remove_unused,
    set_values,
    shared_initializer,
    values_of,
    write_initializer,
)
from exporters.passes.attention_scale import FoldAttentionScale
from exporters.passes.opset import SetOpset
from exporters.precision import Fp16Config, half_precision
from exporters.session import OnnxSession

Images = NDArray[np.float32]


def _two_readers(constant_node: bool = False) -> ir.Model:
    """y = (x + c) + c"""
    x = ir.val("x", ir.DataType.FLOAT, [2])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="two")
    if constant_node:
        tensor = ir.Tensor(np.ones(2, np.float32), name="a.bias")
        node = ir.node("Constant", [], {"value": tensor}, name="constant")
        graph.append(node)
        value = node.outputs[0]
        value.name, value.const_value = "a.bias", tensor
    else:
        value = add_initializer(graph, "a.bias", np.ones(2, np.float32))
    one = ir.node("Add", [x, value], name="a/Add")
    two = ir.node("Add", [one.outputs[0], value], name="b/Add")
    one.outputs[0].name, two.outputs[0].name = "a", "y"
    for node in (one, two):
        node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
        graph.append(node)
    graph.outputs.append(two.outputs[0])
    return ir.Model(graph, ir_version=10)


def _run(model: ir.Model, images: Images, folder: Path) -> Images:
    write_model(model, folder / "written.onnx")
    (found,) = OnnxSession(folder / "written.onnx").run(images)
    return found


@pytest.mark.parametrize("constant_node", [False, True])
def test_a_constant_is_written_for_one_reader_alone(constant_node: bool, tmp_path: Path) -> None:
    model = _two_readers(constant_node)
    second = model.graph[-1]
    value = write_initializer(second, 1, np.full(2, 5, np.float32))
    assert value.name == "b.bias"
    assert _run(model, np.zeros(2, np.float32), tmp_path).tolist() == [6, 6]
    # It is the node's own by now.
    assert write_initializer(second, 1, np.full(2, 7, np.float32)) is value
    assert _run(model, np.zeros(2, np.float32), tmp_path).tolist() == [8, 8]


def test_the_only_reader_keeps_the_constant_and_its_name() -> None:
    model = _two_readers()
    first, second = model.graph
    copied = own_initializer(first, 1)
    # The name of its module is taken by the constant that was shared.
    assert copied.name == "a.bias_1"
    assert own_initializer(second, 1).name == "a.bias"


def test_a_node_that_reads_a_constant_twice_has_two_afterwards() -> None:
    model = _two_readers()
    second = model.graph[-1]
    second.replace_input_with(0, second.inputs[1])
    write_initializer(second, 1, np.full(2, 5, np.float32))
    assert second.inputs[0] is not second.inputs[1]


@pytest.mark.parametrize("index", [0, 2])
def test_what_is_no_constant_is_refused(index: int) -> None:
    with pytest.raises(GraphError, match=f"input {index} of a/Add is not a constant"):
        own_initializer(_two_readers().graph[0], index)


def _scaled(model: ir.Model) -> None:
    """The traced form again: each query times a power of two, which the pass folds."""
    for split in [node for node in model.graph if node.op_type == "Split"]:
        query = split.outputs[0]
        readers = list(query.uses())
        four = np.asarray(4, np.float32)
        factor = add_initializer(model.graph, f"{split.name}/factor", four)
        mul = ir.node("Mul", [query, factor], name=f"{split.name}/Mul")
        mul.outputs[0].name = f"{split.name}/scaled"
        mul.outputs[0].type, mul.outputs[0].shape = query.type, query.shape
        model.graph.insert_after(split, mul)
        for use in readers:
            use.node.replace_input_with(use.idx, mul.outputs[0])


def _fold_scale(model: ir.Model) -> None:
    before = len(model.graph)
    FoldAttentionScale()(model)
    assert len(model.graph) < before


SOME_KEPT = Fp16Config(keep=("blocks.1.norm1", "blocks.0.mlp.fc2"))
PASSES: dict[str, tuple[Callable[[ir.Model], None], Callable[[ir.Model], object]]] = {
    "attention scale": (_scaled, _fold_scale),
    "opset 17": (lambda model: None, SetOpset(17)),
    "opset 19": (lambda model: None, SetOpset(19)),
    "fp16": (lambda model: None, lambda model: half_precision(model, Fp16Config())),
    "fp16, some kept": (lambda model: None, lambda model: half_precision(model, SOME_KEPT)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", PASSES)
def test_every_pass_keeps_the_function_of_a_graph_with_shared_constants(
    which: str, kind: str, tiny_graph: Path, tiny_images: Images, tmp_path: Path
) -> None:
    prepare, run = PASSES[which]
    own = alike(tiny_graph, tmp_path / "own.onnx", kind)
    model = load_graph(shared(own, tmp_path / "shared.onnx"))
    prepare(model)
    expected = _run(model, tiny_images, tmp_path)
    run(model)
    found = _run(model, tiny_images, tmp_path)
    # float16 keeps eleven bits, and errors of some sixty of them add up.
    share = 1e-2 if which.startswith("fp16") else 1e-5
    assert np.abs(found - expected).max() < share * np.abs(expected).max()


def test_pads_that_two_nodes_share_are_spread_for_each(tmp_path: Path) -> None:
    x = ir.val("x", ir.DataType.FLOAT, [1, 2])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="pads")
    pads = add_initializer(graph, "pads", np.asarray([0, 1], np.int64))
    value: ir.Value = x
    for number, axis in enumerate((1, 0)):
        axes = add_initializer(graph, f"axes_{number}", np.asarray([axis], np.int64))
        node = ir.node("Pad", [value, pads, None, axes], name=f"pad_{number}")
        value = node.outputs[0]
        value.name, value.type = f"y_{number}", x.type
        value.shape = ir.Shape([1 + number, 3])
        graph.append(node)
    graph.outputs.append(value)
    model = ir.Model(graph, ir_version=8)
    images = np.ones((1, 2), np.float32)
    expected = _run(model, images, tmp_path)
    SetOpset(17)(model)
    assert onnx.load(tmp_path / "written.onnx").opset_import[0].version == 20
    assert np.array_equal(_run(model, images, tmp_path), expected)


def test_values_type_and_shape_are_replaced_for_every_reader() -> None:
    model = _two_readers()
    value = model.graph.initializers["a.bias"]
    set_values(value, np.full((2, 1), 3, np.float16))
    assert values_of(value).tolist() == [[3], [3]]
    assert (value.dtype, value.shape) == (ir.DataType.FLOAT16, ir.Shape((2, 1)))
    assert all(node.inputs[1] is value for node in model.graph)


def test_a_shared_constant_is_added_once() -> None:
    graph = _two_readers().graph
    one = shared_initializer(graph, "one", np.ones(1, np.float32))
    assert shared_initializer(graph, "one", np.zeros(1, np.float32)) is one
    assert values_of(one).tolist() == [1]


def test_only_constants_without_a_reader_are_removed() -> None:
    graph = _two_readers().graph
    add_initializer(graph, "unread", np.ones(1, np.float32))
    returned = add_initializer(graph, "returned", np.ones(1, np.float32))
    graph.outputs.append(returned)
    remove_unused(graph)
    assert set(graph.initializers) == {"a.bias", "returned"}


def test_a_constant_without_values_is_refused() -> None:
    value = _two_readers().graph.initializers["a.bias"]
    value.const_value = None
    with pytest.raises(GraphError, match=r"the weight a\.bias has no data"):
        values_of(value)
