"""Commands on machines with a GPU that ONNX Runtime cannot use; see ``cuda_machine``.

Covers: clipdeploy/__main__.py, clipdeploy/core/device.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_machine import REASONS, Machine, cuda_machine, environment

from calibration.config import QuantizeConfig
from clipdeploy.core.device import driver, gpus
from clipdeploy.models import cards
from clipdeploy.pipeline import quantize_model
from clipdeploy.workspace.folder import Workspace

QUICK = ("--batch", "1", "--rounds", "2", "--warmup", "0")


@pytest.fixture(scope="module", params=REASONS)
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The libraries of each kind of machine."""
    kind: Machine = request.param
    return cuda_machine(tmp_path_factory.mktemp(kind.replace(" ", "_")), kind)


@pytest.fixture(scope="module")
def without_cudnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cuda_machine(tmp_path_factory.mktemp("no_cudnn"), "no cuDNN")


@pytest.fixture(scope="module")
def for_cpus(demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's ``int8-cpu`` graph."""
    workspace = Workspace(tmp_path_factory.mktemp("cpu") / "artifacts")
    shutil.copytree(demo_workspace.root, workspace.root)
    quantize_model(workspace, cards.DEMO, config=QuantizeConfig(remainder="fp32"))
    return workspace.graph(cards.DEMO, "int8-cpu")


def clipdeploy(machine: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clipdeploy", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(machine))


def warnings_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "warning" in line.lower()]


@pytest.mark.gpu
def test_the_driver_s_gpu_is_that_of_pytorch() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch is built without CUDA")
    assert len(gpus()) == torch.cuda.device_count()
    for index, gpu in enumerate(gpus()):
        assert gpu.name == torch.cuda.get_device_name(index)
        assert gpu.compute_capability == torch.cuda.get_device_capability(index)
    found = driver()
    assert found is not None
    # PyTorch's kernels just ran on this driver: it supports their CUDA, minor versions aside.
    assert torch.version.cuda is not None
    assert torch.zeros(1, device="cuda").item() == 0
    assert int(found.cuda.split(".")[0]) >= int(torch.version.cuda.split(".")[0])


def test_graphs_run_on_the_cpu_with_one_line_that_says_so(
    machine: Path, demo_workspace: Workspace
) -> None:
    graphs = [demo_workspace.graph(cards.DEMO, precision) for precision in ("fp32", "fp16")]
    done = clipdeploy(machine, "benchmark", *graphs, *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["runner"] for row in rows] == ["ONNX Runtime (CPU)"] * 2
    (line,) = warnings_of(done)
    assert line.startswith("warning: graphs run on the CPU although there is a GPU: ONNX Runtime")
    assert any(reason in line for reason in REASONS.values())
    # No lines of ONNX Runtime's logger.
    assert "onnxruntime" not in done.stderr


def test_cuda_on_request_is_an_error_with_the_reason(
    machine: Path, demo_workspace: Workspace
) -> None:
    graph = demo_workspace.graph(cards.DEMO, "fp32")
    done = clipdeploy(machine, "benchmark", graph, *QUICK, "--device", "cuda", "--json")
    assert done.returncode == 1
    (left,) = json.loads(done.stdout)["not_run"]
    assert left["reason"].startswith("ONNX Runtime cannot use CUDA: ")
    assert any(reason in left["reason"] for reason in REASONS.values())
    assert "error: nothing could be measured" in done.stderr
    assert not warnings_of(done)


def test_doctor_reports_it(without_cudnn: Path) -> None:
    done = clipdeploy(without_cudnn, "doctor", "--json")
    findings = json.loads(done.stdout)["findings"]
    (found,) = (f for f in findings if f["text"].startswith("cannot use CUDA"))
    assert (found["level"], found["subject"]) == ("warning", "ONNX Runtime")
    assert REASONS["no cuDNN"] in found["text"]
    assert "onnxruntime-gpu[cuda,cudnn]" in found["mend"]


def test_verify_judges_graphs_on_the_cpu(without_cudnn: Path, artifacts: Path) -> None:
    workspace = ("--workspace", artifacts, "--model", "demo")
    images = ("--data", cards.demo_file("test.zip"), "--images", "20")
    done = clipdeploy(without_cudnn, "verify", *workspace, *images, "--json")
    (row,) = json.loads(done.stdout)["rows"]
    assert row["verdict"] != "not executed"
    said = " ".join(warnings_of(done))
    assert said.count("graphs run on the CPU") == 1
    assert said.count("the PyTorch reference runs on the CPU") == 1


def test_predict_prints_pure_json(without_cudnn: Path, artifacts: Path, digits: Path) -> None:
    image = next((digits / "3").iterdir())
    workspace = ("--workspace", artifacts, "--model", "demo")
    done = clipdeploy(without_cudnn, "predict", image, *workspace, "--json", "--quiet")
    assert json.loads(done.stdout)["runner"] == "ONNX Runtime (CPU)"
    # Also with --quiet, which leaves out notes.
    assert len(done.stderr.splitlines()) == len(warnings_of(done)) == 1


def test_int8_for_cpus_never_runs_on_cuda(without_cudnn: Path, for_cpus: Path) -> None:
    done = clipdeploy(without_cudnn, "benchmark", for_cpus, *QUICK, "--json")
    (row,) = json.loads(done.stdout)["rows"]
    assert row["runner"] == "ONNX Runtime (CPU)"
    # CUDA was not even tried.
    assert not warnings_of(done)
    done = clipdeploy(without_cudnn, "benchmark", for_cpus, *QUICK, "--device", "cuda", "--json")
    (left,) = json.loads(done.stdout)["not_run"]
    assert "INT8 for ONNX Runtime's CPU kernels" in left["reason"]
