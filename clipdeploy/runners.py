"""One small interface to whatever computes logits: PyTorch, ONNX Runtime, TensorRT."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from clipdeploy.builder import Backend, tensorrt_module
from clipdeploy.device import gpus
from clipdeploy.passport import load_engine_passport
from exporters.errors import EngineError
from exporters.session import OnnxSession

__all__ = ["EngineRunner", "OnnxRunner", "Runner", "TorchRunner"]

Images = NDArray[np.float32]
Logits = NDArray[np.float32]


class Runner(Protocol):
    """Normalised images (B, 3, S, S) float32 -> logits (B, classes) float32; any B."""

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

    def __call__(self, images: Images) -> Logits:
        """See :class:`Runner`."""
        return self._session.run(images)[0]


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

        self._largest = passport.profile[2]
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
        parts = [
            self._runner.infer({"image": np.ascontiguousarray(images[at : at + self._largest])})[
                "logits"
            ].copy()
            for at in range(0, len(images), self._largest)
        ]
        return np.concatenate(parts)

    def close(self) -> None:
        """Free the engine's memory."""
        self._runner.deactivate()
