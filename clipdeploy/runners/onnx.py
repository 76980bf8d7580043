"""A graph on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import numpy as np

from clipdeploy.core.device import gpus
from clipdeploy.core.errors import EngineError, GraphError
from clipdeploy.core.passport import Passport
from clipdeploy.runners.base import Closing, Images, Logits, in_parts
from exporters.headers import read_passport
from exporters.overflow import stored_session
from exporters.session import CPU, CUDA, OnnxSession, available_providers
from exporters.signature import stored_types

__all__ = ["OnnxRunner", "Provider"]

Provider = Literal["auto", "cpu", "cuda"]


class OnnxRunner(Closing):
    """A graph on ONNX Runtime; ``auto`` takes CUDA where it is there, else the CPU.

    The CPU computes float16 in float32, which hides overflow and rounding.  ``as_stored`` runs a
    graph with float16 tensors there so that each of them really passes through float16, see
    :mod:`exporters.overflow`; it makes no difference to other graphs.  ``emulates_float16`` is True
    where float16 is computed in float32 all the same, and ``emulation`` says why; a graph with
    bfloat16 counts among them, because the CPU has few kernels that store it.  float8 is exact on
    the CPU: only casts and QuantizeLinear make it, and they round as its definition says.
    ``passport`` describes a graph that has none inside.

    Raises:
        EngineError: CUDA was asked for and is not to be had.
        GraphError, ArtifactError: the graph cannot be loaded, or nothing describes it.
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
        provider_name = _provider(provider)
        kinds = stored_types(graph) if provider_name == CPU else set()
        session, self.emulation = _as_stored(graph, threads, kinds, wanted=as_stored)
        self._widen = session is not None and passport.input.dtype == "float16"
        self.emulates_float16 = bool(self.emulation)
        self._session = session or OnnxSession(
            graph,
            providers=(provider_name,),
            threads=threads,
            exact_int8=passport.precision == "int8-cpu",
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
        taken = images.astype(np.float32) if self._widen else images
        return in_parts(lambda part: self._session.run(part)[0], taken, self.batches)


def _as_stored(
    graph: Path, threads: int, kinds: Collection[str], *, wanted: bool
) -> tuple[OnnxSession | None, str]:
    """A session that stores float16, if there is any and it can; why float16 is emulated, if so.

    A foreign graph that cannot be rewritten runs all the same, and says so.
    """
    if "bf16" in kinds:
        return None, "bfloat16 is not computed on the CPU as a GPU does"
    if "fp16" not in kinds:
        return None, ""
    if not wanted:
        return None, "float16 as stored was not asked for"
    try:
        return stored_session(graph, threads=threads), ""
    except GraphError as error:
        return None, error.message


def _provider(wanted: Provider) -> str:
    there = bool(gpus()) and CUDA in available_providers()
    if wanted == "cuda" and not there:
        raise EngineError(
            "ONNX Runtime has no CUDA here: "
            + ("there is no GPU" if not gpus() else "onnxruntime without -gpu is installed"),
            hint="leave out --device cuda, or install onnxruntime-gpu on a machine with a GPU",
        )
    return CUDA if there and wanted != "cpu" else CPU
