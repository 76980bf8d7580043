"""Which release of Triton's server fits an artifact.

``data/triton_servers.csv``: ONNX Runtime's column is docs/introduction/compatibility.md of
triton-inference-server/server (26.08).  TensorRT's holds only what NVIDIA's repositories say of a
month's containers: the same file pairs PyTorch of 25.10 with TensorRT 10.13.3.9, and
triton-inference-server/tensorrtllm_backend the server of 25.12 with 10.14.1.48.  The table is
short on purpose, and the Dockerfile looks at the TensorRT in the image, whatever the table says.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources

from clipdeploy.engines.passport import EnginePassport

__all__ = ["IMAGE", "MATRIX", "Server", "server_for", "servers"]

IMAGE = "nvcr.io/nvidia/tritonserver"
MATRIX = "NVIDIA's Deep Learning Frameworks Support Matrix"


@dataclass(frozen=True)
class Server:
    """A release, such as ``25.10``; ``tensorrt`` is empty where it is not known."""

    release: str
    tensorrt: str
    onnxruntime: str


@cache
def servers() -> tuple[Server, ...]:
    """Every release that is known, the oldest first."""
    table = resources.files("clipdeploy").joinpath("data", "triton_servers.csv")
    with table.open(encoding="utf-8") as stream:
        return tuple(Server(**row) for row in csv.DictReader(stream))


def server_for(engine: EnginePassport | None) -> str | None:
    """The newest release that can serve an engine, or a graph (None); None if none is known."""
    if engine is None:
        return servers()[-1].release
    fitting = [one.release for one in servers() if one.tensorrt == engine.backend_version]
    return fitting[-1] if fitting else None
