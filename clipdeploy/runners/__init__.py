"""Runs classifiers through one interface: PyTorch modules, ONNX graphs, TensorRT engines."""

from __future__ import annotations

from pathlib import Path

from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import Passport
from clipdeploy.runners.base import Runner
from clipdeploy.runners.onnx import OnnxRunner, Provider

__all__ = ["OnnxRunner", "Provider", "Runner", "open_runner"]


def open_runner(
    path: Path,
    *,
    provider: Provider = "auto",
    threads: int = 0,
    trust: bool = False,
    cuda_graph: bool = False,
    as_stored: bool = False,
    passport: Passport | None = None,
) -> Runner:
    """Open a runner for an ``.onnx`` or ``.engine`` file.

    ``provider``, ``threads``, ``as_stored`` and ``passport`` apply to graphs, see
    :class:`OnnxRunner`; ``trust`` and ``cuda_graph`` apply to engines, see
    :class:`clipdeploy.runners.engine.EngineRunner`.

    Raises:
        UsageError: the file has another suffix.
        EngineError, GraphError, ArtifactError: the file cannot be run on this machine.
    """
    if path.suffix == ".onnx":
        return OnnxRunner(path, provider, threads, as_stored=as_stored, passport=passport)
    if path.suffix == ".engine":
        # Only engines need PyTorch; without it a graph starts seconds sooner.
        from clipdeploy.runners.engine import EngineRunner

        return EngineRunner(path, trust=trust, cuda_graph=cuda_graph)
    raise UsageError(f"{path} is neither .onnx nor .engine", hint="name a graph or an engine")
