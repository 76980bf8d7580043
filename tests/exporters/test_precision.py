from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from clipdeploy.core.errors import ArtifactError, FileError, GraphError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import Recipe, TensorSpec
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel
from clipdeploy.pipeline import sample_images
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph, save_graph
from exporters.headers import read_passport
from exporters.precision import Fp16Config, convert_to_fp16, half_precision
from exporters.samples import Samples
from exporters.session import OnnxSession

# A half has 11 bits, which is 66 dB; the demo model gives 66.  INT8 gives 40 and must fail this.
FLOOR_DB = 55.0

SAMPLES = sample_images(cards.find(cards.DEMO).preprocess(Recipe()), 3)


def _sqnr_db(reference: NDArray[np.float32], found: NDArray[np.floating]) -> float:
    noise = reference.astype(np.float64) - found.astype(np.float64)
    return 10 * math.log10((reference.astype(np.float64) ** 2).sum() / (noise**2).sum())


def _pytorch(model: LoadedModel, images: NDArray[np.float32]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = model.module(torch.from_numpy(images)).numpy()
    return logits


def test_fp16_logits_are_pytorchs(
    demo_workspace: Workspace, demo_model: LoadedModel, demo_images: NDArray[np.float32]
) -> None:
    (logits,) = OnnxSession(demo_workspace.graph(cards.DEMO, "fp16")).run(demo_images)
    reference = _pytorch(demo_model, demo_images)
    found = _sqnr_db(reference, logits)
    assert found >= FLOOR_DB, f"{found:.1f} dB"
    # Above 100 dB nothing would have been rounded to a half.
    assert found < 100, f"{found:.1f} dB"
    assert (logits.argmax(1) == reference.argmax(1)).all()


def test_int8_falls_below_the_fp16_floor(
    demo_workspace: Workspace, demo_model: LoadedModel, demo_images: NDArray[np.float32]
) -> None:
    (logits,) = OnnxSession(demo_workspace.graph(cards.DEMO, "int8")).run(demo_images)
    assert _sqnr_db(_pytorch(demo_model, demo_images), logits) < FLOOR_DB


def test_half_interface_is_promised_and_kept(
    demo_workspace: Workspace,
    demo_model: LoadedModel,
    demo_images: NDArray[np.float32],
    tmp_path: Path,
) -> None:
    source = demo_workspace.graph(cards.DEMO, "fp32")
    artifact = convert_to_fp16(source, tmp_path / "half.onnx", SAMPLES, Fp16Config(half_io=True))
    assert artifact.passport.input.dtype == artifact.passport.output.dtype == "float16"
    (logits,) = OnnxSession(artifact.path).run(demo_images.astype(np.float16))
    assert logits.dtype == np.float16
    found = _sqnr_db(_pytorch(demo_model, demo_images), logits)
    assert found >= FLOOR_DB, f"{found:.1f} dB"


def test_passport_says_what_was_done(
    tiny_graph: Path, tiny_samples: Samples, tmp_path: Path
) -> None:
    source = read_passport(tiny_graph)
    config = Fp16Config(keep=("blocks.0.mlp.fc1",))
    artifact = convert_to_fp16(tiny_graph, tmp_path / "half.onnx", tiny_samples, config)
    assert read_passport(artifact.path) == artifact.passport
    assert artifact.passport == replace(
        source,
        precision="fp16",
        parents={"source_graph": sha256_file(tiny_graph)},
        settings={
            "opset": 20,
            "batch": None,
            "preprocess": False,
            "keep_fp32": ["blocks.0.mlp.fc1"],
            "half_io": False,
        },
    )
    assert artifact.passport.input == TensorSpec("image", "float32", ("batch", 3, 16, 16))
    assert artifact.changed


def test_file_is_half_as_large_and_valid(demo_workspace: Workspace) -> None:
    wide, half = (demo_workspace.graph(cards.DEMO, p) for p in ("fp32", "fp16"))
    # The weights halve; names, nodes and shapes stay.
    assert half.stat().st_size < 0.55 * wide.stat().st_size
    onnx.checker.check_model(str(half), full_check=True)


def test_same_graph_gives_the_same_bytes(demo_workspace: Workspace, tmp_path: Path) -> None:
    artifact = convert_to_fp16(
        demo_workspace.graph(cards.DEMO, "fp32"), tmp_path / "again.onnx", SAMPLES
    )
    assert artifact.path.read_bytes() == demo_workspace.graph(cards.DEMO, "fp16").read_bytes()


def test_overflowing_weight_is_refused_and_leaves_no_file(
    tiny_graph: Path, tiny_samples: Samples, tmp_path: Path
) -> None:
    model = load_graph(tiny_graph)
    weight = model.graph.initializers["blocks.1.mlp.fc2.weight"]
    array = weight.const_value.numpy().copy()
    array[3, 5] = -70000.0
    weight.const_value = ir.Tensor(array, name=weight.name)
    source = tmp_path / "loud.onnx"
    save_graph(model, source, read_passport(tiny_graph))
    with pytest.raises(GraphError, match=r"blocks\.1\.mlp\.fc2\.weight reaches 7e\+04"):
        convert_to_fp16(source, tmp_path / "half.onnx", tiny_samples)
    with pytest.raises(GraphError):
        half_precision(load_graph(source))
    assert os.listdir(tmp_path) == ["loud.onnx"]


@pytest.mark.parametrize("factor", [1e-7, 1e-9])
def test_logits_that_float16_loses_are_refused(
    factor: float, tiny_graph: Path, tiny_samples: Samples, tmp_path: Path
) -> None:
    model = load_graph(tiny_graph)
    for name in ("head.weight", "head.bias"):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = (value.const_value.numpy() * factor).astype(np.float32)
        value.const_value = ir.Tensor(array, name=name)
    source = tmp_path / "quiet.onnx"
    save_graph(model, source, read_passport(tiny_graph))
    # float16 ends at 6e-8: one or two bits of these logits are left, or none.
    with pytest.raises(GraphError, match=r"the logits have an SQNR of -?[0-9.]+ dB, below 20"):
        convert_to_fp16(source, tmp_path / "half.onnx", tiny_samples)
    assert os.listdir(tmp_path) == ["quiet.onnx"]


def test_graph_without_passport_is_refused(
    tiny_graph: Path, tiny_samples: Samples, tmp_path: Path
) -> None:
    proto = onnx.ModelProto.FromString(tiny_graph.read_bytes())
    proto.ClearField("metadata_props")
    source = tmp_path / "bare.onnx"
    source.write_bytes(proto.SerializeToString())
    with pytest.raises(ArtifactError, match="has no passport"):
        convert_to_fp16(source, tmp_path / "half.onnx", tiny_samples)
    assert os.listdir(tmp_path) == ["bare.onnx"]


def test_missing_source_is_a_file_error(tiny_samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="absent"):
        convert_to_fp16(tmp_path / "absent.onnx", tmp_path / "half.onnx", tiny_samples)
