"""Deployments of the demo model: one that passes, and what must not be packaged.

Covers: clipdeploy/stages/deploy/deployment.py, clipdeploy/stages/deploy/package.py.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from deployments import CONFIG, QUICK, TEST, hashes
from graph_faults import ruin, turn_answers
from pages import read_page

from clipdeploy.core.device import gpus
from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.files import sha256_file
from clipdeploy.engines.compiler import Compiler
from clipdeploy.engines.passport import save_engine_passport
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import (
    CalibrateConfig,
    Deployment,
    Workspace,
    deploy_model,
    verify_model,
)
from clipdeploy.stages.deploy.deployment import open_points
from clipdeploy.stages.deploy.package import make_packages
from clipdeploy.stages.verify.setup import Judgement

pytestmark = pytest.mark.usefixtures("tensorrt_rtx")


def states(result: Deployment) -> dict[str, str]:
    return {run.name: run.state for run in result.stages}


def ruin_int8(workspace: Workspace) -> None:
    """The INT8 graph as a mistake in a converter would leave it."""
    ruin(workspace.graph(cards.DEMO, "int8"), turn_answers)


def test_what_is_packaged_was_judged(deployed: tuple[Workspace, Deployment]) -> None:
    workspace, result = deployed
    assert result
    assert result.packages.triton is not None
    (artifact,) = result.packages.artifacts
    assert artifact == workspace.graph(cards.DEMO, "int8")
    judged = {row.artifact for row in result.verification.rows if row.verdict == "equivalent"}
    assert str(artifact) in judged
    packaged = result.packages.triton.model
    assert packaged.is_relative_to(workspace.triton(cards.DEMO))
    assert sha256_file(packaged) == sha256_file(artifact)
    assert [name for name in CONFIG.stages if name != "summary"] == list(states(result))


def test_what_is_open_is_said(deployed: tuple[Workspace, Deployment]) -> None:
    _, result = deployed
    said = " ".join(result.open_points)
    assert "int8.engine was built but not executed" in said
    assert "no server has loaded" in said
    # The demo's calibration images are sound.
    assert "the calibration:" not in said
    if not gpus():
        assert "the latency of int8.engine was not measured" in said
        assert "not of the engine" in said


def test_the_page_and_the_data_say_the_same(deployed: tuple[Workspace, Deployment]) -> None:
    workspace, result = deployed
    page = read_page(result.page.read_text())
    data = json.loads(workspace.deployment(cards.DEMO).with_suffix(".json").read_bytes())
    assert page.sections == [
        "What was built",
        "Accuracy",
        "Speed",
        "Package",
        "What was not proven",
    ]
    assert page.text.startswith("EQUIVALENT")
    assert data["passed"] is True
    for engine in data["engines"]:
        assert engine["passport"]["hashes"]["plan"] in page.text
    for said in (*data["serve"], *data["open_points"]):
        assert " ".join(said.split()) in page.text
    assert [row["label"] for row in data["benchmark"]["rows"]]
    # Beside it, within it, and nothing from anywhere else.
    outside = {ref for ref in page.references if not ref.startswith(("#", "data:"))}
    assert outside == {"verification.html"}
    assert result.report.exists()
    assert page.policy.startswith("default-src 'none'")


def never(*args: object, **options: object) -> None:
    raise AssertionError("a finished stage was done again")


EXPENSIVE = (
    "clipdeploy.stages.export.export_graph",
    "clipdeploy.stages.calibrate.collect",
    "clipdeploy.stages.quantize.quantize",
    "clipdeploy.stages.quantize.convert_to_fp16",
    "clipdeploy.verification.verifier.measure_images",
    "clipdeploy.benchmark.cached.benchmark_artifacts",
    "clipdeploy.packaging.triton._write_version",
)


def test_a_second_run_does_nothing(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hashes(workspace.root)
    for name in EXPENSIVE:
        monkeypatch.setattr(name, never)
    monkeypatch.setattr(Compiler, "compile", never)
    result = deploy_model(workspace, cards.DEMO, CONFIG)
    assert result
    done = [name for name, state in states(result).items() if state != "unchanged"]
    assert done == ["check", "check labels"]
    after = hashes(workspace.root)
    # The data says what this run did; the page is the same to the bit.
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {f"{cards.DEMO}/deployment.json"}


def test_a_changed_choice_is_done_again(workspace: Workspace) -> None:
    few = replace(QUICK, calibrate=CalibrateConfig(images=100))
    result = deploy_model(workspace, cards.DEMO, replace(few, beside=("fp16",)))
    assert states(result) == {
        "check": "done",
        "export": "unchanged",
        "check labels": "done",
        "convert to fp16": "unchanged",
        "calibrate": "done",
        "quantize": "done",
        "build fp16": "unchanged",
        "build int8": "done",
        "verify": "done",
        "package": "done",
    }
    assert result.packages.triton is not None
    assert result.packages.triton.version == 2
    assert "the calibration: only 100 images: use 128 or more" in " ".join(result.open_points)


def test_a_regressed_graph_is_not_packaged(workspace: Workspace) -> None:
    ruin_int8(workspace)
    before = hashes(workspace.triton(cards.DEMO))
    result = deploy_model(workspace, cards.DEMO, QUICK)
    assert not result
    assert not result.packages.made
    assert result.serve == ()
    assert hashes(workspace.triton(cards.DEMO)) == before
    assert "is from an earlier verdict" in result.packages.why_not
    assert states(result)["package"] == "left out"
    page = read_page(result.page.read_text())
    assert page.text.startswith("REGRESSED")
    assert "No package." in page.text
    assert json.loads(result.page.with_suffix(".json").read_bytes())["passed"] is False


def test_an_undecided_verdict_packages_nothing(workspace: Workspace) -> None:
    shutil.rmtree(workspace.triton(cards.DEMO))
    strict = replace(QUICK, verify=replace(QUICK.verify, max_drop=0.1))
    result = deploy_model(workspace, cards.DEMO, strict)
    assert not result
    assert result.packages.why_not == "the verdict does not allow one"
    assert not workspace.triton(cards.DEMO).exists()


@pytest.mark.skipif(bool(gpus()), reason="the engine can run here")
def test_an_engine_that_did_not_run_is_not_packaged(workspace: Workspace) -> None:
    shutil.rmtree(workspace.triton(cards.DEMO))
    asked = replace(QUICK, scope=replace(QUICK.scope, graphs_only=False))
    result = deploy_model(workspace, cards.DEMO, asked)
    assert not result
    assert "pass --graphs-only" in result.packages.why_not
    assert not workspace.triton(cards.DEMO).exists()
    (engine,) = (row for row in result.verification.rows if row.kind == "engine")
    assert engine.verdict == "not executed"
    assert "int8.onnx was scored instead" in engine.reason
    assert any("int8 engine, not executed" in point for point in result.open_points)


def test_random_weights_are_not_packaged(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "artifacts")
    random = replace(QUICK, calibration=None, precision="fp32", weights=WeightsChoice(None, 1))
    result = deploy_model(workspace, cards.DEMO, random)
    assert not result
    assert not result.packages.made
    assert read_page(result.page.read_text()).text.startswith("NOT JUDGED")


def test_a_file_that_changed_after_the_verdict(workspace: Workspace) -> None:
    graphs = tuple(workspace.graph(cards.DEMO, each) for each in ("fp32", "int8"))
    scope = replace(CONFIG.scope, artifacts=graphs)
    judgement = verify_model(workspace, cards.DEMO, TEST, CONFIG.verify, scope)
    result = deploy_model(workspace, cards.DEMO, QUICK)
    (engine,) = result.engines
    at = (workspace, cards.DEMO, QUICK, engine, judgement)
    assert make_packages(*at).triton is not None
    ruin_int8(workspace)
    with pytest.raises(ArtifactError, match="is not the file that was judged"):
        make_packages(*at)


def test_both_packages_where_they_were_asked_for(workspace: Workspace, tmp_path: Path) -> None:
    shutil.rmtree(workspace.triton(cards.DEMO))
    asked = replace(QUICK, triton=tmp_path / "models", cpp=tmp_path / "program")
    result = deploy_model(workspace, cards.DEMO, asked)
    assert result
    assert (tmp_path / "models" / "clip-vit-demo-int8" / "config.pbtxt").exists()
    assert (tmp_path / "program" / "CMakeLists.txt").exists()
    assert not workspace.triton(cards.DEMO).exists()
    assert any(command.startswith("docker run") for command in result.serve)
    assert any(command.startswith("cmake -S") for command in result.serve)
    assert states(deploy_model(workspace, cards.DEMO, asked))["package"] == "unchanged"


def test_an_engine_that_ran_is_what_is_packaged(workspace: Workspace, tmp_path: Path) -> None:
    """As on a machine with a GPU, by the records of one: no engine runs without."""
    asked = replace(QUICK, triton=tmp_path / "models", cpp=tmp_path / "program")
    (engine,) = deploy_model(workspace, cards.DEMO, replace(QUICK, package=False)).engines
    graph = workspace.graph(cards.DEMO, "int8")
    scope = replace(CONFIG.scope, artifacts=(graph, engine.path))
    judgement = as_if_run(verify_model(workspace, cards.DEMO, TEST, CONFIG.verify, scope))
    at = (workspace, cards.DEMO, asked)
    made = make_packages(*at, engine, judgement)
    assert made.artifacts == (graph, engine.path)
    assert made.cpp is not None
    assert made.cpp.runtime == "tensorrt-rtx"
    assert judgement.verification is not None
    said = " ".join(open_points(judgement.verification, (engine,), None, made))
    assert "Triton cannot load TensorRT-RTX engines" in said
    shutil.rmtree(tmp_path / "models")
    shutil.rmtree(tmp_path / "program")
    passport = replace(engine.passport, backend="tensorrt", backend_version="10.13.3.9")
    save_engine_passport(passport, engine.path)
    made = make_packages(*at, replace(engine, passport=passport), judgement)
    assert made.artifacts == (engine.path, engine.path)
    assert made.triton is not None
    assert made.triton.model.name == "model.plan"
    assert sha256_file(made.triton.model) == sha256_file(engine.path)


def as_if_run(judgement: Judgement) -> Judgement:
    """Every artifact with something that ran it."""
    assert judgement.evidence is not None
    results = judgement.evidence.results
    run_key = results.run_key
    artifacts = tuple(replace(each, runner=each.runner or "GPU") for each in run_key.artifacts)
    results = replace(results, run_key=replace(run_key, artifacts=artifacts))
    return replace(judgement, evidence=replace(judgement.evidence, results=results))
