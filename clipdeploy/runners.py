"""One small interface to whatever computes logits: PyTorch, ONNX Runtime, TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from clipdeploy.builder import Backend, tensorrt_module
from clipdeploy.device import gpus
from clipdeploy.passport import load_engine_passport
from exporters.errors import EngineError
from exporters.graphs import read_passport
from exporters.session import OnnxSession

__all__ = ["EngineRunner", "OnnxRunner", "Runner", "TorchRunner"]

Images = NDArray[Any]
Logits = NDArray[np.float32]


class Runner(Protocol):
    """Images as the artifact's passport says -> logits (B, classes) float32; any B."""

    name: str

    def __call__(self, images: Images) -> Logits:
        """The logits of one batch."""

    def close(self) -> None:
        """Give back what it holds."""


class _Closing:
    def close(self) -> None:
        """Nothing to give back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _in_parts(
    run: Callable[[Images], Logits], images: Images, largest: int, *, fixed: bool
) -> Logits:
    """Run at most ``largest`` images at once; with ``fixed`` exactly so many, the last part filled
    up with its own first image, whose logits are dropped."""
    parts = []
    for at in range(0, len(images), largest):
        part = images[at : at + largest]
        missing = largest - len(part) if fixed else 0
        filled = np.concatenate([part, np.repeat(part[:1], missing, axis=0)]) if missing else part
        parts.append(run(np.ascontiguousarray(filled))[: len(part)].astype(np.float32))
    return np.concatenate(parts)


class TorchRunner(_Closing):
    """The reference module on the CPU."""

    name = "PyTorch"

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, images: Images) -> Logits:
        """See :class:`Runner`."""
        with torch.inference_mode():
            return cast(Logits, self._module(torch.from_numpy(images)).numpy())


class OnnxRunner(_Closing):
    """A graph on ONNX Runtime's CPU provider."""

    name = "ONNX Runtime (CPU)"

    def __init__(self, graph: Path) -> None:
        self._session = OnnxSession(graph)
        batch = read_passport(graph).input.shape[0]
        self._batch = batch if isinstance(batch, int) else None

    def __call__(self, images: Images) -> Logits:
        """See :class:`Runner`; a graph of a fixed batch runs as many parts as it takes."""
        size = self._batch or len(images)
        return _in_parts(
            lambda part: self._session.run(part)[0], images, size, fixed=self._batch is not None
        )


class EngineRunner(_Closing):
    """A TensorRT engine on the first GPU.

    Raises:
        EngineError: there is no GPU, or TensorRT refuses the engine here.
        ArtifactError: the engine's passport is missing or does not fit its bytes.
    """

    def __init__(self, engine: Path) -> None:
        passport = load_engine_passport(engine)
        if not gpus():
            raise EngineError("no GPU on this machine", hint="run it where the engine will serve")
        self.name = f"{passport.backend} {passport.backend_version}"
        tensorrt_module(cast(Backend, passport.backend))
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner
        from polygraphy.exception import PolygraphyException

        self._smallest, _, self._largest = passport.profile
        self._runner = TrtRunner(EngineFromBytes(BytesFromPath(str(engine))))
        try:
            self._runner.activate()
        except PolygraphyException as error:
            raise EngineError(
                f"{self.name} cannot load {engine}: {str(error).splitlines()[0]}",
                hint="an engine is bound to its GPU and TensorRT version: build it again here",
            ) from error

    def __call__(self, images: Images) -> Logits:
        """See :class:`Runner`; a batch beyond the profile's largest runs in parts."""

        def infer(part: Images) -> Logits:
            return cast(Logits, self._runner.infer({"image": part})["logits"].copy())

        return _in_parts(infer, images, self._largest, fixed=self._smallest == self._largest)

    def close(self) -> None:
        """Free the engine's memory."""
        self._runner.deactivate()
