"""A stand-in for TensorRT with one engine: logits are an image's ten first numbers, doubled.

It computes with PyTorch on the stream that it is given, so that everything else of an engine's
runner is real on a GPU: memory, copies, streams, events and CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from clipdeploy.engines.backends import CapturedLog
from clipdeploy.runners import engine as engine_module
from clipdeploy.runners.engine import EngineRunner

__all__ = ["CLASSES", "PROFILES", "doubling_runner", "expected", "images"]

CLASSES = 10
_IMAGE = (3, 8, 8)
PROFILES = ((1, 2, 4), (5, 16, 32))
# Cycles of a GPU's clock, about a millisecond: a runner that does not wait returns before.
_CYCLES = 2_000_000


class _Context:
    """An execution context; ``owner`` is the engine of clipdeploy whose memory it addresses."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._profile = self._batch = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = index
        return index < len(PROFILES)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._batch = shape[0]
        low, _, high = PROFILES[self._profile]
        return tuple(shape[1:]) == _IMAGE and low <= self._batch <= high

    def execute_async_v3(self, stream: int) -> bool:
        owner = self._engine.owner
        taken, given = owner._in, owner._out
        if self._addresses != {"image": taken.data_ptr(), "logits": given.data_ptr()}:
            return False
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            if taken.is_cuda:
                torch.cuda._sleep(_CYCLES)
            numbers = taken[: self._batch].flatten(1)[:, :CLASSES]
            torch.mul(numbers, 2, out=given[: self._batch])
        return True


class _Engine:
    num_io_tensors, num_optimization_profiles = 2, len(PROFILES)
    owner: Any = None

    def get_tensor_name(self, index: int) -> str:
        return ("image", "logits")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name == "image" else "output"

    def get_tensor_dtype(self, name: str) -> str:
        return "float32"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *_IMAGE) if name == "image" else (-1, CLASSES)

    def get_tensor_profile_shape(self, name: str, index: int) -> tuple[tuple[int, ...], ...]:
        return tuple((batch, *_IMAGE) for batch in PROFILES[index])

    def create_execution_context(self) -> _Context:
        return _Context(self)


@contextmanager
def doubling_runner(*, cuda_graph: bool) -> Iterator[EngineRunner]:
    """A runner of the engine."""
    engine = _Engine()
    module = SimpleNamespace(
        __version__="0",
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
        nptype=lambda kind: np.dtype(kind),
    )
    passport = SimpleNamespace(backend="tensorrt", settings={})
    plan = SimpleNamespace(path=Path("x.engine"), passport=passport)
    replaced: dict[str, Any] = {
        "preflight": lambda path, trust: plan,
        "load_engine": lambda plan: (module, engine),
        # The real one needs TensorRT's logger.
        "capture_log": lambda: nullcontext(CapturedLog([], [])),
    }
    with ExitStack() as stack:
        for name, each in replaced.items():
            stack.enter_context(patch.object(engine_module, name, each))
        runner = EngineRunner(plan.path, cuda_graph=cuda_graph)
        engine.owner = runner._loaded
        yield stack.enter_context(runner)


def images(batch: int) -> NDArray[np.float32]:
    """Random images (batch, 3, 8, 8)."""
    return np.random.default_rng(batch).standard_normal((batch, *_IMAGE), np.float32)


def expected(given: NDArray[np.float32]) -> NDArray[np.float32]:
    """The engine's logits (batch, 10)."""
    return 2 * given.reshape(len(given), -1)[:, :CLASSES]
