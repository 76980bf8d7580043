"""Deployments of the demo model: one that passes, and what must not be packaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from graph_faults import ruin, turn_answers
from interrupts import hear_interrupts
from pages import read_page

from clipdeploy import zoo
from clipdeploy.benchmark import BenchmarkConfig
from clipdeploy.device import gpus
from clipdeploy.engines.compiler import Compiler
from clipdeploy.imaging import open_images
from clipdeploy.imaging.overlap import shared_images
from clipdeploy.model import WeightsChoice
from clipdeploy.pipeline import (
    CalibrateConfig,
    DeployConfig,
    Deployment,
    VerifyConfig,
    VerifyScope,
    Workspace,
    deploy_model,
    verify_model,
)
from clipdeploy.stages.deploy_package import make_packages
from exporters.errors import (
    ArtifactError,
    ClipdeployError,
    DatasetError,
    FileError,
    UsageError,
)
from exporters.files import sha256_file

CALIBRATION = zoo.demo_file("calibration.zip")
TEST = zoo.demo_file("test.zip")
# 64 images without a difference prove a drop below 5.7 points.
CONFIG = DeployConfig(
    val=TEST,
    calibration=CALIBRATION,
    verify=VerifyConfig(max_drop=6, workers=0),
    scope=VerifyScope(limit=64, graphs_only=True),
    benchmark=BenchmarkConfig(batches=(1,), seconds=None, rounds=3, warmup=0),
)
QUICK = replace(CONFIG, benchmark=None)

pytestmark = pytest.mark.usefixtures("tensorrt_rtx")


@pytest.fixture(scope="session")
def tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")


@pytest.fixture(scope="module")
def deployed(
    tensorrt_rtx: None, demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workspace, Deployment]:
    """A deployment whose graphs were there already.  Read only."""
    workspace = Workspace(tmp_path_factory.mktemp("deployed") / "artifacts")
    shutil.copytree(demo_workspace.root, workspace.root)
    return workspace, deploy_model(workspace, zoo.DEMO, CONFIG)


@pytest.fixture
def workspace(deployed: tuple[Workspace, Deployment]) -> Workspace:
    """The deployment's own folder, put back after the test: results name their paths."""
    original, _ = deployed
    saved = original.root.with_name("saved")
    shutil.copytree(original.root, saved)
    yield original
    shutil.rmtree(original.root)
    saved.rename(original.root)


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def states(result: Deployment) -> dict[str, str]:
    return {run.name: run.state for run in result.stages}


def ruin_int8(workspace: Workspace) -> None:
    """The INT8 graph as a mistake in a converter would leave it."""
    ruin(workspace.graph(zoo.DEMO, "int8"), turn_answers)


def test_what_is_packaged_was_judged(deployed: tuple[Workspace, Deployment]) -> None:
    workspace, result = deployed
    assert result
    assert result.packages.triton is not None
    (artifact,) = result.packages.artifacts
    assert artifact == workspace.graph(zoo.DEMO, "int8")
    judged = {row.artifact for row in result.verification.rows if row.verdict == "equivalent"}
    assert str(artifact) in judged
    packaged = result.packages.triton.model
    assert packaged.is_relative_to(workspace.triton(zoo.DEMO))
    assert sha256_file(packaged) == sha256_file(artifact)
    assert [name for name in CONFIG.stages if name != "summary"] == list(states(result))


def test_what_is_open_is_said(deployed: tuple[Workspace, Deployment]) -> None:
    _, result = deployed
    said = " ".join(result.open_points)
    assert "int8.engine was built and not executed" in said
    assert "no server has loaded" in said
    if not gpus():
        assert "the latency of int8.engine was not measured" in said
        assert "say nothing about an engine" in said


def test_the_page_and_the_data_say_the_same(deployed: tuple[Workspace, Deployment]) -> None:
    workspace, result = deployed
    page = read_page(result.page.read_text())
    data = json.loads(workspace.deployment(zoo.DEMO).with_suffix(".json").read_bytes())
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
    "clipdeploy.benchmark.kept.benchmark_artifacts",
    "clipdeploy.packaging.triton._write_version",
)


def test_a_second_run_does_nothing(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hashes(workspace.root)
    for name in EXPENSIVE:
        monkeypatch.setattr(name, never)
    monkeypatch.setattr(Compiler, "compile", never)
    result = deploy_model(workspace, zoo.DEMO, CONFIG)
    assert result
    done = [name for name, state in states(result).items() if state != "unchanged"]
    assert done == ["check"]
    after = hashes(workspace.root)
    # The data says what this run did; the page is the same to the bit.
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {f"{zoo.DEMO}/deployment.json"}


def test_a_changed_choice_is_done_again(workspace: Workspace) -> None:
    few = replace(QUICK, calibrate=CalibrateConfig(images=100))
    result = deploy_model(workspace, zoo.DEMO, replace(few, beside=("fp16",)))
    assert states(result) == {
        "check": "done",
        "export": "unchanged",
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
    assert "INT8's ranges are those of 100 images" in " ".join(result.open_points)


def test_a_regressed_graph_is_not_packaged(workspace: Workspace) -> None:
    ruin_int8(workspace)
    before = hashes(workspace.triton(zoo.DEMO))
    result = deploy_model(workspace, zoo.DEMO, QUICK)
    assert not result
    assert not result.packages.made
    assert result.serve == ()
    assert hashes(workspace.triton(zoo.DEMO)) == before
    assert "is of an earlier verdict" in result.packages.why_not
    assert states(result)["package"] == "left out"
    page = read_page(result.page.read_text())
    assert page.text.startswith("REGRESSED")
    assert "No package." in page.text
    assert json.loads(result.page.with_suffix(".json").read_bytes())["passed"] is False


def test_an_undecided_verdict_packages_nothing(workspace: Workspace) -> None:
    shutil.rmtree(workspace.triton(zoo.DEMO))
    strict = replace(QUICK, verify=replace(QUICK.verify, max_drop=0.1))
    result = deploy_model(workspace, zoo.DEMO, strict)
    assert not result
    assert result.packages.why_not == "the verdict does not allow one"
    assert not workspace.triton(zoo.DEMO).exists()


@pytest.mark.skipif(bool(gpus()), reason="the engine can run here")
def test_an_engine_that_did_not_run_is_not_packaged(workspace: Workspace) -> None:
    shutil.rmtree(workspace.triton(zoo.DEMO))
    asked = replace(QUICK, scope=replace(QUICK.scope, graphs_only=False))
    result = deploy_model(workspace, zoo.DEMO, asked)
    assert not result
    assert "pass --graphs-only" in result.packages.why_not
    assert not workspace.triton(zoo.DEMO).exists()
    (engine,) = (row for row in result.verification.rows if row.kind == "engine")
    assert engine.verdict == "not executed"
    assert "clip-vit-demo.int8.onnx was scored in its place" in engine.reason
    assert any("int8 engine, not executed" in point for point in result.open_points)


def test_random_weights_are_not_packaged(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "artifacts")
    random = replace(QUICK, calibration=None, precision="fp32", weights=WeightsChoice(None, 1))
    result = deploy_model(workspace, zoo.DEMO, random)
    assert not result
    assert not result.packages.made
    assert read_page(result.page.read_text()).text.startswith("NOT JUDGED")


def test_a_file_that_changed_after_the_verdict(workspace: Workspace) -> None:
    graphs = tuple(workspace.graph(zoo.DEMO, each) for each in ("fp32", "int8"))
    scope = replace(CONFIG.scope, artifacts=graphs)
    judgement = verify_model(workspace, zoo.DEMO, TEST, CONFIG.verify, scope)
    result = deploy_model(workspace, zoo.DEMO, QUICK)
    (engine,) = result.engines
    at = (workspace, zoo.DEMO, QUICK, engine, judgement)
    assert make_packages(*at).triton is not None
    ruin_int8(workspace)
    with pytest.raises(ArtifactError, match="is not the file that was judged"):
        make_packages(*at)


def test_both_packages_where_they_were_asked_for(workspace: Workspace, tmp_path: Path) -> None:
    shutil.rmtree(workspace.triton(zoo.DEMO))
    asked = replace(QUICK, triton=tmp_path / "models", cpp=tmp_path / "program")
    result = deploy_model(workspace, zoo.DEMO, asked)
    assert result
    assert (tmp_path / "models" / "clip-vit-demo-int8" / "config.pbtxt").exists()
    assert (tmp_path / "program" / "CMakeLists.txt").exists()
    assert not workspace.triton(zoo.DEMO).exists()
    assert any(command.startswith("docker run") for command in result.serve)
    assert any(command.startswith("cmake -S") for command in result.serve)
    assert states(deploy_model(workspace, zoo.DEMO, asked))["package"] == "unchanged"


def copied(data: Path, folder: Path, count: int) -> Path:
    """The first ``count`` images of each class."""
    with zipfile.ZipFile(data) as archive:
        for digit in range(10):
            names = sorted(n for n in archive.namelist() if n.startswith(f"{digit}/"))
            archive.extractall(folder, names[:count])
    return folder


def no_val(tmp_path: Path) -> DeployConfig:
    return replace(CONFIG, val=tmp_path / "nothing")


def no_calibration(tmp_path: Path) -> DeployConfig:
    return replace(CONFIG, calibration=tmp_path / "nothing")


def none_named(tmp_path: Path) -> DeployConfig:
    return replace(CONFIG, calibration=None)


def one_shared(tmp_path: Path) -> DeployConfig:
    val = copied(TEST, tmp_path / "val", 2)
    spy = copied(CALIBRATION, tmp_path / "calibration", 3)
    shutil.copy(next((spy / "4").iterdir()), val / "4" / "under_another_name.png")
    return replace(CONFIG, val=val, calibration=spy)


def one_broken(tmp_path: Path) -> DeployConfig:
    val = copied(TEST, tmp_path / "val", 2)
    (val / "3" / "broken.png").write_bytes(b"\x89PNG and no more")
    return replace(CONFIG, val=val)


def file_in_the_way(tmp_path: Path) -> DeployConfig:
    (tmp_path / "file").write_text("in the way")
    return replace(CONFIG, triton=tmp_path / "file" / "models")


def no_recipe(tmp_path: Path) -> DeployConfig:
    return replace(CONFIG, quantize_recipe=tmp_path / "recipe.json")


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (no_val, DatasetError, ("does not exist", "--val")),
        (no_calibration, DatasetError, ("does not exist", "--calibration")),
        (none_named, UsageError, ("without calibration images", "--calibration")),
        (one_shared, DatasetError, ("1 images of", "4/under_another_name.png", "cannot judge")),
        (one_broken, DatasetError, ("3/broken.png", "--skip-unreadable")),
        (file_in_the_way, FileError, ("models", "is a file, not a folder")),
        (no_recipe, FileError, ("cannot read", "recipe.json")),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    bad: Callable[[Path], DeployConfig],
    error: type[ClipdeployError],
    words: tuple[str, ...],
    tmp_path: Path,
) -> None:
    workspace = Workspace(tmp_path / "artifacts")
    with pytest.raises(error) as caught:
        deploy_model(workspace, zoo.DEMO, bad(tmp_path))
    for word in words:
        assert word in str(caught.value)
    assert not workspace.graph(zoo.DEMO, "fp32").exists()


def test_images_without_labels_are_refused_before_the_calibration(
    workspace: Workspace, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for image in copied(TEST, tmp_path / "val", 1).rglob("*.png"):
        shutil.copy(image, flat / f"{image.parent.name}_{image.name}")
    workspace.calibration(zoo.DEMO).unlink()
    with pytest.raises(DatasetError, match="no verdict could come of them"):
        deploy_model(workspace, zoo.DEMO, replace(QUICK, val=flat, scope=VerifyScope()))
    assert not workspace.calibration(zoo.DEMO).exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"precision": "fp16"}, "--calibration belongs to --int8"),
        ({"precision": "int8-cpu", "benchmark": None}, "no engine is built in int8-cpu"),
        ({"package": False, "cpp": Path("x")}, "not to be made"),
        ({"calibrate": CalibrateConfig(shard=(1, 2))}, "a shard alone has no verdict"),
    ],
)
def test_choices_that_do_not_go_together(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(CONFIG, calibration=CALIBRATION, **wrong)


def test_shared_images_are_found_by_their_bytes(tmp_path: Path) -> None:
    config = one_shared(tmp_path)
    assert config.calibration is not None
    observed, judging = open_images(config.calibration), open_images(config.val)
    assert shared_images(observed, judging) == ("4/under_another_name.png",)
    assert shared_images(open_images(CALIBRATION), open_images(TEST)) == ()
    # A folder and an archive of the same images.
    assert len(shared_images(observed, open_images(CALIBRATION))) == len(observed.entries)


DEPLOY = [
    *(sys.executable, "-m", "clipdeploy", "deploy", "--model", "demo", "--no-benchmark"),
    *("--calibration", str(CALIBRATION), "--val", str(TEST), "--graphs-only"),
]
MOMENTS = ("export", "calibrate", "build int8", "verify", "package", "summary")


def deploy_in(folder: Path, *, kill: tuple[str, int] | None = None) -> tuple[int, str]:
    """The command in a folder, killed as soon as a stage begins; its code and its stderr."""
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        DEPLOY,
        cwd=folder,
        preexec_fn=hear_interrupts,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if kill and line.startswith(f"{kill[0]} ..."):
            process.send_signal(kill[1])
            break
    said += process.stderr.read()
    return process.wait(), said


def lasting(folder: Path) -> dict[str, str]:
    """Everything but what tells of times, and what a killed writer left under a name of its own."""
    timed = ("deployment.json", ".engine.json", ".part")
    return {name: value for name, value in hashes(folder).items() if not name.endswith(timed)}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_ends_as_an_undisturbed_one(how: int, tmp_path: Path) -> None:
    assert deploy_in(tmp_path / "undisturbed")[0] == 0
    for moment in MOMENTS:
        code, said = deploy_in(tmp_path / "killed", kill=(moment, how))
        assert code == (-how if how == signal.SIGKILL else 130), said
        assert "Traceback" not in said
    code, said = deploy_in(tmp_path / "killed")
    assert code == 0, said
    assert "calibrate: unchanged" in said
    assert lasting(tmp_path / "killed") == lasting(tmp_path / "undisturbed")
