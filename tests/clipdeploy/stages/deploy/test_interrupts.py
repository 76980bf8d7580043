"""Deployments that are killed, and what comes of them when they are run again."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("POSIX signals", allow_module_level=True)

from command_server import Command, CommandServer
from deployments import CALIBRATION, TEST, hashes

DEPLOY = (
    *("deploy", "--model", "demo", "--no-benchmark"),
    *("--calibration-data", str(CALIBRATION), "--val-data", str(TEST), "--graphs-only"),
    # With 24 images and no difference a drop below 13.9 points is proven.
    *("--val-images", "24", "--max-drop", "15"),
)
MOMENTS = ("export", "calibrate", "build int8", "verify", "package", "summary")


@pytest.fixture(scope="module")
def server(
    tensorrt_rtx: None, commands: CommandServer, tmp_path_factory: pytest.TempPathFactory
) -> CommandServer:
    home = str(tmp_path_factory.mktemp("home"))
    settings = {"CLIPDEPLOY_OFFLINE": "1", "CLIPDEPLOY_CONFIG": os.devnull, "CLIPDEPLOY_HOME": home}
    return commands.with_env(settings)


def deploy_in(
    server: CommandServer, folder: Path, *, kill: tuple[str, int] | None = None
) -> tuple[int, str]:
    """The command in a folder, killed as soon as a stage begins; its code and its stderr."""
    folder.mkdir(exist_ok=True)
    messages, pid = folder.with_suffix(".messages"), folder.with_suffix(".pid")
    if not messages.exists():
        os.mkfifo(messages)
    command = Command(DEPLOY, str(folder), os.devnull, str(messages), pid=str(pid))
    said = ""
    with ThreadPoolExecutor(1) as pool:
        # Opening waits for a writer: it shall not wait for one that never comes.
        writer = os.open(messages, os.O_RDWR)
        code = pool.submit(server.run, command)
        code.add_done_callback(lambda _: os.close(writer))
        with messages.open(encoding="utf-8") as stream:
            for line in stream:
                said += line
                if kill and line.startswith(f"{kill[0]} ..."):
                    os.kill(int(pid.read_text()), kill[1])
                    kill = None
        return code.result(), said


def lasting(folder: Path) -> dict[str, str]:
    """Everything but what tells of times, and what a killed writer left under a name of its own."""
    timed = ("deployment.json", ".engine.json")
    return {
        name: value
        for name, value in hashes(folder).items()
        if not (name.endswith(timed) or ".part" in name)
    }


@pytest.fixture(scope="module")
def undisturbed(server: CommandServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted deployment."""
    folder = tmp_path_factory.mktemp("deployed") / "undisturbed"
    assert deploy_in(server, folder)[0] == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_ends_as_an_undisturbed_one(
    how: int, server: CommandServer, undisturbed: Path, tmp_path: Path
) -> None:
    for moment in MOMENTS:
        code, said = deploy_in(server, tmp_path / "killed", kill=(moment, how))
        assert code == (-how if how == signal.SIGKILL else 130), said
        assert "Traceback" not in said
    code, said = deploy_in(server, tmp_path / "killed")
    assert code == 0, said
    assert "calibrate: unchanged" in said
    assert lasting(tmp_path / "killed") == lasting(undisturbed)
