"""A graph on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from clipdeploy.device import gpus
from clipdeploy.runners.base import Closing, Images, Logits, in_parts
from exporters.errors import EngineError
from exporters.headers import read_passport
from exporters.session import CPU, CUDA, OnnxSession, available_providers

__all__ = ["OnnxRunner", "Provider"]

Provider = Literal["auto", "cpu", "cuda"]


class OnnxRunner(Closing):
    """A graph on ONNX Runtime; ``auto`` takes CUDA where it is there, else the CPU.

    Raises:
        EngineError: CUDA was asked for and is not to be had.
        GraphError, ArtifactError: the graph cannot be loaded, or nothing vouches for it.
    """

    def __init__(self, graph: Path, provider: Provider = "cpu", threads: int = 0) -> None:
        passport = read_passport(graph)
        name = _provider(provider)
        self._session = OnnxSession(
            graph,
            providers=(name,),
            threads=threads,
            exact_int8=passport.precision == "int8-cpu",
        )
        self.name = f"ONNX Runtime ({'CUDA' if name == CUDA else 'CPU'})"
        self.input = passport.input
        batch = passport.input.shape[0]
        self.batches: tuple[int, int | None] = (1, None)
        if isinstance(batch, int):
            self.batches = (batch, batch)

    def __call__(self, images: Images) -> Logits:
        """See :class:`Runner`."""
        return in_parts(lambda part: self._session.run(part)[0], images, self.batches)


def _provider(wanted: Provider) -> str:
    there = bool(gpus()) and CUDA in available_providers()
    if wanted == "cuda" and not there:
        raise EngineError(
            "ONNX Runtime has no CUDA here: "
            + ("there is no GPU" if not gpus() else "onnxruntime without -gpu is installed"),
            hint="leave out --provider cuda, or install onnxruntime-gpu on a machine with a GPU",
        )
    return CUDA if there and wanted != "cpu" else CPU
