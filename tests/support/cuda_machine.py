"""Machines with a GPU that ONNX Runtime cannot use: stand-ins for NVIDIA's libraries.

ONNX Runtime and its CUDA provider are the installed ones.  The driver is a stand-in that reports a
GPU; the libraries that the provider is linked with are missing, or stand-ins whose functions fail,
or that work well enough to open a session, but without cuDNN.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Literal

import onnxruntime
import pytest

__all__ = ["REASONS", "Machine", "cuda_machine", "environment"]

# What is wrong with CUDA on a machine.
Machine = Literal["no libraries", "CUDA fails", "no cuDNN"]
# What the reason must contain.
REASONS: dict[Machine, str] = {
    "no libraries": "cannot open shared object file",
    "CUDA fails": "CUDA failure 35: stub",
    "no cuDNN": "cuDNN is unavailable",
}

_STUBS = Path(__file__).parent / "cuda_stub"
# cudaErrorInsufficientDriver of driver_types.h.
_FAILURE = 35


def cuda_machine(folder: Path, kind: Machine) -> Path:
    """Compile the libraries of a machine into ``folder``; return the folder."""
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if sys.platform != "linux" or not provider.exists():
        pytest.skip("onnxruntime has no CUDA provider for Linux")
    _compile(folder / "libcuda.so.1", _STUBS / "libcuda.c")
    if kind == "no libraries":
        return folder
    works = kind == "no cuDNN"
    for library, names in _linked(provider).items():
        # The functions of cuda_runtime.c replace weak ones.
        stubs = folder / f"{library}.c"
        stubs.write_text("".join(_stub(name, 0 if works else _FAILURE) for name in names))
        versions = folder / f"{library}.map"
        versions.write_text(f"{library} {{ global: *; }};\n")
        sources = (stubs, _STUBS / "cuda_runtime.c") if works else (stubs,)
        _compile(folder / library, *sources, f"-Wl,--version-script={versions}")
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process on the machine whose libraries are in ``folder``."""
    shown = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    shown.pop("CUDA_VISIBLE_DEVICES", None)
    return shown


def _linked(provider: Path) -> dict[str, list[str]]:
    """The libraries of CUDA that the provider is linked with, and the functions it calls."""
    listed = _output("readelf", "-d", provider)
    linked: dict[str, list[str]] = defaultdict(list)
    for library in re.findall(r"\[(libcu\w+\.so\.\d+)\]", listed):
        if not library.startswith("libcuda."):
            linked[library] = []
    for name, library in re.findall(r" U (\w+)@(libcu\S+)", _output("nm", "-D", "-u", provider)):
        linked[library].append(name)
    return linked


def _stub(name: str, result: int) -> str:
    text = name.endswith(("String", "Name"))
    kind, value = ("const char *", '"stub"') if text else ("int ", str(result))
    return f"__attribute__((weak)) {kind}{name}(void) {{ return {value}; }}\n"


def _output(program: str, *words: str | Path) -> str:
    if shutil.which(program) is None:
        pytest.skip(f"no {program}: apt install binutils")
    return subprocess.run([program, *words], check=True, capture_output=True, text=True).stdout


def _compile(library: Path, *words: str | Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler: apt install gcc")
    # The stubs have other parameters than the functions that a compiler knows.
    flags = ("-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}")
    subprocess.run([compiler, *flags, *words, "-o", library], check=True)
