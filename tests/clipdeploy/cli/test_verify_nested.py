"""``clipdeploy verify`` on graphs that keep float16 in local functions and branches."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from graph_faults import FP16_FAULTS
from nested_graphs import MOVES
from verify_command import FEW, good, verify

from clipdeploy.models import cards
from clipdeploy.runners import OnnxRunner
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_passport

# The residual that the faults of FP16_FAULTS change, and all of the block behind it.
PREFIXES = ("blocks.2/Add_1", "blocks.3")


def moved(workspace: Workspace, move: str, path: Path, fault: str = "") -> Path:
    """The demo's FP16 graph, perhaps with a fault, and parts of it moved; without a passport."""
    model = onnx.load(workspace.graph(cards.DEMO, "fp16"))
    if fault:
        edit, _ = FP16_FAULTS[fault]
        edit(model)
    for prefix in PREFIXES:
        MOVES[move](model, prefix)
    del model.metadata_props[:]
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("move", MOVES)
def test_a_sound_graph_stays_equivalent_with_the_same_figures(
    move: str, artifacts: Path, demo_workspace: Workspace, tmp_path: Path
) -> None:
    plain = demo_workspace.graph(cards.DEMO, "fp16")
    path = moved(demo_workspace, move, tmp_path / "moved.onnx")
    found = good(verify(artifacts, plain, path, *FEW, "--json"))
    flat, nested = (row["fidelity"]["sqnr_db"] for row in found["rows"])
    assert [row["verdict"] for row in found["rows"]] == ["equivalent"] * 2
    assert nested == flat


@pytest.mark.parametrize("move", MOVES)
def test_an_overflow_inside_is_seen(
    move: str, artifacts: Path, demo_workspace: Workspace, tmp_path: Path
) -> None:
    path = moved(demo_workspace, move, tmp_path / "hot.onnx", "overflow in a residual")
    result = verify(artifacts, path, *FEW, "--json")
    assert result.exit_code == 3
    (row,) = json.loads(result.stdout)["rows"]
    assert row["verdict"] == "regressed"


@pytest.mark.parametrize("move", MOVES)
def test_an_underflow_inside_costs_what_it_costs_outside(
    move: str, artifacts: Path, demo_workspace: Workspace, tmp_path: Path
) -> None:
    fault = "underflow in a residual"
    path = moved(demo_workspace, move, tmp_path / "cold.onnx", fault)
    found = json.loads(verify(artifacts, path, *FEW, "--json").stdout)
    # A sound graph has 62 dB, this one in plain sight has less than that.
    assert found["rows"][0]["fidelity"]["sqnr_db"] < FP16_FAULTS[fault][1]


def untyped(model: onnx.ModelProto) -> None:
    """An operator that ONNX does not know, in a branch, and nothing says its type."""
    branches = (node.attribute[0].g for node in model.graph.node if node.op_type == "If")
    (gelu,) = (node for branch in branches for node in branch.node if node.op_type == "Gelu")
    gelu.domain = "com.microsoft"
    del gelu.attribute[:]
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def test_what_cannot_be_stored_is_not_judged(
    artifacts: Path, demo_workspace: Workspace, tmp_path: Path
) -> None:
    path = moved(demo_workspace, "a branch", tmp_path / "foreign.onnx")
    model = onnx.load(path)
    untyped(model)
    onnx.save(model, path)
    passport = read_passport(demo_workspace.graph(cards.DEMO, "fp16"))
    runner = OnnxRunner(path, as_stored=True, passport=passport)
    assert runner.emulates_float16
    assert "is unknown, so it may be float16" in runner.emulation
    result = verify(artifacts, path, *FEW, "--json")
    assert result.exit_code == 3
    (row,) = json.loads(result.stdout)["rows"]
    assert row["verdict"] == "not judged"


def test_bfloat16_is_not_judged(artifacts: Path, demo_workspace: Workspace, tmp_path: Path) -> None:
    """One tensor goes through bfloat16, which the CPU has hardly a kernel for."""
    model = onnx.load(demo_workspace.graph(cards.DEMO, "fp32"))
    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    last = model.graph.node[-1]
    result = last.output[0]
    last.output[0] = "before"
    model.graph.node.extend(
        [
            onnx.helper.make_node("Cast", ["before"], ["narrow"], to=narrow),
            onnx.helper.make_node("Cast", ["narrow"], [result], to=wide),
        ]
    )
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "narrow.onnx")
    found = verify(artifacts, tmp_path / "narrow.onnx", *FEW, "--json")
    assert found.exit_code == 3
    assert json.loads(found.stdout)["rows"][0]["verdict"] == "not judged"
