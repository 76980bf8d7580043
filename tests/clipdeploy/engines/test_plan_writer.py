"""Tests writing real plans; methods are hidden from a real builder to imitate older versions."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from compiling import SPEC, compiled_plan, ignore

from clipdeploy.engines import compiler as compiler_module
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.compiler import Compiler
from clipdeploy.engines.plan_writer import Piece, PlanFile, StreamingBuilder, plan_writer
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace


@pytest.fixture
def graph(demo_workspace: Workspace) -> Path:
    return demo_workspace.graph(cards.DEMO, "fp16")


class OldBuilder:
    """A builder without stream support, like older TensorRT versions."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def __getattr__(self, name: str) -> Any:
        if name == "build_serialized_network_to_stream":
            raise AttributeError(name)
        return getattr(self._builder, name)


@pytest.fixture
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    def streaming(module: Any, builder: Any, *rest: Any) -> StreamingBuilder:
        return StreamingBuilder(module, OldBuilder(builder), *rest)

    monkeypatch.setattr(compiler_module, "StreamingBuilder", streaming)


@pytest.mark.parametrize("pieces", [[], [b"plan"], [b"a", memoryview(b"plan"), b""]])
def test_a_file_its_size_and_its_hash(pieces: list[Piece], tmp_path: Path) -> None:
    path = tmp_path / "engine"
    path.touch()
    with path.open("r+b") as stream, ThreadPoolExecutor(2) as beside:
        plan = PlanFile(stream, beside)
        for piece in pieces:
            plan.write(piece)
    data = b"".join(pieces)
    assert path.read_bytes() == data
    assert plan.bytes == len(data)
    assert plan.sha256() == hashlib.sha256(data).hexdigest()


def test_a_streamed_plan_equals_a_plan_in_one_piece(
    compiler: Compiler, graph: Path, request: pytest.FixtureRequest
) -> None:
    kinds: list[type] = []
    compiler.compile(graph, SPEC, BuildConfig(), None, lambda piece: kinds.append(type(piece)))
    streamed = compiled_plan(compiler, graph)
    request.getfixturevalue("no_streams")
    compiler.compile(graph, SPEC, BuildConfig(), None, lambda piece: kinds.append(type(piece)))
    # The demo's plan is one piece in both cases: a copy, or a view of TensorRT's memory.
    assert kinds == [bytes, memoryview]
    assert compiled_plan(compiler, graph) == streamed


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()]
)
def test_an_error_while_writing_ends_the_build_and_is_raised(
    error: BaseException,
    streams: bool,
    compiler: Compiler,
    graph: Path,
    request: pytest.FixtureRequest,
) -> None:
    if not streams:
        request.getfixturevalue("no_streams")
    seen: list[Piece] = []

    def fail(piece: Piece) -> None:
        seen.append(piece)
        raise error

    with pytest.raises(type(error)) as caught:
        compiler.compile(graph, SPEC, BuildConfig(), None, fail)
    assert caught.value is error
    assert len(seen) == 1


def test_no_plan_is_none_without_streams_as_well(compiler: Compiler) -> None:
    class Refuses(OldBuilder):
        def build_serialized_network(self, network: Any, config: Any) -> None:
            return None

    builder = StreamingBuilder(compiler.module, Refuses(None), ignore, [])  # type: ignore[arg-type]
    assert builder.build_serialized_network(None, None) is False


def test_an_exception_never_leaves_the_writer(compiler: Compiler) -> None:
    stop: list[BaseException] = []

    def fail(piece: Piece) -> None:
        raise OSError("the disk is gone")

    writer = plan_writer(compiler.module, fail, stop)
    assert writer.write(b"plan") == 0  # type: ignore[call-arg, arg-type]
    assert isinstance(stop[0], OSError)


def test_nothing_more_is_written_once_the_monitor_has_stopped_the_build(
    compiler: Compiler,
) -> None:
    stop: list[BaseException] = []
    written: list[Piece] = []
    writer = plan_writer(compiler.module, written.append, stop)
    assert writer.write(b"plan") == 4  # type: ignore[call-arg, arg-type]
    stop.append(KeyboardInterrupt())
    assert writer.write(b"more") == 0  # type: ignore[call-arg, arg-type]
    assert written == [b"plan"]
