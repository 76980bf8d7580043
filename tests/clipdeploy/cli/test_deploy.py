"""``clipdeploy deploy`` as a user types it, and its checklist.

Covers: clipdeploy/cli/checklist.py, clipdeploy/stages/stage_log.py,
    clipdeploy/stages/deploy/page.py.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
from pathlib import Path

import pytest
from deployments import copied
from graph_faults import ruin, turn_answers
from rich.console import Console
from verify_command import TEST, good, refused, run

from clipdeploy.cli.stage_display import StageDisplay
from clipdeploy.core.device import gpus
from clipdeploy.core.errors import DatasetError
from clipdeploy.models import cards
from clipdeploy.stages.stage_log import StageLog
from clipdeploy.workspace.folder import Workspace

CALIBRATION = cards.demo_file("calibration.zip")
# 24 images without a difference prove a drop below 13.9 points.
FEW = ("--val-images", "24", "--max-drop", "15", "--no-benchmark")


@pytest.fixture
def artifacts(demo_workspace: Workspace, tmp_path: Path) -> Path:
    """A workspace with every graph, that may be changed."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    shutil.copytree(demo_workspace.root, tmp_path / "artifacts")
    return tmp_path / "artifacts"


def words(artifacts: Path, *more: str | Path, val: Path = TEST) -> tuple[str | Path, ...]:
    at = ("--model", "demo", "--workspace", artifacts)
    return ("deploy", "--calibration-data", CALIBRATION, "--val-data", val, *at, *FEW, *more)


def test_a_line_a_stage_where_nobody_watches(artifacts: Path) -> None:
    result = run(*words(artifacts, "--graphs-only"))
    assert result.exit_code == 0, result.output
    said = result.stderr.splitlines()
    for stage in ("export", "calibrate", "quantize"):
        assert said.index(f"{stage} ...") + 1 == said.index(f"{stage}: unchanged")
    for stage in ("build int8", "verify", "package", "summary"):
        assert any(re.fullmatch(rf"{stage}: done, \d+\.\d s", line) for line in said)
    assert result.stdout.startswith("EQUIVALENT")
    for shown in ("int8.engine was built but not executed", "docker build", "deployment.html"):
        assert shown in result.stdout


def test_json_is_all_that_stdout_holds_and_quiet_says_nothing(artifacts: Path) -> None:
    result = run(*words(artifacts, "--graphs-only", "--json", "--quiet"))
    found = good(result)
    assert result.stderr == ""
    assert found["passed"] is True
    assert [stage["name"] for stage in found["stages"]][-1] == "package"
    page = artifacts / cards.DEMO / "deployment.json"
    assert json.loads(page.read_bytes()) == found


def test_a_regressed_graph_exits_with_three(artifacts: Path) -> None:
    ruin(artifacts / cards.DEMO / "int8.onnx", turn_answers)
    result = run(*words(artifacts, "--graphs-only"))
    assert result.exit_code == 3, result.output
    assert result.stdout.startswith("REGRESSED: int8 graph")
    assert "No package: the verdict does not allow one" in result.stdout
    assert "package: left out, the verdict does not allow one" in result.stderr
    assert not (artifacts / cards.DEMO / "triton").exists()


@pytest.mark.skipif(bool(gpus()), reason="the engine can run here")
def test_an_engine_that_did_not_run_exits_with_three(artifacts: Path) -> None:
    result = run(*words(artifacts))
    assert result.exit_code == 3, result.output
    assert "NOT PROVEN: int8 engine not executed" in result.stdout
    assert "--graphs-only" in result.stdout
    assert not (artifacts / cards.DEMO / "triton").exists()


@pytest.mark.parametrize(("precision", "expected"), [("--int8", True), ("--fp16", False)])
def test_a_setting_calibrates_int8_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, expected: bool
) -> None:
    monkeypatch.setenv("CLIPDEPLOY_CALIBRATION_DATA", str(CALIBRATION))
    at = ("--model", "demo", "--workspace", tmp_path / "artifacts")
    result = run("deploy", precision, "--val-data", tmp_path / "nothing", *at)
    refused(result, 1, "does not exist", "--val-data")
    assert (
        f"calibration_data: {CALIBRATION} (CLIPDEPLOY_CALIBRATION_DATA)" in result.stderr
    ) is expected


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--fp16",), 2, "--calibration-data belongs to --int8"),
        (("--checkpoint", "x.pth", "--random-init", "1"), 2, "exclude each other"),
        (("--recipe", "x.json", "--no-smooth"), 2, "a recipe contains all"),
        (("--triton", "/proc/clipdeploy"), 1, "cannot write /proc/clipdeploy"),
        (("--max-drop", "-1"), 2, "for --max-drop (use a number from 0 to 100)"),
    ],
)
def test_bad_options(more: tuple[str, ...], code: int, said: str, artifacts: Path) -> None:
    result = run(*words(artifacts, *more))
    refused(result, code, said)
    assert not (artifacts / cards.DEMO / "int8.engine").exists()


def test_what_cannot_be_read_is_named_and_left_open(artifacts: Path, tmp_path: Path) -> None:
    val = copied(TEST, tmp_path / "val", 3)
    (val / "3" / "broken.png").write_bytes(b"\x89PNG and no more")
    asked = words(artifacts, "--graphs-only", "--val-images", "31", val=val)
    refused(run(*asked), 1, "3/broken.png", "--skip-unreadable")
    result = run(*asked, "--skip-unreadable")
    assert result.exit_code == 0, result.output
    assert "skipped, unreadable: 3/broken.png" in result.stderr
    assert "1 image was unreadable and not used" in result.stdout


def test_a_stage_that_failed_is_named(artifacts: Path, tmp_path: Path) -> None:
    result = run(*words(artifacts, val=tmp_path / "nothing"))
    refused(result, 1, "does not exist", "--val-data")
    printed = [line for line in result.stderr.splitlines() if not line.startswith("settings: ")]
    assert printed[:2] == ["check ...", "check: failed"]


def checklist(console: Console) -> StageDisplay:
    display = StageDisplay(console=console)
    with display:
        log = StageLog(("export", "calibrate", "verify", "package"), display)
        log.run("export", lambda: None, lambda made: False)
        display.note("8 images [of a kind]")

        def calibrate() -> None:
            with display.task("observe [images]", 8) as advance:
                for _ in range(8):
                    advance(1)

        log.run("calibrate", calibrate)
        log.leave_out("package", "the verdict does not allow one")

        def verify() -> None:
            raise DatasetError("no image")

        log.run("verify", verify)
    return display


def test_the_checklist_shows_every_stage_as_it_ended() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    with pytest.raises(DatasetError):
        checklist(console)
    # What stands on the screen in the end: each drawing begins at its first line again.
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert plain.count("8 images [of a kind]\n") == 1
    lines = [line.split() for line in plain.splitlines() if line.strip()][-4:]
    assert lines[0] == ["export", "unchanged"]
    assert lines[1][:2] == ["calibrate", "done"]
    assert lines[2][:2] == ["verify", "failed"]
    assert lines[3][:3] == ["package", "left", "out"]


def test_nothing_is_drawn_while_a_benchmark_measures() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)

    def drawing() -> bool:
        threads = [each for each in threading.enumerate() if "Refresh" in type(each).__name__]
        for thread in threads:
            # One that was told to stop does so at once.
            thread.join(timeout=2)
        return any(thread.is_alive() for thread in threads)

    with StageDisplay(console=console) as display:
        log = StageLog(("export", "benchmark"), display)
        assert log.run("export", drawing)
        assert not log.run("benchmark", drawing)
    assert re.search(r"benchmark +done", stream.getvalue())
