"""Deployments that are killed, and what comes of them when they are run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from deployments import CALIBRATION, TEST, hashes
from interrupts import hear_interrupts

DEPLOY = [
    *(sys.executable, "-m", "clipdeploy", "deploy", "--model", "demo", "--no-benchmark"),
    *("--calibration-data", str(CALIBRATION), "--val-data", str(TEST), "--graphs-only"),
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
    timed = ("deployment.json", ".engine.json")
    return {
        name: value
        for name, value in hashes(folder).items()
        if not (name.endswith(timed) or ".part" in name)
    }


@pytest.mark.slow
@pytest.mark.usefixtures("tensorrt_rtx")
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
