"""A graph on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from clipdeploy.device import gpus
from clipdeploy.runners.base import Closing, Images, Logits, in_parts
from exporters.artifact import Passport
from exporters.errors import EngineError, GraphError
from exporters.headers import read_passport
from exporters.overflow import stored_session
from exporters.session import CPU, CUDA, OnnxSession, available_providers
from exporters.signature import stores_float16

__all__ = ["OnnxRunner", "Provider"]

Provider = Literal["auto", "cpu", "cuda"]


class OnnxRunner(Closing):
    """A graph on ONNX Runtime; ``auto`` takes CUDA where it is there, else the CPU.

    The CPU computes float16 in float32, which hides overflow and rounding.  ``as_stored`` runs a
    graph with float16 tensors there so that each of them really passes through float16, see
    :mod:`exporters.overflow`; it makes no difference to other graphs.  ``emulates_float16`` is True
    where float16 is computed in float32 all the same.  ``passport`` describes a graph that has
    none inside.

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
        halves = provider_name == CPU and stores_float16(graph)
        session = _stored(graph, threads) if as_stored and halves else None
        self._widen = session is not None and passport.input.dtype == "float16"
        self.emulates_float16 = halves and session is None
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


def _stored(graph: Path, threads: int) -> OnnxSession | None:
    """None for a foreign graph that cannot be rewritten: it is then emulated, and says so."""
    try:
        return stored_session(graph, threads=threads)
    except GraphError:
        return None


def _provider(wanted: Provider) -> str:
    there = bool(gpus()) and CUDA in available_providers()
    if wanted == "cuda" and not there:
        raise EngineError(
            "ONNX Runtime has no CUDA here: "
            + ("there is no GPU" if not gpus() else "onnxruntime without -gpu is installed"),
            hint="leave out --provider cuda, or install onnxruntime-gpu on a machine with a GPU",
        )
    return CUDA if there and wanted != "cpu" else CPU
