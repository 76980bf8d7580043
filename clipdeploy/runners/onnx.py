"""Runs an ONNX graph on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import numpy as np

from clipdeploy.core.device import gpus, warn_of_cpu
from clipdeploy.core.errors import EngineError, GraphError
from clipdeploy.core.passport import Passport, Precision
from clipdeploy.runners.base import Closing, Images, Logits, in_parts
from exporters.headers import read_passport
from exporters.overflow import stored_session
from exporters.providers import CPU, CUDA, cuda_problem
from exporters.session import OnnxSession
from exporters.signature import stored_types

__all__ = ["OnnxRunner", "Provider"]

Provider = Literal["auto", "cpu", "cuda"]


class OnnxRunner(Closing):
    """Runs a graph on ONNX Runtime; ``auto`` uses CUDA if it works here, otherwise the CPU.

    If there is a GPU that CUDA cannot use, ``auto`` warns once per process
    (:class:`clipdeploy.core.device.CpuFallback`).  An ``int8-cpu`` graph always runs on the CPU:
    its INT8 is made for the kernels there.

    The CPU computes float16 in float32, which hides overflow and rounding.  On the CPU,
    ``as_stored`` rounds every float16 tensor to float16, see :mod:`exporters.overflow`; graphs
    without float16 do not change.  ``emulates_float16`` is True if float16 is still computed in
    float32, and ``emulation`` is the reason.  It is also True for a graph with bfloat16, because
    the CPU has few kernels that store it.  float8 is exact on the CPU: only casts and
    QuantizeLinear produce it, and they round as its definition requires.  ``passport`` describes a
    graph that contains none.

    Raises:
        EngineError: CUDA was requested and does not work here, or for an ``int8-cpu`` graph.
        GraphError, ArtifactError: the graph cannot be loaded, or it has no passport.
    """

    def __init__(
        self,
        graph: Path,
        provider: Provider = "cpu",
        threads: int = 0,
        *,
        as_stored: bool = False,
        passport: Passport | None = None,
    ) -> None:
        passport = passport or read_passport(graph)
        provider_name = _provider(provider, graph, passport.precision)
        types = stored_types(graph) if provider_name == CPU else set()
        session, self.emulation = _as_stored(graph, threads, types, requested=as_stored)
        self._widen = session is not None and passport.input.dtype == "float16"
        self.emulates_float16 = bool(self.emulation)
        self._session = session or OnnxSession(
            graph,
            provider=provider_name,
            threads=threads,
            exact_int8=passport.precision == "int8-cpu",
            fp8=passport.precision == "fp8",
        )
        device = "CUDA" if provider_name == CUDA else "CPU"
        self.name = f"ONNX Runtime ({device}{', float16 as stored' if session else ''})"
        self.input = passport.input
        batch = passport.input.shape[0]
        self.batches: tuple[int, int | None] = (1, None)
        if isinstance(batch, int):
            self.batches = (batch, batch)

    def __call__(self, images: Images) -> Logits:
        """See :class:`Runner`."""
        inputs = images.astype(np.float32) if self._widen else images
        return in_parts(lambda part: self._session.run(part)[0], inputs, [self.batches])


def _as_stored(
    graph: Path, threads: int, types: Collection[str], *, requested: bool
) -> tuple[OnnxSession | None, str]:
    """Make a session that rounds every float16 tensor, if possible.

    The second result is the reason why float16 is emulated instead, empty if it is not.  A foreign
    graph that cannot be rewritten is emulated.
    """
    if "bf16" in types:
        return None, "bfloat16 is not computed on the CPU as a GPU does"
    if "fp16" not in types:
        return None, ""
    if not requested:
        return None, "float16 as stored was not requested"
    try:
        return stored_session(graph, threads=threads), ""
    except GraphError as error:
        return None, error.message


def _provider(requested: Provider, graph: Path, precision: Precision) -> str:
    """Choose the execution provider of a graph; the only place that does."""
    if precision == "int8-cpu":
        if requested == "cuda":
            raise EngineError(
                f"{graph} has INT8 for ONNX Runtime's CPU kernels and does not run on CUDA",
                hint="leave out --device cuda, or take the graph of another precision",
            )
        return CPU
    if requested == "cpu":
        return CPU
    problem = cuda_problem()
    if requested == "cuda" and problem:
        raise EngineError(
            f"ONNX Runtime cannot use CUDA: {problem}",
            hint="leave out --device cuda, or run clipdeploy doctor, which names what to install",
        )
    if problem and gpus():
        warn_of_cpu("graphs run", f"ONNX Runtime cannot use CUDA: {problem}")
    return CPU if problem else CUDA
