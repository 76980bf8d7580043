"""Asks a library for its version and capabilities, in a separate process."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from dataclasses import dataclass

import msgspec

__all__ = ["PROBES", "Library", "probe"]


@dataclass(frozen=True)
class Library:
    """An installed library.

    ``problem`` is the reason why it cannot be imported; the other fields are then unset.  ``cuda``
    is the CUDA version that it was built for (``13.0``), None for a build without CUDA.
    ``sees_gpu`` is set for PyTorch; ``providers``, ``tensorrt`` (the major version that its
    TensorRT provider links) and ``cuda_problem`` for ONNX Runtime; and ``capabilities``, such as
    ``8.9``, for TensorRT-RTX.  ``cuda_problem`` is the reason why CUDA does not work, empty if it
    does, and None if it was not tried, because there is no GPU.
    """

    version: str = ""
    problem: str = ""
    cuda: str | None = None
    sees_gpu: bool = False
    providers: tuple[str, ...] = ()
    tensorrt: int | None = None
    cuda_problem: str | None = None
    capabilities: tuple[str, ...] = ()


_TORCH = """
import torch as module
facts = {"cuda": module.version.cuda, "sees_gpu": module.cuda.is_available()}
"""
# A provider is a library that is only loaded for a session, so the libraries that it links are read
# from its bytes.
_ONNXRUNTIME = r"""
import mmap, pathlib, re
import onnxruntime as module
from onnxruntime.capi import build_and_package_info as built
from clipdeploy.core.device import gpus
from exporters.providers import cuda_problem
facts = {
    "cuda": getattr(built, "cuda_version", None) or None,
    "providers": module.get_available_providers(),
    "cuda_problem": cuda_problem() if gpus() else None,
}
for path in pathlib.Path(built.__file__).parent.glob("*onnxruntime_providers_tensorrt*"):
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = re.search(rb"libnvinfer\.so\.(\d+)|nvinfer_(\d+)\.dll", data)
        facts["tensorrt"] = int(found[1] or found[2]) if found else None
"""
_TENSORRT = """
import tensorrt as module
facts = {}
"""
_TENSORRT_RTX = """
import tensorrt_rtx as module
from clipdeploy.engines.backends import compute_capabilities, targets_capabilities
facts = {"capabilities": compute_capabilities(module) if targets_capabilities(module) else ()}
"""
PROBES = {
    "torch": _TORCH,
    "onnxruntime": _ONNXRUNTIME,
    "tensorrt": _TENSORRT,
    "tensorrt_rtx": _TENSORRT_RTX,
}
_PRINT = """
import json
print("\\n" + json.dumps({"version": str(module.__version__), **facts}))
"""
_SECONDS = 120


def probe(name: str) -> Library | None:
    """Import one of :data:`PROBES` and describe it; None if it is not installed."""
    spec = importlib.util.find_spec(name)
    # TensorRT's type stubs are a folder without a module.
    if spec is None or spec.origin is None:
        return None
    return ask(PROBES[name])


def ask(code: str) -> Library:
    """Run a probe; an error in it becomes the library's ``problem``."""
    command = [sys.executable, "-c", code + _PRINT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return Library(problem=f"the import did not finish within {_SECONDS} s")
    if done.returncode < 0:
        return Library(problem=f"the import crashed with {signal.Signals(-done.returncode).name}")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return Library(problem=lines[-1] if lines else f"exit code {done.returncode}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Library)
