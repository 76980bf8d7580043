"""Writes and hashes a plan piece by piece, while TensorRT serialises it.

TensorRT-RTX and TensorRT 10.13 stream the plan in pieces of up to 64 MiB, so that memory never
holds all of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Piece", "PlanFile", "StreamingBuilder", "plan_writer"]

# uint8 (bytes,).  A plan in one piece is a view of TensorRT's memory, not a copy.
Piece = bytes | memoryview
T = TypeVar("T")


class PlanFile:
    """Writes a plan into the file ``stream`` and computes its size and SHA-256.

    ``pool`` hashes each piece while it is written, and syncs it to the disk afterwards.

    Raises:
        OSError: no space, or another error of the file system.
    """

    def __init__(self, stream: BinaryIO, pool: ThreadPoolExecutor) -> None:
        self._stream = stream
        self._pool = pool
        self._synced: list[Future[None]] = []
        self._digest = hashlib.sha256()
        self.bytes = 0

    def write(self, piece: Piece) -> None:
        """Append ``piece``."""
        hashed = self._pool.submit(self._digest.update, piece)
        self._stream.write(piece)
        self._stream.flush()
        self.bytes += len(piece)
        hashed.result()
        # Otherwise the whole plan would have to be synced at the end.
        self._synced.append(self._pool.submit(os.fsync, self._stream.fileno()))

    def read(self, reader: Callable[[BinaryIO], T]) -> T:
        """What ``reader`` finds in the whole plan; it is given the open file."""
        return reader(self._stream)

    def sha256(self) -> str:
        """Wait until everything is on the disk, and return its SHA-256 in hex."""
        for each in self._synced:
            each.result()
        return self._digest.hexdigest()


def plan_writer(
    module: ModuleType, write: Callable[[Piece], object], stop: list[BaseException]
) -> trt.IStreamWriter:
    """Make a TensorRT stream writer that passes each piece to ``write``.

    TensorRT calls the writer from C++ code, where no exception may pass.  An exception is appended
    to ``stop`` and ends the build; the caller raises it.
    """
    base: type[trt.IStreamWriter] = module.IStreamWriter

    class Writer(base):  # type: ignore[misc] # the base class depends on the backend
        def __init__(self) -> None:
            base.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                if not stop:
                    write(data)
            except BaseException as error:  # Ctrl-C too, see the docstring
                stop.append(error)
            return 0 if stop else len(data)

    return Writer()


class StreamingBuilder:
    """A TensorRT builder whose ``build_serialized_network`` passes the plan to ``write``.

    Polygraphy calls that method, and saves the timing cache afterwards.
    """

    def __init__(
        self,
        module: ModuleType,
        builder: trt.Builder,
        write: Callable[[Piece], object],
        stop: list[BaseException],
    ) -> None:
        self._module = module
        self._builder = builder
        self._write = write
        self._stop = stop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)

    def build_serialized_network(self, network: Any, config: Any) -> bool:
        """Build and write the plan; False if TensorRT could not build it."""
        builder: trt.Builder = self._builder
        if hasattr(builder, "build_serialized_network_to_stream"):
            writer = plan_writer(self._module, self._write, self._stop)
            return bool(builder.build_serialized_network_to_stream(network, config, writer))
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            return False
        # Not bytes(), which would copy the plan.
        self._write(memoryview(plan))
        return True
