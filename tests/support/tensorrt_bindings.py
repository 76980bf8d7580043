"""NVIDIA's Python bindings of TensorRT, imported without TensorRT's libraries.

The bindings are a small wheel on the package index.  They link three large libraries, of which
``tensorrt_stub/libnvinfer.c`` has the entry points.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

__all__ = ["NEWEST", "OLDEST", "Bindings", "bindings", "describe"]

# TensorRT 10.12 has no wheel for CUDA 13.
OLDEST = "tensorrt_cu12_bindings==10.12.0.36"
NEWEST = "tensorrt_cu13_bindings==11.4.0.106"
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_SOURCE = Path(__file__).with_name("tensorrt_stub") / "libnvinfer.c"
_COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
# What `import tensorrt` gives with the real package.
_PACKAGE = 'import sys, tensorrt_bindings\nsys.modules["tensorrt"] = tensorrt_bindings\n'
# Each class with its attributes, each function without; the text is that of pybind11, which has the
# signature of every overload.
_DESCRIBE = """
import importlib, inspect, json, sys
module = importlib.import_module(sys.argv[1])
found = {}
for name in dir(module):
    value = getattr(module, name)
    if isinstance(value, type):
        members = ((each, getattr(value, each)) for each in dir(value))
        found[name] = {each: it.__doc__ or "" if callable(it) else "" for each, it in members}
    elif inspect.isfunction(value):
        found[name] = {"__call__": f"{name}{inspect.signature(value)} -> object"}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Bindings:
    """``packages`` holds the modules ``tensorrt`` and ``tensorrt_bindings``."""

    version: str
    packages: Path
    libraries: Path

    def python(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run Python with these bindings, as ``python WORDS``."""
        paths = [str(self.packages), os.environ.get("PYTHONPATH", "")]
        more = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "LD_LIBRARY_PATH": str(self.libraries),
        }
        command = [sys.executable, *words]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **more})


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of ``requirement`` in ``folder``, downloaded by pip if it is not there yet."""
    name, version = requirement.split("==")
    pattern = f"{name}-{version}-*.whl"
    if not (found := sorted(folder.glob(pattern))):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            words = ("download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1")
            command = [sys.executable, "-m", "pip", *words, "--dest", temporary, requirement]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = done.stderr.strip().splitlines()[-1:] or ["pip failed"]
                pytest.skip(f"pip cannot download {requirement}: {reason[0]}")
            for wheel in Path(temporary).glob("*.whl"):
                wheel.replace(folder / wheel.name)
        found = sorted(folder.glob(pattern))
    return found[0]


def _link(version: str, folder: Path) -> None:
    """Compile the stub to the libraries that this version links."""
    if _COMPILER is None:
        pytest.skip("no C compiler: apt install gcc")
    for name in _LIBRARIES:
        target = folder / f"lib{name}.so.{version.split('.')[0]}"
        subprocess.run([_COMPILER, "-shared", "-fPIC", "-o", target, _SOURCE], check=True)


@cache
def bindings(requirement: str, downloads: Path) -> Bindings:
    """Make the bindings of ``requirement`` importable; ``downloads`` keeps the wheel.

    Skips the test if this is not Linux, there is no C compiler, or pip finds no wheel for this
    interpreter.
    """
    if sys.platform != "linux":
        pytest.skip("the stub of TensorRT's library is for Linux")
    folder = Path(tempfile.mkdtemp(prefix="tensorrt-bindings-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = Bindings(requirement.split("==")[1], folder / "packages", folder / "libraries")
    made.libraries.mkdir()
    with zipfile.ZipFile(_download(requirement, downloads)) as wheel:
        wheel.extractall(made.packages)
    (made.packages / "tensorrt.py").write_text(_PACKAGE)
    _link(made.version, made.libraries)
    return made


def describe(made: Bindings | None) -> dict[str, dict[str, str]]:
    """The classes and functions of ``made``, or of TensorRT-RTX as it is installed here."""
    if made is None:
        command = [sys.executable, "-c", _DESCRIBE, "tensorrt_rtx"]
        done = subprocess.run(command, capture_output=True, text=True)
    else:
        done = made.python("-c", _DESCRIBE, "tensorrt")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
