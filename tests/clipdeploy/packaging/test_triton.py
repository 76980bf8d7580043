"""Tests Triton model repositories with Triton's protobuf and against the graph.

Covers: clipdeploy/packaging/pbtxt.py, clipdeploy/packaging/servers.py,
    clipdeploy/packaging/triton_config.py.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format as protobuf_text
from triton_server import read_config
from tritonclient.grpc import model_config_pb2

from clipdeploy.core.errors import ArtifactError, FileError, UsageError
from clipdeploy.core.passport import PASSPORT_KEY, from_json
from clipdeploy.core.passport import Passport as GraphPassport
from clipdeploy.engines.passport import load_engine_passport
from clipdeploy.models import cards
from clipdeploy.packaging import triton
from clipdeploy.packaging.artifact import labels, open_packable
from clipdeploy.packaging.pbtxt import Enum, text_format
from clipdeploy.packaging.servers import servers
from clipdeploy.pipeline import TritonConfig, Workspace, package_triton, sample_images
from clipdeploy.stages.package import artifact_to_package
from exporters.headers import read_passport

Graphs = dict[str, Path]
DescribedEngine = Callable[..., Path]
KINDS = ("fp32", "fp16", "int8", "uint8", "batch 4", "half")
TYPES = {"TYPE_FP32": "FLOAT", "TYPE_FP16": "FLOAT16", "TYPE_UINT8": "UINT8"}


def folders(path: Path) -> list[str]:
    return sorted(found.name for found in path.iterdir() if found.is_dir())


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_matches_the_graph(kind: str, graphs: Graphs, tmp_path: Path) -> None:
    made = package_triton(graphs[kind], tmp_path)
    config, model = read_config(made.path), onnx.load(made.model)
    assert config.name == made.path.name == made.name
    assert config.backend == "onnxruntime"
    for declared, actual in zip(
        (*config.input, *config.output), (*model.graph.input, *model.graph.output), strict=True
    ):
        tensor = actual.type.tensor_type
        dims = [axis.dim_value or -1 for axis in tensor.shape.dim]
        assert declared.name == actual.name
        dtype = TYPES[model_config_pb2.DataType.Name(declared.data_type)]
        assert dtype == onnx.TensorProto.DataType.Name(tensor.elem_type)
        # With a batch size Triton adds the batch axis.
        assert (list(declared.dims) if kind == "batch 4" else [-1, *declared.dims]) == dims
    assert config.max_batch_size == (0 if kind == "batch 4" else 32)
    assert list(config.dynamic_batching.preferred_batch_size) == list(made.preferred)
    assert made.model.read_bytes() == graphs[kind].read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_warm_up_is_a_real_image_of_the_right_size(
    kind: str, graphs: Graphs, tmp_path: Path
) -> None:
    made = package_triton(graphs[kind], tmp_path)
    passport, count = read_passport(graphs[kind]), 4 if kind == "batch 4" else 1
    wanted = sample_images(passport.preprocess, count).as_input(passport.input)
    config = read_config(made.path)
    assert [warm.batch_size for warm in config.model_warmup] == [1, *made.preferred]
    for warm in config.model_warmup:
        tensor = warm.inputs["image"]
        data = (made.path / "warmup" / tensor.input_data_file).read_bytes()
        assert data == wanted.tobytes()
        assert len(data) == int(np.prod(tensor.dims)) * wanted.itemsize
        assert np.frombuffer(data, wanted.dtype).std() > 0.1


def test_labels_and_passport_are_written(graphs: Graphs, tmp_path: Path) -> None:
    made = package_triton(graphs["int8"], tmp_path)
    [output] = read_config(made.path).output
    lines = (made.path / output.label_filename).read_text().splitlines()
    assert lines == [str(digit) for digit in range(10)]
    data = made.model.with_name("model.onnx.json").read_bytes()
    assert from_json(data, GraphPassport, "beside") == read_passport(graphs["int8"])
    [entry] = [prop for prop in onnx.load(made.model).metadata_props if prop.key == PASSPORT_KEY]
    assert from_json(entry.value, GraphPassport, "inside").precision == "int8"


def test_labels_of_imagenet_have_wnid_and_words(graphs: Graphs) -> None:
    passport = read_passport(graphs["fp32"])
    card = cards.find("clip-vit-base-p16")
    names = tuple(name for name, _ in cards.class_names(card))
    imagenet = replace(passport, model=card.name, class_names=names, classes=1000)
    assert labels(imagenet)[0] == "n01440764 tench, Tinca tinca"
    assert len(set(labels(imagenet))) == 1000
    assert labels(replace(passport, class_names=()))[7] == "class 7"


def test_an_engine_is_served_with_its_profiles(
    described_engine: DescribedEngine, tmp_path: Path
) -> None:
    engine = described_engine(profiles=((1, 1, 4), (4, 16, 64)))
    made = package_triton(engine, tmp_path, TritonConfig("digits", queue_delay=900, instances=2))
    config = read_config(made.path)
    assert (made.name, config.name, config.backend) == ("digits", "digits", "tensorrt")
    assert (config.max_batch_size, made.max_batch) == (64, 64)
    assert list(config.dynamic_batching.preferred_batch_size) == [16, 64]
    assert config.dynamic_batching.max_queue_delay_microseconds == 900
    [group] = config.instance_group
    assert (group.count, group.kind) == (2, model_config_pb2.ModelInstanceGroup.KIND_GPU)
    # Without this field Triton uses only the first profile.
    assert list(group.profile) == ["0", "1"]
    assert made.model.name == "model.plan"
    assert load_engine_passport(made.model) == load_engine_passport(engine)


def test_a_smaller_batch_than_the_engine_accepts_can_be_chosen(
    described_engine: DescribedEngine, graphs: Graphs, tmp_path: Path
) -> None:
    made = package_triton(described_engine(), tmp_path, TritonConfig(max_batch=8))
    assert read_config(made.path).max_batch_size == 8
    assert made.preferred == (8,)
    with pytest.raises(UsageError, match="accepts at most 32 images"):
        package_triton(described_engine(), tmp_path, TritonConfig(max_batch=64))
    with pytest.raises(UsageError, match="has a fixed batch of 4 images"):
        package_triton(graphs["batch 4"], tmp_path, TritonConfig(max_batch=4))


def test_a_batch_of_one_has_no_dynamic_batching(
    described_engine: DescribedEngine, tmp_path: Path
) -> None:
    made = package_triton(described_engine(profiles=((1, 1, 1),)), tmp_path)
    config = read_config(made.path)
    assert config.max_batch_size == 1
    assert not config.HasField("dynamic_batching")


def test_a_cpu_graph_runs_on_the_cpu(
    graphs: Graphs, demo_workspace: Workspace, tmp_path: Path
) -> None:
    source = open_packable(graphs["int8"])
    cpu = replace(source, graph=replace(source.graph, precision="int8-cpu"))
    made = triton.package_triton(cpu, tmp_path, sample_images(cpu.graph.preprocess))
    [group] = read_config(made.path).instance_group
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    assert "VNNI" in made.notes[0]
    assert "--gpus" not in (made.path / "Dockerfile").read_text()


def tensorrt_check(dockerfile: str, environment: dict[str, str]) -> int:
    """Run the line of a Dockerfile that checks the server's TensorRT."""
    [line] = [line for line in dockerfile.splitlines() if line.startswith("RUN ")]
    return subprocess.run(["/bin/sh", "-c", line[4:]], env=environment).returncode


def test_the_dockerfile_names_the_server_of_the_engine(
    described_engine: DescribedEngine, tmp_path: Path
) -> None:
    made = package_triton(described_engine(), tmp_path)
    text = (made.path / "Dockerfile").read_text()
    assert (
        f"docker run --rm --gpus all -p 8000:8000 -p 8001:8001 -p 8002:8002 {made.name}\n" in text
    )
    assert made.server == "nvcr.io/nvidia/tritonserver:25.10-py3"
    assert "\nARG TRITON=25.10\nFROM nvcr.io/nvidia/tritonserver:${TRITON}-py3\n" in text
    assert f"\nCOPY . /models/{made.name}\n" in text
    assert tensorrt_check(text, {"TRT_VERSION": "10.13.3.9+cuda13.0"}) == 0
    assert tensorrt_check(text, {}) == 0
    assert tensorrt_check(text, {"TRT_VERSION": "10.14.1.48"}) == 1


def test_an_engine_of_a_post_release_is_served_by_the_release(
    described_engine: DescribedEngine, tmp_path: Path
) -> None:
    made = package_triton(described_engine(backend_version="10.13.3.9.post1"), tmp_path)
    assert made.server == "nvcr.io/nvidia/tritonserver:25.10-py3"
    text = (made.path / "Dockerfile").read_text()
    assert tensorrt_check(text, {"TRT_VERSION": "10.13.3.9+cuda13.0"}) == 0
    assert tensorrt_check(text, {"TRT_VERSION": "10.14.1.48"}) == 1


def test_an_unknown_server_is_reported_and_must_be_given(
    described_engine: DescribedEngine, tmp_path: Path
) -> None:
    made = package_triton(described_engine(backend_version="10.99.0.1"), tmp_path)
    text = (made.path / "Dockerfile").read_text()
    assert made.server is None
    assert "\nARG TRITON\nFROM" in text
    assert "--build-arg TRITON=YY.MM" in text
    assert any("no known Triton release has TensorRT 10.99.0.1" in note for note in made.notes)


def test_a_version_compatible_engine_sets_the_server_option(
    described_engine: DescribedEngine, tmp_path: Path
) -> None:
    engine = described_engine(settings={"version_compatible": True})
    made = package_triton(engine, tmp_path)
    assert "version-compatible=true" in (made.path / "Dockerfile").read_text()


def test_the_table_of_servers_is_in_order() -> None:
    releases = [server.release for server in servers()]
    assert releases == sorted(releases)
    assert all(server.onnxruntime for server in servers())


@pytest.mark.parametrize(
    ("changes", "said", "mend"),
    [
        ({"backend": "tensorrt-rtx"}, "Triton cannot load", "--backend tensorrt"),
        ({"profiles": ((8, 8, 8),)}, "accepts 1 image, and", "start at 1"),
        ({"profiles": ((1, 1, 2), (4, 8, 16))}, "accepts 3 images, and", "have no gaps"),
    ],
)
def test_an_artifact_that_triton_cannot_serve_is_refused(
    changes: dict[str, object],
    said: str,
    mend: str,
    described_engine: DescribedEngine,
    tmp_path: Path,
) -> None:
    engine = described_engine(**changes)
    with pytest.raises(ArtifactError, match=said) as caught:
        package_triton(engine, tmp_path / "models")
    assert mend in caught.value.hint
    assert not (tmp_path / "models").exists()


def test_an_engine_with_a_fixed_batch_keeps_it(
    described_engine: DescribedEngine, tmp_path: Path
) -> None:
    made = package_triton(described_engine("batch 4", profiles=((4, 4, 4),)), tmp_path)
    config = read_config(made.path)
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [4, 3, 32, 32]
    assert [warm.batch_size for warm in config.model_warmup] == [1]


def test_the_same_artifact_is_not_written_again(graphs: Graphs, tmp_path: Path) -> None:
    first = package_triton(graphs["fp16"], tmp_path)
    again = package_triton(graphs["fp16"], tmp_path)
    assert (first.changed, again.changed) == (True, False)
    assert replace(again, changed=True) == first
    assert len(list(tmp_path.iterdir())) == 1


def test_another_artifact_is_the_next_version(graphs: Graphs, tmp_path: Path) -> None:
    name = TritonConfig("digits")
    first = package_triton(graphs["fp32"], tmp_path, name)
    before = first.model.read_bytes()
    second = package_triton(graphs["fp16"], tmp_path, TritonConfig("digits", max_batch=16))
    assert (second.version, second.model.parent.name) == (2, "2")
    assert first.model.read_bytes() == before
    assert read_config(second.path).max_batch_size == 16
    third = package_triton(graphs["int8"], tmp_path, name, force=True)
    assert third.version == 2
    assert third.model.read_bytes() == graphs["int8"].read_bytes()
    assert sorted(path.name for path in third.path.iterdir() if path.is_dir()) == [
        "1",
        "2",
        "warmup",
    ]


def test_another_model_is_not_replaced(
    graphs: Graphs, described_engine: DescribedEngine, tmp_path: Path
) -> None:
    name, models = TritonConfig("digits"), tmp_path / "models"
    made = package_triton(graphs["fp32"], models, name)
    before = {path: path.read_bytes() for path in made.path.rglob("*") if path.is_file()}
    for other in (graphs["uint8"], described_engine()):
        with pytest.raises(ArtifactError, match=r"config\.pbtxt differs"):
            package_triton(other, models, name)
    (made.path / "labels.txt").write_text("cat\ndog\n")
    with pytest.raises(ArtifactError, match=r"labels\.txt differs"):
        package_triton(graphs["fp16"], models, name)
    (made.path / "labels.txt").write_bytes(before[made.path / "labels.txt"])
    assert {path: path.read_bytes() for path in made.path.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_not_a_model_is_not_changed(graphs: Graphs, tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "diary.txt").write_text("dear diary")
    with pytest.raises(ArtifactError, match="is not a model"):
        package_triton(graphs["fp32"], tmp_path, TritonConfig("digits"))
    assert (tmp_path / "digits" / "diary.txt").exists()


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_model_is_written_atomically(
    failure: BaseException, graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half of")
        raise failure

    whole = package_triton(graphs["fp32"], tmp_path / "there", TritonConfig("digits"))
    monkeypatch.setattr(shutil, "copyfile", fails)
    with pytest.raises((FileError, KeyboardInterrupt)):
        package_triton(graphs["fp32"], tmp_path / "new")
    with pytest.raises((FileError, KeyboardInterrupt)):
        package_triton(graphs["fp16"], tmp_path / "there", TritonConfig("digits"))
    assert list((tmp_path / "new").iterdir()) == []
    assert folders(whole.path) == ["1", "warmup"]


@pytest.mark.parametrize(
    "wrong",
    [{"name": "../up"}, {"name": ""}, {"max_batch": 0}, {"queue_delay": -1}, {"instances": 0}],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        TritonConfig(**wrong)  # type: ignore[arg-type]


def test_an_engine_of_tensorrt_is_preferred_to_a_graph(
    demo_workspace: Workspace, described_engine: DescribedEngine, tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path / "artifacts")
    with pytest.raises(UsageError, match="there is no artifact of"):
        artifact_to_package(workspace, cards.DEMO)
    shutil.copytree(demo_workspace.root, workspace.root)
    assert artifact_to_package(workspace, cards.DEMO).name == "fp16.onnx"
    stripped = {"strip_weights": True}
    for backend, settings, taken in (
        ("tensorrt-rtx", {}, "onnx"),
        ("tensorrt", stripped, "onnx"),
        ("tensorrt", {}, "engine"),
    ):
        engine = described_engine("int8", backend=backend, settings=settings)
        for path in (engine, engine.with_name(engine.name + ".json")):
            name = path.name.replace("demo.int8", "clip-vit-demo.int8")
            shutil.copy(path, workspace.folder(cards.DEMO) / name)
        assert artifact_to_package(workspace, cards.DEMO).suffix == f".{taken}"


def test_text_format_is_read_back_by_protobuf() -> None:
    text = text_format(
        {
            "name": 'a "name" with \\ and\nä',
            "max_batch_size": 3,
            "input": [{"name": "x", "data_type": Enum("TYPE_FP16"), "dims": [1, 2]}, {"name": "y"}],
            "dynamic_batching": {"preferred_batch_size": [4, 8]},
        }
    )
    read = protobuf_text.Parse(text, model_config_pb2.ModelConfig())
    assert read.name == 'a "name" with \\ and\nä'
    assert [list(tensor.dims) for tensor in read.input] == [[1, 2], []]
    assert list(read.dynamic_batching.preferred_batch_size) == [4, 8]
    with pytest.raises(protobuf_text.ParseError):
        protobuf_text.Parse(text + text_format({"colour": 1}), model_config_pb2.ModelConfig())
