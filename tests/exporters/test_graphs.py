"""Graph files: saved, loaded, damaged."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from clipdeploy.core.errors import ArtifactError, FileError, GraphError
from clipdeploy.core.passport import PASSPORT_KEY
from exporters.graphs import (
    load_graph,
    model_pieces,
    read_proto,
    save_graph,
    structure,
    weight_proto,
    write_model,
)
from exporters.headers import existing_graph, read_passport
from exporters.session import OnnxSession


def _damage(source: Path, target: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    proto = onnx.ModelProto.FromString(source.read_bytes())
    change(proto)
    target.write_bytes(proto.SerializeToString())
    return target


def test_saved_graph_is_the_same_graph(tiny_graph: Path, tmp_path: Path) -> None:
    path = tmp_path / "again.onnx"
    passport = read_passport(tiny_graph)
    artifact = save_graph(load_graph(tiny_graph), path, passport)
    before = onnx.ModelProto.FromString(tiny_graph.read_bytes())
    after = onnx.ModelProto.FromString(path.read_bytes())
    assert list(after.graph.node) == list(before.graph.node)
    assert list(after.graph.value_info) == list(before.graph.value_info)
    weights = {w.name: numpy_helper.to_array(w).tobytes() for w in before.graph.initializer}
    assert {w.name: numpy_helper.to_array(w).tobytes() for w in after.graph.initializer} == weights
    assert artifact.passport == read_passport(path) == passport
    assert artifact.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert artifact.bytes == path.stat().st_size
    assert artifact.nodes == len(after.graph.node)
    assert artifact.changed


def test_pieces_are_one_message(tiny_graph: Path) -> None:
    model = load_graph(tiny_graph)
    merged = onnx.ModelProto.FromString(b"".join(model_pieces(model)))
    assert [w.name for w in merged.graph.initializer] == list(model.graph.initializers)
    onnx.checker.check_model(merged, full_check=True)


def test_structure_holds_no_weight(tiny_graph: Path) -> None:
    proto = structure(load_graph(tiny_graph))
    assert not proto.graph.initializer
    assert proto.ByteSize() < tiny_graph.stat().st_size / 2


def test_existing_graph_is_unchanged(tiny_graph: Path) -> None:
    found = existing_graph(tiny_graph)
    assert found is not None
    assert not found.changed
    assert found.passport == read_passport(tiny_graph)
    assert found.sha256 == hashlib.sha256(tiny_graph.read_bytes()).hexdigest()
    assert found.nodes == len(list(load_graph(tiny_graph).graph))


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.999])
def test_truncated_file_is_refused(tiny_graph: Path, tmp_path: Path, fraction: float) -> None:
    data = tiny_graph.read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(GraphError, match=r"cut\.onnx is not a readable ONNX graph"):
        load_graph(path)
    with pytest.raises(ArtifactError, match=r"cut\.onnx is not a readable ONNX graph"):
        read_passport(path)
    with pytest.raises(GraphError, match="cannot load"):
        OnnxSession(path)
    assert existing_graph(path) is None


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.onnx"
    path.write_text("These are my notes.")
    with pytest.raises(GraphError):
        load_graph(path)
    with pytest.raises(ArtifactError):
        read_passport(path)
    assert existing_graph(path) is None


@pytest.mark.parametrize("read", [load_graph, read_passport])
def test_missing_file_is_a_file_error(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot read .*absent"):
        read(tmp_path / "absent.onnx")
    assert existing_graph(tmp_path / "absent.onnx") is None


def test_graph_without_passport_is_refused(tiny_graph: Path, tmp_path: Path) -> None:
    path = _damage(tiny_graph, tmp_path / "g.onnx", lambda p: p.ClearField("metadata_props"))
    with pytest.raises(ArtifactError, match="has no passport"):
        read_passport(path)
    assert existing_graph(path) is None


def test_graph_with_damaged_passport_is_refused(tiny_graph: Path, tmp_path: Path) -> None:
    def cut(proto: onnx.ModelProto) -> None:
        (entry,) = [e for e in proto.metadata_props if e.key == PASSPORT_KEY]
        entry.value = entry.value[:-20]

    path = _damage(tiny_graph, tmp_path / "g.onnx", cut)
    with pytest.raises(ArtifactError, match=r"the passport of .*g\.onnx cannot be read"):
        read_passport(path)


def test_weight_without_data_is_refused_and_nothing_is_left(
    tiny_graph: Path, tmp_path: Path
) -> None:
    path = tmp_path / "g.onnx"
    shutil.copy(tiny_graph, path)
    model = load_graph(path)
    model.graph.initializers["head.weight"].const_value = None
    with pytest.raises(GraphError, match=r"head\.weight has no data"):
        weight_proto(model.graph.initializers["head.weight"])
    with pytest.raises(GraphError, match=r"head\.weight has no data"):
        save_graph(model, path, read_passport(tiny_graph))
    assert path.read_bytes() == tiny_graph.read_bytes()
    assert os.listdir(tmp_path) == ["g.onnx"]


def test_write_model_keeps_every_dtype(tmp_path: Path) -> None:
    arrays = [
        np.arange(4, dtype=np.int8),
        np.arange(4, dtype=np.int64),
        np.linspace(0, 1, 4, dtype=np.float16),
        np.zeros((), np.float32),
        np.zeros((0,), np.float32),
    ]
    values = [
        ir.Value(
            name=f"w{i}",
            type=ir.TensorType(ir.tensor(array).dtype),
            shape=ir.Shape(array.shape),
            const_value=ir.Tensor(array, name=f"w{i}"),
        )
        for i, array in enumerate(arrays)
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 20}, name="g")
    write_model(ir.Model(graph, ir_version=10), tmp_path / "g.onnx")
    read = ir.from_proto(onnx.load(tmp_path / "g.onnx")).graph.initializers
    for i, array in enumerate(arrays):
        tensor = read[f"w{i}"].const_value
        assert tensor is not None
        found = tensor.numpy()
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()


def test_damaged_graph_that_is_still_protobuf_is_refused(tiny_graph: Path, tmp_path: Path) -> None:
    def spoil(proto: onnx.ModelProto) -> None:
        proto.graph.initializer[0].data_type = 99

    path = _damage(tiny_graph, tmp_path / "g.onnx", spoil)
    with pytest.raises(GraphError):
        load_graph(path)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"")
    with pytest.raises(GraphError):
        load_graph(tmp_path / "g.onnx")


@pytest.mark.parametrize("read", [load_graph, existing_graph])
def test_file_cut_between_two_weights_is_refused(
    read: Callable[[Path], object], tiny_graph: Path, tmp_path: Path
) -> None:
    pieces = list(model_pieces(load_graph(tiny_graph)))
    path = tmp_path / "g.onnx"
    path.write_bytes(b"".join(pieces[:-3]))
    with pytest.raises(GraphError):
        OnnxSession(path)
    try:
        assert read(path) is None
    except GraphError:
        return


def _outside(graph: Path, folder: Path) -> Path:
    path = folder / "g.onnx"
    model = onnx.load(graph)
    onnx.save(model, path, save_as_external_data=True, location="g.data", size_threshold=16)
    return path


def test_weights_in_another_file_are_read_with_the_graph(tiny_graph: Path, tmp_path: Path) -> None:
    whole = read_proto(_outside(tiny_graph, tmp_path))
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    found = OnnxSession(whole.SerializeToString()).run(images)[0]
    assert np.array_equal(found, OnnxSession(tiny_graph).run(images)[0])
    assert read_proto(tiny_graph) == onnx.load(tiny_graph)


@pytest.mark.parametrize("damage", ["gone", "cut", "folder", "pipe"])
def test_weights_that_cannot_be_read(damage: str, tiny_graph: Path, tmp_path: Path) -> None:
    path, data = _outside(tiny_graph, tmp_path), tmp_path / "g.data"
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:40])
    else:
        data.unlink()
    if damage == "folder":
        data.mkdir()
    if damage == "pipe":
        os.mkfifo(data)
    with pytest.raises((FileError, GraphError), match=r"g\.(data|onnx)"):
        read_proto(path)
