"""What a graph without a passport takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from clipdeploy.core.errors import FileError, GraphError
from clipdeploy.core.passport import TensorSpec
from exporters.headers import weight_files
from exporters.signature import classifier_signature, stores_float16

FLOAT, HALF, BYTES = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8
Tensor = tuple[str, int, Sequence[int | str | None]]

IMAGE: Tensor = ("x", FLOAT, ["n", 3, 16, 16])
LOGITS: Tensor = ("y", FLOAT, ["n", 5])


def graph(
    path: Path, inputs: Sequence[Tensor] = (IMAGE,), outputs: Sequence[Tensor] = (LOGITS,)
) -> Path:
    ends = [[helper.make_tensor_value_info(*each) for each in side] for side in (inputs, outputs)]
    nodes = [helper.make_node("Identity", [inputs[0][0]], [each[0]]) for each in outputs]
    weight = numpy_helper.from_array(np.zeros((2048,), np.float32), "weight")
    made = helper.make_graph(nodes, "g", *ends, initializer=[weight])
    onnx.save(helper.make_model(made, ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("image", "logits"),
    [
        (IMAGE, LOGITS),
        (("x", HALF, ["n", 3, 16, 16]), ("y", HALF, ["n", 5])),
        (("x", BYTES, ["n", 16, 16, 3]), LOGITS),
        (("x", FLOAT, [8, 3, 16, 16]), ("y", FLOAT, [8, 5])),
        (("x", FLOAT, ["n", 3, "h", "w"]), ("y", FLOAT, ["n", "k"])),
        (("x", FLOAT, [None, 3, None, None]), ("y", FLOAT, [None, None])),
    ],
)
def test_a_classifier(image: Tensor, logits: Tensor, tmp_path: Path) -> None:
    found = classifier_signature(graph(tmp_path / "g.onnx", [image], [logits]), 16, 5)
    kinds = {FLOAT: "float32", HALF: "float16", BYTES: "uint8"}
    for spec, (name, kind, shape) in zip(found, (image, logits), strict=True):
        assert spec == TensorSpec(name, kinds[kind], tuple(axis or "?" for axis in shape))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([("x", FLOAT, ["n", 3, 32, 32])], r"takes x float32 \['n', 3, 32, 32\], not one image"),
        ([("x", FLOAT, ["n", 1, 16, 16])], "not one image of 16 pixels"),
        ([("x", FLOAT, ["n", 16, 16, 3])], "not one image of 16 pixels"),
        ([("x", BYTES, ["n", 3, 16, 16])], "not one image of 16 pixels"),
        ([("x", TensorProto.INT64, ["n", 3, 16, 16])], "x int64"),
        ([("x", FLOAT, ["n", 768])], "not one image"),
        ([IMAGE, ("mask", FLOAT, ["n", 16])], r"mask float32 \['n', 16\]"),
    ],
)
def test_what_takes_no_image(inputs: list[Tensor], said: str, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=said):
        classifier_signature(graph(tmp_path / "g.onnx", inputs), 16, 5)


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ([("y", FLOAT, ["n", 6])], r"gives y float32 \['n', 6\], not logits of 5 classes"),
        ([("y", FLOAT, ["n", 5, 5])], "not logits"),
        ([("y", TensorProto.INT64, ["n", 5])], "y int64"),
        ([LOGITS, ("features", FLOAT, ["n", 32])], "features"),
    ],
)
def test_what_gives_no_logits(outputs: list[Tensor], said: str, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=said):
        classifier_signature(graph(tmp_path / "g.onnx", outputs=outputs), 16, 5)


def test_weights_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    """Old exporters list every initializer as an input too."""
    path = graph(tmp_path / "g.onnx", [IMAGE, ("weight", FLOAT, [2048])])
    image, _ = classifier_signature(path, 16, 5)
    assert image.name == "x"


def test_what_is_no_graph(tmp_path: Path) -> None:
    whole = graph(tmp_path / "g.onnx").read_bytes()
    for data in (b"", b"no graph", whole[:-100]):
        (tmp_path / "bad.onnx").write_bytes(data)
        with pytest.raises(GraphError):
            classifier_signature(tmp_path / "bad.onnx", 16, 5)
    with pytest.raises(FileError):
        classifier_signature(tmp_path / "gone.onnx", 16, 5)


def test_float16_is_seen_wherever_it_is(tmp_path: Path) -> None:
    assert not stores_float16(graph(tmp_path / "g.onnx"))
    assert stores_float16(graph(tmp_path / "h.onnx", [("x", HALF, ["n", 3, 16, 16])]))
    model = onnx.load(tmp_path / "g.onnx")
    assert not stores_float16(model)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros(2, np.float16), "weight"))
    assert stores_float16(model)


def external(path: Path, location: str) -> Path:
    onnx.save(
        onnx.load(path),
        path,
        save_as_external_data=True,
        location=location,
        size_threshold=1024,
    )
    return path


def test_weights_in_a_file_beside_are_named(tmp_path: Path) -> None:
    path = graph(tmp_path / "g.onnx")
    assert weight_files(path) == ()
    assert weight_files(external(path, "g.data")) == (tmp_path / "g.data",)


@pytest.mark.parametrize("location", ["../g.data", "/etc/hostname", "a/../../b", "..\\b"])
def test_weights_outside_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    path = external(graph(tmp_path / "g.onnx"), "g.data")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match="outside its folder"):
        weight_files(path)
