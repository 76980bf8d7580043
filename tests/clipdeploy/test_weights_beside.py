"""The pipeline on the demo with weights beside its graphs, as those of more than 2 GB are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from demo_workspaces import TENSORRT

from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.files import sha256_file
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.models import cards
from clipdeploy.pipeline import (
    BisectConfig,
    bisect_model,
    build_model,
    calibrate_model,
    convert_model,
    inspect_file,
    package_triton,
    quantize_model,
    verify_model,
)
from clipdeploy.stages.calibrate import CalibrateConfig
from clipdeploy.stages.verify.setup import VerifyScope
from clipdeploy.verification.verifier import VerifyConfig
from clipdeploy.workspace.folder import Workspace
from exporters import graphs
from exporters.graphs import load_graph, save_graph
from exporters.headers import graph_sha256, read_passport, weight_files

DIGITS, TEST = (cards.demo_file(f"{name}.zip") for name in ("calibration", "test"))


@pytest.fixture
def workspace(
    demo_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Workspace:
    """The demo's FP32 graph, with a limit of 1 MB: its weights have 2.7, in FP16 1.4."""
    monkeypatch.setattr(graphs, "LARGEST_INSIDE", 1_000_000)
    made = Workspace(tmp_path / "artifacts")
    source = demo_workspace.graph(cards.DEMO, "fp32")
    save_graph(load_graph(source), made.graph(cards.DEMO, "fp32"), read_passport(source))
    made.remember(cards.DEMO)
    return made


def test_every_stage_takes_graphs_with_weights_beside_them(
    workspace: Workspace, tmp_path: Path
) -> None:
    source = workspace.graph(cards.DEMO, "fp32")
    calibrate_model(workspace, cards.DEMO, DIGITS, CalibrateConfig(16))
    half = convert_model(workspace, cards.DEMO)
    quantised = quantize_model(workspace, cards.DEMO).artifact
    assert not convert_model(workspace, cards.DEMO).changed
    assert not quantize_model(workspace, cards.DEMO).artifact.changed
    made = (source, half.path, quantised.path)
    assert [len(weight_files(path)) for path in made] == [1, 1, 0]
    assert read_passport(quantised.path).parents["source_graph"] == graph_sha256(source)
    verify = VerifyConfig(max_drop=20, workers=0)
    result = verify_model(
        workspace, cards.DEMO, TEST, verify, VerifyScope(graphs_only=True, limit=24)
    )
    assert result.verification is not None
    assert len(result.verification.rows) == 3
    found = bisect_model(workspace, cards.DEMO, TEST, half.path, BisectConfig(images=8, threads=1))
    assert found.measured
    if TENSORRT:
        engine = build_model(workspace, cards.DEMO, "fp32", BuildConfig(backend="tensorrt-rtx"))
        assert engine.passport.hashes.graph == sha256_file(source)
        # The plan holds the weights of both files.
        assert engine.path.stat().st_size > weight_files(source)[0].stat().st_size
    package = package_triton(half.path, tmp_path / "models")
    (model,) = (tmp_path / "models").rglob("model.onnx")
    assert package
    assert graph_sha256(model) == half.sha256
    assert not package_triton(half.path, tmp_path / "models").changed


def test_every_stage_refuses_changed_weights(workspace: Workspace, tmp_path: Path) -> None:
    source = workspace.graph(cards.DEMO, "fp32")
    whole = tmp_path / "whole"
    shutil.copytree(workspace.root, whole)
    (data,) = weight_files(source)
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)
    assert "has changed since" in inspect_file(source).note
    uses = (
        lambda: calibrate_model(workspace, cards.DEMO, DIGITS, CalibrateConfig(16)),
        lambda: convert_model(workspace, cards.DEMO),
        lambda: verify_model(workspace, cards.DEMO, TEST, VerifyConfig(), VerifyScope(limit=8)),
        lambda: package_triton(source, tmp_path / "models"),
    )
    for use in uses:
        with pytest.raises(ArtifactError, match=r"\.data has changed since fp32\.onnx was written"):
            use()
    data.unlink()
    with pytest.raises(ArtifactError, match="which is missing"):
        convert_model(workspace, cards.DEMO)
    assert sorted(path.name for path in source.parent.iterdir()) == ["fp32.onnx"]
    convert_model(Workspace(whole), cards.DEMO)
