"""One small interface to whatever computes logits: PyTorch, ONNX Runtime, TensorRT."""

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
    """A runner for an ``.onnx`` or ``.engine`` file.

    ``as_stored`` and ``passport`` are :class:`OnnxRunner`'s.

    Raises:
        UsageError: another kind of file.
        EngineError, GraphError, ArtifactError: it cannot be run here.
    """
    if path.suffix == ".onnx":
        return OnnxRunner(path, provider, threads, as_stored=as_stored, passport=passport)
    if path.suffix == ".engine":
        # PyTorch holds an engine's memory; a graph does without, and starts seconds sooner.
        from clipdeploy.runners.engine import EngineRunner

        return EngineRunner(path, trust=trust, cuda_graph=cuda_graph)
    raise UsageError(f"{path} is neither .onnx nor .engine", hint="name a graph or an engine")
