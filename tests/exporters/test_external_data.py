"""Graphs whose weights are too large for the ONNX file, with a limit of a few kilobytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from clipdeploy.core.errors import ArtifactError, GraphError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import Passport
from clipdeploy.models.vit import VisionTransformer
from exporters import graphs
from exporters.graphs import LARGEST_INSIDE, is_large, load_graph, read_proto, save_graph
from exporters.headers import (
    check_weights,
    existing_graph,
    graph_sha256,
    read_passport,
    read_skeleton,
    weight_files,
)
from exporters.initializers import values_of
from exporters.onnx import export_graph
from exporters.precision import convert_to_fp16
from exporters.samples import Samples
from exporters.session import OnnxSession
from exporters.tapped import open_model


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of more than 10 kB in total go into a file of their own; the tiny model has 130."""
    monkeypatch.setattr(graphs, "LARGEST_INSIDE", 10_000)


@pytest.fixture
def made(tmp_path: Path, tiny_graph: Path) -> Path:
    """The tiny model's FP32 graph with its weights beside it."""
    path = tmp_path / "made" / "fp32.onnx"
    artifact = save_graph(load_graph(tiny_graph), path, read_passport(tiny_graph))
    assert artifact.changed
    assert artifact.sha256 == sha256_file(path)
    return path


@pytest.mark.usefixtures("traced_once")
def test_an_exported_graph_has_them_too(
    made: Path,
    make_vit: Callable[..., VisionTransformer],
    make_passport: Callable[[VisionTransformer], Passport],
    tiny_samples: Samples,
    tmp_path: Path,
) -> None:
    module, path = make_vit(), tmp_path / "exported" / "fp32.onnx"
    artifact = export_graph(module, path, make_passport(module), tiny_samples, release=True)
    assert existing_graph(path) == replace(artifact, changed=False)
    assert data_of(path).read_bytes() == data_of(made).read_bytes()


def data_of(path: Path) -> Path:
    (data,) = weight_files(path)
    return data


def test_the_limit_is_below_that_of_protobuf() -> None:
    # 2 GiB, of which the nodes need some megabytes.
    assert LARGEST_INSIDE + 100_000_000 < 2**31


def test_the_passport_covers_the_weights(made: Path) -> None:
    data = data_of(made)
    digest = sha256_file(data)
    assert sorted(made.parent.iterdir()) == [made, data]
    assert data.name == f"fp32.onnx.{digest[:16]}.data"
    assert read_passport(made).parents == {"weights": digest}
    assert read_passport(made).made_from == {}
    found = existing_graph(made)
    assert found is not None
    assert found.bytes == made.stat().st_size + data.stat().st_size
    assert found.sha256 == graph_sha256(made) == sha256_file(made)
    assert made.stat().st_size < 40_000 < data.stat().st_size


def test_offsets_are_those_of_pages_and_small_weights_stay_inside(made: Path) -> None:
    weights = read_skeleton(made).graph.initializer
    outside = [w for w in weights if w.data_location == onnx.TensorProto.EXTERNAL]
    entries = [{e.key: e.value for e in weight.external_data} for weight in outside]
    assert len(outside) == 10
    assert all(int(entry["offset"]) % 4096 == 0 for entry in entries)
    inside = [w for w in weights if w not in outside]
    assert inside
    assert all(len(weight.raw_data) <= 1024 for weight in inside)


def test_logits_are_those_of_the_graph_in_one_file(
    made: Path, tiny_graph: Path, tiny_images: NDArray[np.float32]
) -> None:
    expected = OnnxSession(tiny_graph).run(tiny_images)[0]
    assert np.array_equal(OnnxSession(made).run(tiny_images)[0], expected)
    model = load_graph(made)
    assert is_large(model)
    assert np.array_equal(open_model(model, name="made").run(tiny_images)[0], expected)
    onnx.checker.check_model(made, full_check=True)


def changed(data: Path) -> None:
    content = bytearray(data.read_bytes())
    content[5000] ^= 1
    data.write_bytes(content)


def cut(data: Path) -> None:
    data.write_bytes(data.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [changed, cut])
def test_changed_weights_are_named(damage: Callable[[Path], None], made: Path) -> None:
    data = data_of(made)
    damage(data)
    for use in (check_weights, graph_sha256):
        with pytest.raises(ArtifactError, match=r"fp32\.onnx\.\w+\.data has changed since"):
            use(made)
    assert existing_graph(made) is None


def test_missing_weights_are_named(made: Path) -> None:
    data = data_of(made)
    data.unlink()
    for use in (check_weights, read_passport):
        with pytest.raises(ArtifactError, match=rf"{data.name}, which is missing") as caught:
            use(made)
        assert "copy both files together" in caught.value.hint
    assert existing_graph(made) is None


def scaled(path: Path, factor: int = 2) -> ir.Model:
    """The graph with other weights."""
    model = load_graph(path)
    value = model.graph.initializers["position"]
    value.const_value = ir.Tensor(values_of(value) * factor, name=value.name)
    return model


def test_weights_of_another_graph_are_named(made: Path) -> None:
    other = made.parent / "other.onnx"
    save_graph(scaled(made), other, read_passport(made))
    assert read_passport(other).parents != read_passport(made).parents
    shutil.copyfile(data_of(other), data_of(made))
    with pytest.raises(ArtifactError, match=r"has changed since fp32\.onnx was written"):
        graph_sha256(made)
    check_weights(other)


def renamed(path: Path, location: str) -> None:
    """Make a graph refer to another file."""
    proto = onnx.load(path, load_external_data=False)
    for weight in proto.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("folder", ["../", "/tmp/", "a/../../", "..\\", "C:\\", "C:", "sub/"])
def test_weights_elsewhere_are_refused(folder: str, made: Path) -> None:
    name = data_of(made).name
    (made.parent / "sub").mkdir()
    for target in (made.parent.parent / name, made.parent / "sub" / name):
        shutil.copyfile(made.parent / name, target)
    renamed(made, folder + name)
    with pytest.raises((ArtifactError, GraphError), match="which its passport does not cover"):
        read_passport(made)
    if folder != "sub/":
        for use in (load_graph, read_proto, weight_files):
            with pytest.raises(GraphError, match="outside its folder"):
                use(made)


def test_another_name_in_the_folder_is_refused(made: Path) -> None:
    data_of(made).rename(made.parent / "weights.bin")
    renamed(made, "weights.bin")
    with pytest.raises(ArtifactError, match=r"weights\.bin, which its passport does not cover"):
        read_passport(made)


def test_new_weights_replace_the_old_ones(made: Path) -> None:
    before = data_of(made)
    other = before.with_name("fp32.onnx.not-a-hash.data")
    other.touch()
    save_graph(scaled(made), made, read_passport(made))
    after = data_of(made)
    assert after != before
    assert sorted(made.parent.iterdir()) == sorted([made, after, other])
    check_weights(made)


@pytest.mark.parametrize("error", [GraphError("no"), KeyboardInterrupt()])
def test_a_failed_check_leaves_both_old_files(error: BaseException, made: Path) -> None:
    before = {path: path.read_bytes() for path in made.parent.iterdir()}

    def fail(written: Path) -> None:
        # The graph is complete with its weights when it is checked.
        assert OnnxSession(written).output_names == ["logits"]
        raise error

    for factor in (1, 2):
        with pytest.raises(type(error)):
            save_graph(scaled(made, factor), made, read_passport(made), fail)
        assert {path: path.read_bytes() for path in made.parent.iterdir()} == before


def test_a_graph_that_becomes_small_removes_its_weights(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "LARGEST_INSIDE", LARGEST_INSIDE)
    artifact = save_graph(load_graph(made), made, read_passport(made))
    assert list(made.parent.iterdir()) == [made]
    assert artifact.passport.parents == read_passport(made).parents == {}


def test_a_converted_graph_has_weights_of_its_own(made: Path, tiny_samples: Samples) -> None:
    half = made.parent / "fp16.onnx"
    artifact = convert_to_fp16(made, half, tiny_samples)
    parents = read_passport(half).parents
    assert parents == artifact.passport.parents
    assert parents["source_graph"] == graph_sha256(made)
    assert (
        parents["weights"] == sha256_file(data_of(half)) != read_passport(made).parents["weights"]
    )
    assert len(list(made.parent.iterdir())) == 4
    changed(data_of(made))
    with pytest.raises(ArtifactError, match=r"fp32\.onnx\.\w+\.data has changed"):
        convert_to_fp16(made, half, tiny_samples)


def test_a_graph_in_another_folder_is_the_same_artifact(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / made.name
    assert graph_sha256(copy) == graph_sha256(made)
    alone = tmp_path / "alone.onnx"
    shutil.copyfile(made, alone)
    with pytest.raises(ArtifactError, match="which is missing"):
        read_passport(alone)


def test_a_graph_is_read_with_its_weights_inside(made: Path) -> None:
    assert read_proto(made).ByteSize() > data_of(made).stat().st_size // 2
