from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from clipdeploy import zoo
from clipdeploy.workspace import Workspace
from exporters.errors import GraphError
from exporters.headers import read_skeleton


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_it_is_the_graph_without_its_weights(precision: str, demo_workspace: Workspace) -> None:
    path = demo_workspace.graph(zoo.DEMO, precision)  # type: ignore[arg-type]
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
    path = demo_workspace.graph(zoo.DEMO, "fp32")
    onnx.save(onnx.load(path), tmp_path / "one.onnx")
    assert read_skeleton(tmp_path / "one.onnx") == read_skeleton(path)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.999])
def test_a_cut_file_is_refused(keep: float, demo_workspace: Workspace, tmp_path: Path) -> None:
    data = demo_workspace.graph(zoo.DEMO, "fp32").read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(GraphError, match=r"cut\.onnx is no readable ONNX graph"):
        read_skeleton(path)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photo.onnx"
    path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)) * 64)
    with pytest.raises(GraphError, match=r"photo\.onnx is no readable ONNX graph"):
        read_skeleton(path)
