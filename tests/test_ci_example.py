"""The workflow of docs/ci.md: it parses, its commands are understood, and its steps run."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import parse
from command_server import CommandProgram
from demo_workspaces import few_digits
from doc_pages import Block

from clipdeploy.models import cards

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / "docs" / "examples" / "verify.yml"


def workflow() -> dict[str, Any]:
    loaded = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def steps() -> dict[str, dict[str, Any]]:
    """The steps of the job, by their name or by the action that they use."""
    (job,) = workflow()["jobs"].values()
    return {step.get("name") or step["uses"]: step for step in job["steps"]}


def test_the_workflow_has_what_github_requires() -> None:
    parsed = workflow()
    # YAML 1.1 reads the key "on" as true.
    assert set(parsed) == {"name", True, "permissions", "jobs"}
    (job,) = parsed["jobs"].values()
    assert {"runs-on", "steps"} <= set(job)
    for step in job["steps"]:
        assert ("run" in step) != ("uses" in step)
        assert "run" in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])


def test_its_commands_are_understood() -> None:
    lines = [step["run"] for step in steps().values() if "run" in step]
    calls = [words for text in lines for words in Block("sh", text, False).commands()]
    assert [words[0] for words in calls] == ["export", "calibrate", "quantize", "verify"]
    for words in calls:
        parse(words)
    # The comment about one's own weights is a command as well.
    (comment,) = re.findall(r"# .*: (clipdeploy .*)", WORKFLOW.read_text(encoding="utf-8"))
    ((words),) = Block("sh", comment, False).commands()
    parse(words)


def run_step(name: str, folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """A step on the demo model, as GitHub's runner starts it."""
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
        "MODEL": cards.DEMO,
        "CALIBRATION": str(cards.demo_file("calibration.zip")),
        **settings,
    }
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", steps()[name]["run"]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_its_steps_run_and_fail_where_nothing_is_proven(
    program: CommandProgram, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    program.write(tmp_path / "bin")
    few = str(few_digits(tmp_path / "few.zip", 2))
    made = run_step("Export and quantize", tmp_path)
    assert made.returncode == 0, made.stderr
    judged = run_step("Judge", tmp_path, VALIDATION=few, CLIPDEPLOY_MAX_DROP="30")
    assert judged.returncode == 0, judged.stderr
    summary = tmp_path / "summary.md"
    assert "EQUIVALENT" in summary.read_text(encoding="utf-8")
    assert "::error" not in judged.stdout
    summary.unlink()
    strict = run_step("Judge", tmp_path, VALIDATION=few, CLIPDEPLOY_MAX_DROP="0.01")
    assert strict.returncode == 3, strict.stderr
    assert "::error" in strict.stdout
    assert "EQUIVALENT" not in summary.read_text(encoding="utf-8").splitlines()[0]
