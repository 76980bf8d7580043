"""Tests the facts of the real machine, and libraries that fail to import.

Covers: clipdeploy/doctor/probes.py.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from clipdeploy.core.device import gpus
from clipdeploy.doctor import Machine, this_machine
from clipdeploy.doctor import machine as facts
from clipdeploy.doctor.probes import ask


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return this_machine(tmp_path_factory.mktemp("work") / "not" / "yet")


def test_this_machine_matches_what_python_reports(machine: Machine) -> None:
    assert machine.python == sys.version_info[:3]
    assert machine.packages["numpy"] == metadata.version("numpy")
    assert machine.gpus == gpus()
    assert machine.torch is not None
    assert machine.torch.version == metadata.version("torch")
    assert machine.onnxruntime is not None
    assert "CPUExecutionProvider" in machine.onnxruntime.providers
    workspace, cache = machine.folders
    assert (workspace.role, cache.role) == ("workspace", "cache")
    assert workspace.free_bytes > 0
    assert not workspace.problem
    assert not workspace.path.parent.exists()


def test_the_tensorrt_version_of_the_provider_is_found(machine: Machine) -> None:
    if "onnxruntime-gpu" not in machine.packages:
        pytest.skip("onnxruntime without -gpu has no TensorRT provider")
    runtime = machine.onnxruntime
    assert runtime is not None
    assert runtime.tensorrt is not None
    assert runtime.tensorrt >= 10
    assert runtime.cuda is not None


def test_a_file_instead_of_the_workspace_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "probe", lambda name: None)
    (tmp_path / "artifacts").write_text("a file")
    folder = this_machine(tmp_path / "artifacts").folders[0]
    assert "is a file" in folder.problem


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise OSError('libcudart.so.13: cannot open')", "OSError: libcudart.so.13: cannot open"),
        ("import os; os._exit(3)", "exit code 3"),
        pytest.param(
            "import os; os.abort()",
            "the import crashed with SIGABRT",
            marks=pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
        ),
    ],
)
def test_a_library_that_fails_is_reported_without_a_crash(code: str, problem: str) -> None:
    assert ask(code).problem == problem


def test_output_of_a_library_is_ignored() -> None:
    answer = ask("import json as module\nprint('hello', end='')\nfacts = {'cuda': '13.0'}")
    assert (answer.version, answer.cuda, answer.problem) == ("2.0.9", "13.0", "")
