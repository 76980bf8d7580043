"""The verbs of the Python API, one after the other.

Covers: clipdeploy/stages/demo.py, clipdeploy/stages/export.py.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from judging import each_once

from calibration.config import QuantizeConfig
from clipdeploy.core.errors import ArtifactError, UsageError
from clipdeploy.core.files import sha256_file
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import (
    CalibrateConfig,
    VerifyScope,
    build_model,
    calibrate_model,
    convert_model,
    export_model,
    quantize_model,
    verify_model,
)
from clipdeploy.stages.demo import run_demo
from clipdeploy.verification.result import Verification, verdict_line
from clipdeploy.workspace.folder import Workspace

CALIBRATION = cards.demo_file("calibration.zip")
TEST = cards.demo_file("test.zip")


@pytest.fixture
def workspace(demo_workspace: Workspace, tmp_path: Path) -> Workspace:
    """A copy of the finished workspace that a test may change."""
    shutil.copytree(demo_workspace.root, tmp_path / "artifacts")
    return Workspace(tmp_path / "artifacts")


def hashes(workspace: Workspace) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in workspace.folder(cards.DEMO).iterdir()}


def test_an_unchanged_stage_is_not_done_twice(workspace: Workspace) -> None:
    before = hashes(workspace)
    assert not export_model(workspace, cards.DEMO).changed
    assert not convert_model(workspace, cards.DEMO).changed
    assert not calibrate_model(workspace, cards.DEMO, CALIBRATION).changed
    assert not quantize_model(workspace, cards.DEMO).artifact.changed
    assert hashes(workspace) == before


def test_a_changed_choice_is_done_again(workspace: Workspace) -> None:
    assert quantize_model(workspace, cards.DEMO, QuantizeConfig(("blocks.0.*",))).artifact.changed
    few = CalibrateConfig(images=50)
    assert calibrate_model(workspace, cards.DEMO, CALIBRATION, few).changed
    assert quantize_model(workspace, cards.DEMO, QuantizeConfig(("blocks.0.*",))).artifact.changed
    assert export_model(workspace, cards.DEMO, WeightsChoice(random_seed=1)).changed


def test_every_stage_is_reproducible(demo_workspace: Workspace, tmp_path: Path) -> None:
    again = Workspace(tmp_path)
    export_model(again, cards.DEMO)
    calibrate_model(again, cards.DEMO, CALIBRATION)
    quantize_model(again, cards.DEMO)
    ours, theirs = hashes(again), hashes(demo_workspace)
    assert ours == {name: theirs[name] for name in ours}


def test_artifacts_of_other_weights_are_refused(workspace: Workspace) -> None:
    export_model(workspace, cards.DEMO, WeightsChoice(random_seed=1))
    with pytest.raises(ArtifactError, match=r"was not made from the .*fp32\.onnx"):
        verify_model(workspace, cards.DEMO, TEST, scope=VerifyScope(graphs_only=True))
    with pytest.raises(ArtifactError, match="was made for another weights"):
        quantize_model(workspace, cards.DEMO)


def test_stages_out_of_order_say_what_comes_first(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "artifacts")
    for stage in (
        lambda: calibrate_model(workspace, cards.DEMO, CALIBRATION),
        lambda: quantize_model(workspace, cards.DEMO),
        lambda: build_model(workspace, cards.DEMO, "fp16"),
        lambda: verify_model(workspace, cards.DEMO, TEST),
    ):
        with pytest.raises(UsageError, match="has not been exported") as caught:
            stage()
        assert "clipdeploy export --model clip-vit-demo" in caught.value.hint
    assert not workspace.root.exists()
    export_model(workspace, cards.DEMO)
    with pytest.raises(UsageError, match="has not been calibrated"):
        build_model(workspace, cards.DEMO, "int8")


def test_an_int8_engine_needs_one_call(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    workspace = Workspace(tmp_path)
    export_model(workspace, cards.DEMO)
    engine = build_model(workspace, cards.DEMO, "int8", data=CALIBRATION)
    assert engine.changed
    assert engine.passport.graph.precision == "int8"
    assert not build_model(workspace, cards.DEMO, "int8", data=CALIBRATION).changed
    # An engine whose graph was made anew is stale until it is built again.
    quantize_model(workspace, cards.DEMO, QuantizeConfig(("blocks.1.*",)))
    with pytest.raises(ArtifactError, match=r"int8\.engine was not made from"):
        verify_model(workspace, cards.DEMO, TEST)


def check_demo_verdict(found: Verification) -> None:
    assert found.baseline.status == "confirmed"
    assert found.reference is not None
    # The required accuracy of the demo card; the training script prints its own.
    assert found.reference.top1 >= 97
    fidelities = [row.fidelity for row in found.rows if row.kind == "graph"]
    # Quantisation noise in dB: 24 mantissa bits, 11 bits, 8 bits a Linear.
    for fidelity, floor in zip(fidelities, (110, 55, 30), strict=True):
        assert fidelity is not None
        assert fidelity.sqnr_db is not None
        assert fidelity.sqnr_db > floor
    # The engines are judged too where there is a GPU.
    assert re.match(
        r"EQUIVALENT: 3 graphs( and 3 engines)? lose no more than 1\.00 points of top-1",
        verdict_line(found),
    )


def test_the_demo_keeps_its_accuracy(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    # tests/clipdeploy/verification/test_faults.py makes the repeated calls of such graphs.
    with each_once():
        result = run_demo(Workspace(tmp_path))
    assert result.verification
    assert result.verification.images == 500
    check_demo_verdict(result.verification)
    assert [engine.passport.graph.precision for engine in result.engines] == [
        "fp32",
        "fp16",
        "int8",
    ]
    assert all(engine.path.stat().st_size > 1e6 for engine in result.engines)
    drops = [row.drop.drop for row in result.verification.rows if row.drop]
    assert len(drops) >= 3
    # Two and a half of the 500 digits.
    assert all(drop <= 0.5 for drop in drops)
    assert result.report.read_bytes().startswith(b"<!DOCTYPE html>")
