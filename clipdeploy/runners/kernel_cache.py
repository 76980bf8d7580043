"""Configures how TensorRT-RTX compiles an engine's kernels, and keeps the kernels in a file.

A plan of TensorRT-RTX contains no finished kernels: they are compiled when the engine runs, by
default in the background while slower fallback kernels run, and again in every process (NVIDIA
TensorRT-RTX, "Working with Dynamic Shapes", "Working with Runtime Cache").  Here a shape's kernels
are compiled before it first runs, so that neither a measurement nor a CUDA graph contains fallback
kernels, and the next process loads them from the cache folder.

A cache file is the SHA-256 (32 bytes) of the rest, and then the bytes of ``IRuntimeCache``.
TensorRT-RTX compares those with the GPU, the driver and its own version before it uses them.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from clipdeploy.core.cache import cache_folder
from clipdeploy.core.device import Gpu
from clipdeploy.core.errors import EngineError, FileError
from clipdeploy.core.files import read_regular, write_atomic
from clipdeploy.engines.backends import machine_name

if TYPE_CHECKING:
    import tensorrt_rtx as trt

__all__ = ["KernelCache", "cache_file", "read_kernels", "runtime_config", "write_kernels"]

_DIGEST_BYTES = hashlib.sha256().digest_size
# An engine that was built again leaves a file that is never read.
_MOST_FILES = 32


def cache_file(plan_sha256: str, version: str, gpu: Gpu) -> Path:
    """The file for the kernels of one plan, on ``gpu``, with this version of TensorRT-RTX."""
    name = f"{machine_name('tensorrt-rtx', version, gpu)}-{plan_sha256[:32]}.cache"
    return cache_folder() / "kernels" / name


def read_kernels(path: Path) -> bytes:
    """The kernels in a cache file; empty if there is none, or if it is damaged or unreadable."""
    with suppress(FileError):
        data = read_regular(path)
        digest, kernels = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(kernels).digest() == digest:
            return kernels
    return b""


def write_kernels(path: Path, kernels: bytes) -> None:
    """Write ``kernels`` to ``path``, and remove the oldest files of the folder if it has many.

    Raises:
        FileError: the cache folder cannot be written.
    """
    write_atomic(path, hashlib.sha256(kernels).digest() + kernels)
    with suppress(OSError):  # another process may remove the same file
        files = sorted(path.parent.glob("*.cache"), key=lambda file: file.stat().st_mtime_ns)
        for old in files[:-_MOST_FILES]:
            old.unlink()


def runtime_config(
    module: ModuleType, engine: trt.ICudaEngine, *, cuda_graph: bool
) -> trt.IRuntimeConfig:
    """Make a configuration that compiles all kernels of a shape before the shape first runs.

    ``cuda_graph`` lets TensorRT-RTX record each shape as a CUDA graph in its second run, and replay
    it from the third run on.  If it cannot record an engine, it runs the kernels one by one and
    only says so in its verbose messages.

    Raises:
        EngineError: TensorRT-RTX has no memory for it, or refuses CUDA graphs.
    """
    config: trt.IRuntimeConfig | None = engine.create_runtime_config()
    if config is None:
        raise EngineError(
            "TensorRT-RTX cannot create a runtime configuration",
            hint="free memory, or update the NVIDIA driver",
        )
    specialization = module.DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
    if cuda_graph:
        graphs = module.CudaGraphStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE
        # The C++ setter returns whether it succeeded; Python's binding drops that.
        if config.cuda_graph_strategy != graphs.WHOLE_GRAPH_CAPTURE:
            raise EngineError(
                "TensorRT-RTX cannot record this engine as a CUDA graph",
                hint="run it without a CUDA graph",
            )
    return config


class KernelCache:
    """The compiled kernels of an engine, loaded from ``path`` into the engine's configuration.

    A file that is missing or damaged, or that TensorRT-RTX does not accept, counts as empty.
    """

    def __init__(self, config: trt.IRuntimeConfig, path: Path) -> None:
        self._path = path
        self._cache: trt.IRuntimeCache | None = config.create_runtime_cache()
        self._stored = b""
        if self._cache is None:
            return
        kernels = read_kernels(path)
        if kernels and self._cache.deserialize(kernels):
            self._stored = kernels
        if not config.set_runtime_cache(self._cache):
            self._cache = None

    def save(self) -> None:
        """Write the kernels if there are new ones.

        Does nothing if the folder cannot be written: the next process then compiles them again.
        """
        memory = self._cache.serialize() if self._cache is not None else None
        if memory is None:
            return
        kernels = bytes(memory)
        if kernels != self._stored:
            with suppress(FileError):
                write_kernels(self._path, kernels)
            self._stored = kernels
