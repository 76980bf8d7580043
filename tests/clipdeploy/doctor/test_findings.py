"""Tests that known-bad combinations of made-up machines are found, and none on a good one.

Covers: clipdeploy/doctor/libraries.py, clipdeploy/doctor/verdicts.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clipdeploy.core.device import Driver, Gpu
from clipdeploy.doctor import Folder, Library, Machine, diagnose

L4 = Gpu("NVIDIA L4", (8, 9))
H100 = Gpu("NVIDIA H100", (9, 0))
RTX = ("7.5", "8.0", "8.6", "8.9", "12.0")
ORT = Library("1.31.1", cuda="13.0", tensorrt=10, providers=("CUDAExecutionProvider",))

SERVER = Machine(
    python=(3, 11, 7),
    platform="linux x86_64",
    packages={
        "numpy": "2.4.6",
        "onnxruntime-gpu": "1.31.1",
        "tensorrt": "10.13.3.9",
        "tensorrt-cu13": "10.13.3.9",
        "tensorrt-rtx": "1.7.1.116",
        "tensorrt-rtx-cu13": "1.7.1.116",
        "torch": "2.13.0",
    },
    requirements=("numpy>=1.26", "onnxruntime-gpu>=1.20", "torch>=2.9", "tensorrt-rtx>=1.5"),
    torch=Library("2.13.0", cuda="13.0", sees_gpu=True),
    onnxruntime=ORT,
    tensorrt=Library("10.13.3.9"),
    tensorrt_rtx=Library("1.7.1.116", capabilities=RTX),
    gpus=(L4,),
    driver=Driver("590.48.01", "13.1"),
    folders=(Folder("workspace", Path("artifacts"), 10**12), Folder("cache", Path("c"), 10**12)),
)


def without(*names: str, **more: str) -> dict[str, str]:
    """The server's packages, some removed and some added."""
    return {name: v for name, v in SERVER.packages.items() if name not in names} | more


def test_a_good_server_has_nothing_to_fix() -> None:
    diagnosis = diagnose(SERVER)
    assert diagnosis
    assert [f for f in diagnosis.findings if f.level != "good"] == []
    subjects = {finding.subject for finding in diagnosis.findings}
    assert {"Python", "PyTorch", "ONNX Runtime", "TensorRT", "driver", "GPU", "cache"} <= subjects


def test_what_runs_on_the_gpu_is_not_doubted_because_of_its_version() -> None:
    """The libraries of the other CUDA version may come from the system."""
    other = replace(ORT, cuda="12.8")
    assert diagnose(replace(SERVER, onnxruntime=other)).of("warning")
    ran = replace(other, cuda_problem="")
    assert not diagnose(replace(SERVER, onnxruntime=ran)).of("warning")


def test_a_laptop_without_a_gpu_can_run() -> None:
    cpu = Library("2.13.0+cpu")
    diagnosis = diagnose(replace(SERVER, gpus=(), driver=None, torch=cpu))
    assert diagnosis
    assert [f.subject for f in diagnosis.of("note")] == ["TensorRT", "GPU"]
    assert not diagnosis.of("warning")


BAD: list[tuple[str, dict[str, Any], str, str, str, str]] = [
    ("old Python", {"python": (3, 10, 4)}, "error", "Python", "older than 3.11", "python3.11"),
    (
        "a package is missing",
        {"packages": without("numpy")},
        "error",
        "packages",
        "numpy is not installed",
        'pip install "numpy>=1.26"',
    ),
    (
        "a package is old",
        {"packages": without(numpy="1.24.0")},
        "error",
        "packages",
        "numpy 1.24.0 does not match numpy>=1.26",
        'pip install "numpy>=1.26"',
    ),
    (
        "old tensorrt-rtx",
        {"packages": SERVER.packages | {"tensorrt-rtx": "1.4.0.76"}},
        "error",
        "packages",
        "tensorrt-rtx 1.4.0.76 does not match tensorrt-rtx>=1.5",
        'pip install "tensorrt-rtx>=1.5"',
    ),
    ("no torch", {"torch": None}, "error", "PyTorch", "not installed", "pip install torch"),
    (
        "a CPU torch beside a GPU",
        {"torch": Library("2.13.0+cpu")},
        "error",
        "PyTorch",
        "CPU build and does not use NVIDIA L4",
        "pip install --force-reinstall torch",
    ),
    (
        "torch for a newer CUDA than the driver's",
        {"driver": Driver("550.54.15", "12.4")},
        "error",
        "PyTorch",
        "CUDA 13.0, which needs driver 580 or newer; driver 550.54.15 supports CUDA 12.4",
        "CUDA 12",
    ),
    (
        "torch does not see the GPU",
        {"torch": Library("2.13.0", cuda="13.0")},
        "error",
        "PyTorch",
        "does not see NVIDIA L4",
        "torch.cuda.init()",
    ),
    (
        "both ONNX Runtimes",
        {"packages": without(onnxruntime="1.30.0")},
        "warning",
        "ONNX Runtime",
        "onnxruntime 1.30.0, onnxruntime-gpu 1.31.1 overwrite each other",
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
    ),
    ("no ONNX Runtime", {"onnxruntime": None}, "error", "ONNX Runtime", "not inst", "pip install"),
    (
        "a broken ONNX Runtime",
        {"onnxruntime": Library(problem="ImportError: undefined symbol")},
        "error",
        "ONNX Runtime",
        "undefined symbol",
        "pip uninstall",
    ),
    (
        "ONNX Runtime without CUDA",
        {"onnxruntime": Library("1.31.1", providers=("CPUExecutionProvider",))},
        "warning",
        "ONNX Runtime",
        "no CUDA provider",
        "pip install onnxruntime-gpu",
    ),
    (
        "ONNX Runtime and torch of two CUDAs",
        {"onnxruntime": replace(ORT, cuda="12.8")},
        "warning",
        "ONNX Runtime",
        "CUDA 12.8, but PyTorch installs 13.0",
        "pip install",
    ),
    (
        "ONNX Runtime without cuDNN",
        {"onnxruntime": replace(ORT, cuda_problem="cuDNN is unavailable: libcudnn.so")},
        "warning",
        "ONNX Runtime",
        "cannot use CUDA: cuDNN is unavailable: libcudnn.so: graphs run on the CPU",
        'pip install "onnxruntime-gpu[cuda,cudnn]"',
    ),
    (
        "a TensorRT provider of another major version",
        {"tensorrt": Library("11.4.0.106")},
        "warning",
        "ONNX Runtime",
        "links TensorRT 10, installed is 11.4.0.106",
        'pip install "tensorrt==10.*"',
    ),
    (
        "an old TensorRT",
        {"tensorrt": Library("10.3.0")},
        "warning",
        "TensorRT",
        "older than 10.12",
        'pip install "tensorrt>=10.12"',
    ),
    (
        "TensorRT wheels for a newer CUDA than the driver's",
        {"driver": Driver("550.54.15", "12.4")},
        "warning",
        "TensorRT",
        "driver 550.54.15 supports CUDA 12.4",
        "pip uninstall -y tensorrt tensorrt-cu13 && pip install tensorrt-cu12",
    ),
    (
        "no TensorRT at all",
        {"tensorrt": None, "tensorrt_rtx": None},
        "error",
        "TensorRT",
        "no installed TensorRT can build",
        'pip install "tensorrt>=10.12"',
    ),
    (
        "no TensorRT that builds without a GPU",
        {"tensorrt_rtx": None, "gpus": (), "driver": None},
        "error",
        "TensorRT",
        "no installed TensorRT can build",
        "pip install tensorrt-rtx",
    ),
    (
        "a data centre GPU that TensorRT-RTX does not know",
        {"tensorrt": None, "gpus": (H100,)},
        "error",
        "TensorRT",
        "no installed TensorRT can build",
        'pip install "tensorrt>=10.12"',
    ),
    (
        "a GPU older than Turing",
        {"gpus": (Gpu("Tesla V100", (7, 0)),)},
        "error",
        "GPU",
        "Tesla V100 (SM 7.0)",
        "CUDA_VISIBLE_DEVICES",
    ),
    (
        "GPUs that are hidden",
        {"gpus": (), "visible": ""},
        "warning",
        "GPU",
        "CUDA_VISIBLE_DEVICES='' hides",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    ("no GPU behind the driver", {"gpus": ()}, "warning", "GPU", "no GPU", "nvidia-smi"),
    (
        "a full disk",
        {"folders": (Folder("workspace", Path("w"), 10**8),)},
        "error",
        "workspace",
        "0.1 GB free",
        "--workspace",
    ),
    (
        "a disk that is nearly full",
        {"folders": (Folder("cache", Path("c"), 10**9),)},
        "warning",
        "cache",
        "1.0 GB free",
        "CLIPDEPLOY_HOME",
    ),
    (
        "a folder that cannot be written",
        {"folders": (Folder("cache", Path("c"), 10**12, "Permission denied"),)},
        "error",
        "cache",
        "Permission denied",
        "CLIPDEPLOY_HOME",
    ),
]


@pytest.mark.parametrize(
    ("change", "level", "subject", "text", "mend"),
    [row[1:] for row in BAD],
    ids=[row[0] for row in BAD],
)
def test_a_problem_is_found_with_its_fix(
    change: dict[str, Any], level: str, subject: str, text: str, mend: str
) -> None:
    diagnosis = diagnose(replace(SERVER, **change))
    found = [f for f in diagnosis.findings if (f.level, f.subject) == (level, subject)]
    assert [f for f in found if text in f.text and mend in f.mend], diagnosis.findings
    assert bool(diagnosis) == (not diagnosis.of("error"))


def test_every_problem_has_a_fix() -> None:
    for _, change, *_ in BAD:
        for finding in diagnose(replace(SERVER, **change)).findings:
            assert bool(finding.mend) == (finding.level != "good"), finding


def test_tensorrt_rtx_may_not_support_the_gpu_if_tensorrt_does() -> None:
    assert not diagnose(replace(SERVER, gpus=(H100,))).of("warning")


@pytest.mark.parametrize("cuda", ["12.0", "12.9", "13.0"])
def test_within_a_major_version_every_driver_runs_every_cuda(cuda: str) -> None:
    """CUDA's minor version compatibility: 13.1 runs on a driver of 13.0."""
    newest = replace(SERVER, driver=Driver("580.65.06", "13.0"))
    built = replace(newest, torch=Library("2.13.0", cuda=cuda, sees_gpu=True))
    assert diagnose(built)
