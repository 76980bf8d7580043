"""ONNX Runtime on machines whose GPU it cannot use; see ``cuda_machine``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cuda_machine import REASONS, Machine, cuda_machine, environment

from clipdeploy.core.device import gpus
from clipdeploy.core.errors import ClipdeployError
from exporters.providers import CUDA, cuda_problem
from exporters.session import OnnxSession

PROBLEM = "from exporters.providers import cuda_problem; print(cuda_problem())"
# ONNX Runtime by itself, with a graph of one convolution.
BY_ITSELF = """
import numpy, onnxruntime
from exporters import providers
onnxruntime.preload_dlls()
session = onnxruntime.InferenceSession(providers._probe(), providers=[providers.CUDA])
print(session.get_providers()[0])
session.run(None, {"image": numpy.ones((1, 3, 4, 4), numpy.float32)})
"""


def on_machine(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment(folder))


@pytest.mark.parametrize("kind", REASONS)
def test_the_reason_is_found_and_nothing_else_is_printed(kind: Machine, tmp_path: Path) -> None:
    done = on_machine(cuda_machine(tmp_path, kind), PROBLEM)
    (line,) = done.stdout.splitlines()
    assert REASONS[kind] in line
    # Not ONNX Runtime's own functions and source files.
    assert "onnxruntime::" not in line
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("kind", "printed", "failed"),
    [
        ("no libraries", "Failed to load", False),
        ("CUDA fails", "EP Error", False),
        # The session is opened on CUDA; only a run shows that cuDNN is missing.
        ("no cuDNN", CUDA, True),
    ],
)
def test_onnx_runtime_by_itself_prints_or_fails_late(
    kind: Machine, printed: str, failed: bool, tmp_path: Path
) -> None:
    done = on_machine(cuda_machine(tmp_path, kind), BY_ITSELF)
    assert printed in done.stdout
    assert bool(done.returncode) == failed


def test_without_a_gpu_the_reason_is_that() -> None:
    if gpus():
        pytest.skip("there is a GPU")
    assert cuda_problem() == "there is no GPU"


def test_a_session_on_cuda_is_never_opened_on_the_cpu(
    tiny_graph: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if gpus():
        pytest.skip("there is a GPU")
    with pytest.raises(ClipdeployError, match="CUDA"):
        OnnxSession(tiny_graph, provider=CUDA)
    assert capfd.readouterr().out == ""
