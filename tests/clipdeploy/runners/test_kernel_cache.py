"""Tests the file of compiled kernels.

Without a GPU no engine can be loaded, so a made-up cache takes the place of TensorRT-RTX's; the
tests of TensorRT's names compare what is called here with the real one.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clipdeploy.core.device import Gpu
from clipdeploy.core.errors import EngineError
from clipdeploy.runners import kernel_cache
from clipdeploy.runners.kernel_cache import (
    KernelCache,
    cache_file,
    read_kernels,
    runtime_config,
    write_kernels,
)

ADA = Gpu("NVIDIA L4", (8, 9))
HERE = b"compiled here: "


class Cache:
    """Takes only kernels that were compiled on this GPU, and compiles more in ``run``."""

    def __init__(self) -> None:
        self.kernels = b""

    def deserialize(self, kernels: bytes) -> bool:
        if not kernels.startswith(HERE):
            return False
        self.kernels = kernels
        return True

    def serialize(self) -> memoryview:
        return memoryview(self.kernels or HERE)

    def run(self, shape: bytes) -> bool:
        """Run a shape, and return whether its kernels had to be compiled."""
        new = shape not in self.kernels
        self.kernels = bytes(self.serialize()) + shape * new
        return new


class Config:
    """A runtime configuration with a cache."""

    def __init__(self, *, takes: bool = True) -> None:
        self.cache = Cache()
        self.used: Cache | None = None
        self._takes = takes

    def create_runtime_cache(self) -> Cache:
        return self.cache

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.used = cache if self._takes else None
        return self._takes


def process(path: Path, *shapes: bytes) -> list[bool]:
    """Run ``shapes`` as a new process would, and return which had to be compiled."""
    config: Any = Config()
    kernels = KernelCache(config, path)
    assert config.used is config.cache
    compiled = [config.cache.run(shape) for shape in shapes]
    kernels.save()
    return compiled


def test_the_next_process_compiles_only_new_shapes(tmp_path: Path) -> None:
    path = tmp_path / "kernels" / "x.cache"
    assert process(path, b"1", b"8") == [True, True]
    assert process(path, b"8", b"32") == [False, True]
    assert process(path, b"1", b"8", b"32") == [False] * 3
    assert [each.name for each in path.parent.iterdir()] == ["x.cache"]


def test_a_file_without_new_kernels_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "x.cache"
    process(path, b"1")
    os.utime(path, ns=(1, 1))
    process(path, b"1")
    assert path.stat().st_mtime_ns == 1
    process(path, b"2")
    assert path.stat().st_mtime_ns > 1


@pytest.mark.parametrize("at", [0, 31, 32, -1])
def test_a_damaged_file_is_ignored_and_replaced(at: int, tmp_path: Path) -> None:
    path = tmp_path / "x.cache"
    process(path, b"1")
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert read_kernels(path) == b""
    assert process(path, b"1") == [True]
    assert process(path, b"1") == [False]


@pytest.mark.parametrize("size", [0, 5, 32, 40])
def test_a_file_that_was_cut_short_is_ignored(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.cache"
    process(path, b"1")
    path.write_bytes(path.read_bytes()[:size])
    assert process(path, b"1") == [True]
    assert process(path, b"1") == [False]


def test_kernels_that_tensorrt_refuses_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.cache"
    write_kernels(path, b"compiled elsewhere: 1")
    assert process(path, b"1") == [True]
    assert read_kernels(path) == HERE + b"1"


@pytest.mark.parametrize("where", ["a folder", "below a file"])
def test_a_cache_that_cannot_be_written_stops_nothing(where: str, tmp_path: Path) -> None:
    path = tmp_path / "x.cache"
    if where == "a folder":
        path.mkdir()
    else:
        (tmp_path / "file").write_bytes(b"")
        path = tmp_path / "file" / "x.cache"
    assert process(path, b"1") == [True]
    assert process(path, b"1") == [True]


def test_a_configuration_that_takes_no_cache_saves_nothing(tmp_path: Path) -> None:
    config: Any = Config(takes=False)
    kernels = KernelCache(config, tmp_path / "x.cache")
    config.cache.run(b"1")
    kernels.save()
    config.create_runtime_cache = lambda: None
    KernelCache(config, tmp_path / "x.cache").save()
    assert list(tmp_path.iterdir()) == []


def test_each_engine_version_and_gpu_has_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPDEPLOY_HOME", str(tmp_path))
    path = cache_file("a" * 64, "1.7.1.116", ADA)
    assert path.parent == tmp_path / "kernels"
    assert path.name == f"tensorrt-rtx-1.7.1.116-sm8.9-NVIDIA-L4-{'a' * 32}.cache"
    others = {
        cache_file("b" * 64, "1.7.1.116", ADA),
        cache_file("a" * 64, "1.6.1.120", ADA),
        cache_file("a" * 64, "1.7.1.116", Gpu("NVIDIA L40S", (8, 9))),
        cache_file("a" * 64, "1.7.1.116", Gpu("NVIDIA L4", (12, 0))),
    }
    assert len(others | {path}) == 5


def test_the_oldest_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "_MOST_FILES", 3)
    (tmp_path / "mine.txt").write_bytes(b"")
    for number in range(5):
        write_kernels(tmp_path / f"{number}.cache", HERE)
        os.utime(tmp_path / f"{number}.cache", (number, number))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "2.cache",
        "3.cache",
        "4.cache",
        "mine.txt",
    ]


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_kernels_are_compiled_before_a_shape_runs(cuda_graph: bool, rtx: Any) -> None:
    config = SimpleNamespace(cuda_graph_strategy=rtx.CudaGraphStrategy.DISABLED)
    engine: Any = SimpleNamespace(create_runtime_config=lambda: config)
    assert runtime_config(rtx, engine, cuda_graph=cuda_graph) is config
    eager = rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    assert config.dynamic_shapes_kernel_specialization_strategy == eager
    graphs = rtx.CudaGraphStrategy
    wanted = graphs.WHOLE_GRAPH_CAPTURE if cuda_graph else graphs.DISABLED
    assert config.cuda_graph_strategy == wanted


def test_a_cuda_graph_that_tensorrt_refuses_is_an_error(rtx: Any) -> None:
    class Refusing(SimpleNamespace):
        @property
        def cuda_graph_strategy(self) -> Any:
            return rtx.CudaGraphStrategy.DISABLED

        @cuda_graph_strategy.setter
        def cuda_graph_strategy(self, value: Any) -> None: ...

    engine: Any = SimpleNamespace(create_runtime_config=Refusing)
    with pytest.raises(EngineError, match="cannot record this engine as a CUDA graph"):
        runtime_config(rtx, engine, cuda_graph=True)
    assert runtime_config(rtx, engine, cuda_graph=False)


def test_no_runtime_configuration_is_an_error(rtx: Any) -> None:
    engine: Any = SimpleNamespace(create_runtime_config=lambda: None)
    with pytest.raises(EngineError, match="cannot create a runtime configuration"):
        runtime_config(rtx, engine, cuda_graph=False)
