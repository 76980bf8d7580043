"""Tests what the engine's runner says where TensorRT gives up: no GPU, no memory, no launch.

docs/gpu.md lists what has been run on a GPU.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compiling import compiled_plan
from tensorrt_bindings import NEWEST, OLDEST, bindings

from clipdeploy.core.device import gpus
from clipdeploy.core.errors import EngineError
from clipdeploy.engines.backends import Backend, tensorrt_module
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.compiler import Compiler
from clipdeploy.engines.preflight import Plan
from clipdeploy.models import cards
from clipdeploy.runners import engine as engine_module
from clipdeploy.runners.engine import Engine, EngineRunner, enqueue, load_engine, new_context
from clipdeploy.workspace.folder import Workspace

_LOAD = """
import sys
from pathlib import Path

from clipdeploy.core.errors import EngineError
from clipdeploy.engines.preflight import Plan
from clipdeploy.runners import engine

engine._backend = lambda plan: "tensorrt"
try:
    engine.load_engine(Plan(Path("x.engine"), b"plan", "0" * 64, None))
except EngineError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def plan(demo_workspace: Workspace) -> Plan:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    compiler = Compiler("tensorrt-rtx", tensorrt_module("tensorrt-rtx"))
    one_gpu = BuildConfig(compute_capability=("8.9",))
    data = compiled_plan(compiler, demo_workspace.graph(cards.DEMO, "fp16"), one_gpu)
    return Plan(Path("demo.engine"), data, hashlib.sha256(data).hexdigest(), None)


@pytest.mark.skipif(bool(gpus()), reason="tests a machine without a GPU")
def test_tensorrt_s_reason_for_not_loading_a_plan_is_one_line(plan: Plan) -> None:
    with pytest.raises(EngineError, match=r"TensorRT cannot load demo\.engine: ") as caught:
        load_engine(plan)
    assert "\n" not in str(caught.value)
    assert "no reason given" not in str(caught.value)


@pytest.mark.parametrize("requirement", [OLDEST, NEWEST])
def test_a_tensorrt_that_cannot_start_is_one_line(
    requirement: str, pytestconfig: pytest.Config
) -> None:
    """As with a driver that is too old: TensorRT creates no runtime."""
    made = bindings(requirement, pytestconfig.cache.mkdir("tensorrt-bindings"))
    done = made.python("-c", _LOAD)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"tensorrt {made.version} cannot start: no reason given "
        "(the driver may be too old, or GPU memory full: see clipdeploy doctor)\n"
    )


@pytest.mark.usefixtures("plan")
def test_no_memory_for_a_context_is_one_line() -> None:
    full: Any = SimpleNamespace(create_execution_context=lambda config=None: None)
    for config in (None, "a configuration"):
        with pytest.raises(EngineError, match=r"execution context.*smaller --max-batch"):
            new_context(full, config)
    room: Any = SimpleNamespace(create_execution_context=lambda config=None: ("context", config))
    assert new_context(room) == ("context", None)
    assert new_context(room, "a configuration") == ("context", "a configuration")


class Context:
    """An execution context whose launches fail from number ``works`` on."""

    def __init__(self, works: int) -> None:
        self.works = works
        self.launches = 0

    def execute_async_v3(self, stream: int) -> bool:
        self.launches += 1
        return self.launches <= self.works


def test_a_failed_launch_is_an_error() -> None:
    context: Any = Context(works=1)
    enqueue(context, 0)
    with pytest.raises(EngineError, match="failed to run"):
        enqueue(context, 0)


def recorder(monkeypatch: pytest.MonkeyPatch, *, capture_ends: bool) -> Engine:
    """An engine without TensorRT, on CUDA graphs that record nothing."""

    @contextmanager
    def graph(graph: object, stream: object) -> Any:
        try:
            yield
        finally:
            if not capture_ends:
                raise RuntimeError("CUDA error: the capture was invalidated\nmore lines")

    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    engine = object.__new__(Engine)
    engine._stream = stream
    return engine


@pytest.mark.parametrize(
    ("capture_ends", "reason"),
    [(True, "TensorRT failed to run the engine"), (False, "CUDA error: the capture was invali")],
)
def test_a_launch_that_fails_while_it_is_recorded_is_an_error(
    capture_ends: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaying such a graph would leave the last batch's logits in place."""
    engine = recorder(monkeypatch, capture_ends=capture_ends)
    with pytest.raises(EngineError, match=f"recorded as a CUDA graph: {reason}") as caught:
        engine._record(Context(works=1))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_launch_that_is_recorded_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = recorder(monkeypatch, capture_ends=True)
    context: Any = Context(works=2)
    assert engine._record(context) is not None
    assert context.launches == 2


@pytest.mark.parametrize(
    "refused", ["set_optimization_profile_async", "set_tensor_address", "nothing"]
)
def test_a_context_that_refuses_its_memory_is_an_error(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("set_optimization_profile_async", "set_tensor_address")
    context = SimpleNamespace(**{name: lambda *given, name=name: name != refused for name in names})
    monkeypatch.setattr(engine_module, "new_context", lambda engine, config: context)
    engine: Any = object.__new__(Engine)
    engine._engine = engine._config = None
    engine._stream = SimpleNamespace(cuda_stream=0)
    engine.input = engine.output = SimpleNamespace(name="image")
    engine._in = engine._out = torch.zeros(1)
    if refused == "nothing":
        assert engine._context(0) is context
    else:
        with pytest.raises(EngineError, match="TensorRT refuses batch profile 0"):
            engine._context(0)


@pytest.mark.gpu
def test_a_second_process_loads_the_kernels(
    gpu_backend: Backend, demo_workspace: Workspace, tmp_path: Path
) -> None:
    if gpu_backend != "tensorrt-rtx":
        pytest.skip("TensorRT compiles kernels when it builds")
    compiler = Compiler(gpu_backend, tensorrt_module(gpu_backend))
    config = BuildConfig(compute_capability=(gpus()[0].capability,))
    path = tmp_path / "demo.engine"
    path.write_bytes(compiled_plan(compiler, demo_workspace.graph(cards.DEMO, "fp16"), config))
    images = np.zeros((8, 3, 32, 32), np.float32)
    logits = []
    for cuda_graph in (False, True):
        with EngineRunner(path, trust=True, cuda_graph=cuda_graph) as runner:
            logits += [runner(images) for _ in range(3)]
    assert len(list((tmp_path / "home" / "kernels").iterdir())) == 1
    for each in logits[1:]:
        np.testing.assert_array_equal(each, logits[0])
