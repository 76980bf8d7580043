"""Checks that PyTorch, ONNX Runtime and TensorRT work together with this GPU and driver."""

from __future__ import annotations

import re
from collections.abc import Iterator

from packaging.version import Version

from clipdeploy.doctor.machine import Library, Machine
from clipdeploy.doctor.verdicts import Finding, error, good, note, warning
from clipdeploy.engines.backends import OLDEST

__all__ = ["judge_onnxruntime", "judge_tensorrt", "judge_torch"]

_OLDEST_TENSORRT = Version(OLDEST["tensorrt"])
_NEW_TENSORRT = f'pip install "tensorrt>={_OLDEST_TENSORRT}"'
# The first driver of each CUDA major (NVIDIA, "CUDA Compatibility", minor version compatibility).
_DRIVER_OF_CUDA = {11: 450, 12: 525, 13: 580}
_CUDA_OF_ONNXRUNTIME = 'pip install "onnxruntime-gpu[cuda,cudnn]"'
_ONE_ONNXRUNTIME = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _too_new(cuda: str | None, machine: Machine) -> str:
    """Why this driver cannot run a library built for ``cuda``; empty if it can.

    A driver runs every CUDA version of the same major version.
    """
    nvidia = machine.driver
    if cuda is None or nvidia is None or _major(cuda) <= _major(nvidia.cuda):
        return ""
    driver = _DRIVER_OF_CUDA.get(_major(cuda))
    needs = f", which needs driver {driver} or newer" if driver else ""
    return f"is built for CUDA {cuda}{needs}; driver {nvidia.version} supports CUDA {nvidia.cuda}"


def judge_torch(machine: Machine) -> Iterator[Finding]:
    """Check PyTorch, which exports, computes the reference and allocates memory for engines."""
    torch, again = machine.torch, "pip install --force-reinstall torch"
    if torch is None:
        yield error("PyTorch", "not installed", "pip install torch")
    elif torch.problem:
        yield error("PyTorch", f"cannot be imported: {torch.problem}", again)
    elif not machine.gpus:
        yield good("PyTorch", f"{torch.version}, {_built_for(torch.cuda)}")
    elif torch.cuda is None:
        name = machine.gpus[0].name
        yield error("PyTorch", f"{torch.version} is a CPU build and does not use {name}", again)
    elif reason := _too_new(torch.cuda, machine):
        yield error("PyTorch", f"{torch.version} {reason}", _older_build("torch", machine))
    elif not torch.sees_gpu:
        yield error(
            "PyTorch",
            f"{torch.version} for CUDA {torch.cuda} does not see {machine.gpus[0].name}",
            'python -c "import torch; torch.cuda.init()"  (says why)',
        )
    else:
        yield good("PyTorch", f"{torch.version}, {_built_for(torch.cuda)}")


def _older_build(package: str, machine: Machine) -> str:
    nvidia = machine.driver
    major = _major(nvidia.cuda) if nvidia else 12
    return f"update the NVIDIA driver, or install the {package} build for CUDA {major}"


def _built_for(cuda: str | None) -> str:
    return f"CUDA {cuda}" if cuda else "CPU build"


def judge_onnxruntime(machine: Machine) -> Iterator[Finding]:
    """Check ONNX Runtime, which calibrates and runs graphs."""
    both = {"onnxruntime", "onnxruntime-gpu"} <= machine.packages.keys()
    if both:
        versions = ", ".join(
            f"{name} {machine.packages[name]}" for name in ("onnxruntime", "onnxruntime-gpu")
        )
        yield warning(
            "ONNX Runtime",
            f"{versions} overwrite each other, so either may run",
            _ONE_ONNXRUNTIME,
        )
    runtime = machine.onnxruntime
    if runtime is None:
        yield error("ONNX Runtime", "not installed", "pip install onnxruntime-gpu")
        return
    if runtime.problem:
        yield error("ONNX Runtime", f"cannot be imported: {runtime.problem}", _ONE_ONNXRUNTIME)
        return
    if not both:
        providers = ", ".join(name.removesuffix("ExecutionProvider") for name in runtime.providers)
        yield good("ONNX Runtime", f"{runtime.version}, {_built_for(runtime.cuda)}: {providers}")
    yield from _cuda_provider(machine)
    yield from _tensorrt_provider(machine)


def _cuda_provider(machine: Machine) -> Iterator[Finding]:
    runtime, torch = machine.onnxruntime, machine.torch
    # Empty: a graph was run on the GPU.
    if runtime is None or not machine.gpus or runtime.cuda_problem == "":
        return
    slow = "graphs run on the CPU"
    if "CUDAExecutionProvider" not in runtime.providers:
        yield warning("ONNX Runtime", f"has no CUDA provider: {slow}", _ONE_ONNXRUNTIME)
    elif reason := _too_new(runtime.cuda, machine):
        mend = _older_build("onnxruntime-gpu", machine)
        yield warning("ONNX Runtime", f"{reason}: {slow}", mend)
    elif torch and torch.cuda and runtime.cuda and _major(torch.cuda) != _major(runtime.cuda):
        # Its wheel contains no CUDA libraries: it loads those that PyTorch's wheels installed.
        yield warning(
            "ONNX Runtime",
            f"is built for CUDA {runtime.cuda}, but PyTorch installs {torch.cuda}: {slow}",
            f"{_CUDA_OF_ONNXRUNTIME}  (adds CUDA {_major(runtime.cuda)})",
        )
    elif runtime.cuda_problem:
        text = f"cannot use CUDA: {runtime.cuda_problem}: {slow}"
        yield warning("ONNX Runtime", text, _CUDA_OF_ONNXRUNTIME)


def _tensorrt_provider(machine: Machine) -> Iterator[Finding]:
    runtime, tensorrt = machine.onnxruntime, machine.tensorrt
    if runtime is None or tensorrt is None or runtime.tensorrt is None or not tensorrt.version:
        return
    if runtime.tensorrt != _major(tensorrt.version):
        yield warning(
            "ONNX Runtime",
            f"its TensorRT provider links TensorRT {runtime.tensorrt}, installed is "
            f"{tensorrt.version}: it cannot load (clipdeploy does not need it)",
            f'pip install "tensorrt=={runtime.tensorrt}.*"',
        )


def judge_tensorrt(machine: Machine) -> Iterator[Finding]:
    """Check that TensorRT or TensorRT-RTX can build an engine, and run it if there is a GPU."""
    found = []
    if machine.tensorrt is not None:
        found.append(_judge_tensorrt(machine, machine.tensorrt))
    if machine.tensorrt_rtx is not None:
        alone = not any(finding.level == "good" for finding in found)
        found.append(_judge_tensorrt_rtx(machine, machine.tensorrt_rtx, alone=alone))
    yield from found
    if not any(finding.level == "good" for finding in found):
        yield error(
            "TensorRT",
            "no installed TensorRT can build an engine for this machine",
            _NEW_TENSORRT if machine.gpus else "pip install tensorrt-rtx",
        )


def _judge_tensorrt(machine: Machine, library: Library) -> Finding:
    subject = "TensorRT"
    if wrong := _unusable(machine, library, subject, "tensorrt"):
        return wrong
    if Version(library.version) < _OLDEST_TENSORRT:
        old = f"{library.version} is older than {_OLDEST_TENSORRT}"
        return warning(subject, old, _NEW_TENSORRT)
    if not machine.gpus:
        return note(
            subject,
            f"{library.version} builds only on a machine with a GPU",
            "clipdeploy build-engine --backend tensorrt-rtx",
        )
    return good(subject, library.version)


def _judge_tensorrt_rtx(machine: Machine, library: Library, *, alone: bool) -> Finding:
    subject = "TensorRT-RTX"
    if wrong := _unusable(machine, library, subject, "tensorrt-rtx"):
        return wrong
    targets = ", ".join(library.capabilities)
    unsupported = _unsupported_gpu(machine, library)
    if unsupported and alone:
        text = f"{library.version} builds for SM {targets}, not for {unsupported}"
        return warning(subject, text, _NEW_TENSORRT)
    return good(subject, f"{library.version}, for SM {targets}")


def _unusable(machine: Machine, library: Library, subject: str, package: str) -> Finding | None:
    """Report a backend that cannot be imported, or whose CUDA is too new for the driver."""
    if library.problem:
        mend = f"pip install --force-reinstall {package}"
        return warning(subject, f"cannot be imported: {library.problem}", mend)
    cuda = _wheel_cuda(machine, package)
    reason = _too_new(cuda, machine)
    if not reason or machine.driver is None:
        return None
    older = f"{package}-cu{_major(machine.driver.cuda)}"
    mend = f"pip uninstall -y {package} {package}-cu{cuda} && pip install {older}"
    return warning(subject, f"{library.version} {reason}", mend)


def _wheel_cuda(machine: Machine, backend: str) -> str | None:
    """The CUDA major version in the name of the backend's wheels: 13 for ``tensorrt-cu13``."""
    for name in machine.packages:
        if match := re.fullmatch(rf"{backend}-cu(\d+)", name):
            return match[1]
    return None


def _unsupported_gpu(machine: Machine, library: Library) -> str:
    """The first GPU that TensorRT-RTX does not support; empty if it supports all."""
    for gpu in machine.gpus:
        if library.capabilities and gpu.capability not in library.capabilities:
            return f"{gpu.name} ({gpu.sm})"
    return ""
