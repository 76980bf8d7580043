from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from clipdeploy.core.errors import ArtifactError, GraphError
from clipdeploy.models import cards
from clipdeploy.packaging.artifact import open_packable
from clipdeploy.stages.package import package_triton
from clipdeploy.workspace.folder import Workspace
from exporters.headers import existing_graph, read_passport, read_skeleton


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_it_is_the_graph_without_its_weights(precision: str, demo_workspace: Workspace) -> None:
    path = demo_workspace.graph(cards.DEMO, precision)  # type: ignore[arg-type]
    whole, lean = onnx.load(path), read_skeleton(path)
    assert lean.ByteSize() < whole.ByteSize() / 5
    assert [weight.name for weight in lean.graph.initializer] == [
        weight.name for weight in whole.graph.initializer
    ]
    for kept, weight in zip(lean.graph.initializer, whole.graph.initializer, strict=True):
        assert (kept.dims, kept.data_type) == (weight.dims, weight.data_type)
        assert kept.raw_data in (weight.raw_data, b"")
    for model in (whole, lean):
        del model.graph.initializer[:]
    assert lean == whole


def test_a_file_in_one_piece_is_read_too(demo_workspace: Workspace, tmp_path: Path) -> None:
    path = demo_workspace.graph(cards.DEMO, "fp32")
    onnx.save(onnx.load(path), tmp_path / "one.onnx")
    assert read_skeleton(tmp_path / "one.onnx") == read_skeleton(path)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.999])
def test_a_cut_file_is_refused(keep: float, demo_workspace: Workspace, tmp_path: Path) -> None:
    data = demo_workspace.graph(cards.DEMO, "fp32").read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(GraphError, match=r"cut\.onnx is not a readable ONNX graph"):
        read_skeleton(path)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photo.onnx"
    path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)) * 64)
    with pytest.raises(GraphError, match=r"photo\.onnx is not a readable ONNX graph"):
        read_skeleton(path)


def with_data_outside(graph: Path, folder: Path, *, vouched: bool = True) -> Path:
    """A copy of a graph with its weights in ``g.data`` beside it."""
    model, path = onnx.load(graph), folder / "g.onnx"
    if not vouched:
        del model.metadata_props[:]
    onnx.save(model, path, save_as_external_data=True, location="g.data", size_threshold=64)
    return path


def test_a_passport_does_not_vouch_for_weights_in_another_file(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    """Every hash is that of the graph's file: the weights beside it could be exchanged."""
    path = with_data_outside(demo_workspace.graph(cards.DEMO, "fp32"), tmp_path)
    for use in (read_passport, open_packable, lambda path: package_triton(path, tmp_path / "out")):
        with pytest.raises(ArtifactError, match=r"keeps weights in g\.data"):
            use(path)
    assert existing_graph(path) is None
    assert not (tmp_path / "out").exists()


def outside() -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "t")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="other.bin")
    return tensor


def in_a_constant(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["t"], value=outside()))


def in_a_branch(model: onnx.ModelProto) -> None:
    branch = helper.make_graph([], "b", [], [], initializer=[outside()])
    model.graph.node.append(helper.make_node("If", ["c"], [], then_branch=branch))


def in_a_function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["t"], value=outside())
    model.functions.append(helper.make_function("d", "f", [], ["t"], [node], []))


def in_a_sparse_weight(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add().values.CopyFrom(outside())


@pytest.mark.parametrize("where", [in_a_constant, in_a_branch, in_a_function, in_a_sparse_weight])
def test_weights_outside_are_found_at_any_depth(
    where: Callable[[onnx.ModelProto], None], demo_workspace: Workspace, tmp_path: Path
) -> None:
    model = onnx.load(demo_workspace.graph(cards.DEMO, "fp32"))
    where(model)
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"keeps weights in other\.bin"):
        read_passport(tmp_path / "g.onnx")


def test_messages_nested_without_end_are_no_graph(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    node = b""
    for _ in range(3000):  # a node's attribute holds a graph, which holds a node
        for key in (0x32, 0x2A, 0x0A):
            node = bytes([key]) + _length(len(node)) + node
    data = demo_workspace.graph(cards.DEMO, "fp32").read_bytes()
    path = tmp_path / "deep.onnx"
    path.write_bytes(data + b"\x3a" + _length(len(node)) + node)
    with pytest.raises(ArtifactError, match="not a readable ONNX graph"):
        read_passport(path)


def _length(size: int) -> bytes:
    return bytes([*(size >> shift & 0x7F | 0x80 for shift in (0, 7, 14)), size >> 21])
