"""Finds the Triton server release for an artifact.

Sources of ``data/triton_servers.csv``: ONNX Runtime's column is from
docs/introduction/compatibility.md of triton-inference-server/server (26.08).  TensorRT's column
only has versions that NVIDIA's repositories state for a month's containers: the same file gives
TensorRT 10.13.3.9 for PyTorch of 25.10, and triton-inference-server/tensorrtllm_backend gives
10.14.1.48 for the server of 25.12.  The Dockerfile also checks the TensorRT version in the image.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources

from clipdeploy.engines.backends import release_of
from clipdeploy.engines.passport import EnginePassport

__all__ = ["IMAGE", "MATRIX", "Server", "server_for", "servers"]

IMAGE = "nvcr.io/nvidia/tritonserver"
MATRIX = "NVIDIA's Deep Learning Frameworks Support Matrix"


@dataclass(frozen=True)
class Server:
    """A release, such as ``25.10``; ``tensorrt`` is empty if it is unknown."""

    release: str
    tensorrt: str
    onnxruntime: str


@cache
def servers() -> tuple[Server, ...]:
    """All known releases, oldest first."""
    table = resources.files("clipdeploy").joinpath("data", "triton_servers.csv")
    with table.open(encoding="utf-8") as stream:
        return tuple(Server(**row) for row in csv.DictReader(stream))


def server_for(engine: EnginePassport | None) -> str | None:
    """The newest release that can serve ``engine``, or a graph if None; None if unknown."""
    if engine is None:
        return servers()[-1].release
    needed = release_of(engine.backend_version)
    matching = [one.release for one in servers() if one.tensorrt == needed]
    return matching[-1] if matching else None
