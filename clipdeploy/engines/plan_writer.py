"""A plan on its way into its file: in the pieces in which TensorRT serialises it, and hashed.

Where a flavour can (TensorRT-RTX, TensorRT 10.13), it hands the plan over while it serialises, in
pieces of up to 64 MiB, and nobody holds the plan whole.
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

# uint8 (bytes,); of a plan in one piece it is TensorRT's memory, which nobody copies.
Piece = bytes | memoryview
T = TypeVar("T")


class PlanFile:
    """What is written into ``stream``, a file; its size and SHA-256.

    ``beside`` hashes a piece while it is written, and sees it to the disk afterwards.

    Raises:
        OSError: no space, or another reason of the file system's.
    """

    def __init__(self, stream: BinaryIO, beside: ThreadPoolExecutor) -> None:
        self._stream = stream
        self._beside = beside
        self._synced: list[Future[None]] = []
        self._digest = hashlib.sha256()
        self.bytes = 0

    def write(self, piece: Piece) -> None:
        """Append ``piece``."""
        hashed = self._beside.submit(self._digest.update, piece)
        self._stream.write(piece)
        self._stream.flush()
        self.bytes += len(piece)
        hashed.result()
        # Else the whole plan would wait for the disk at the end.
        self._synced.append(self._beside.submit(os.fsync, self._stream.fileno()))

    def read(self, reader: Callable[[BinaryIO], T]) -> T:
        """What ``reader`` finds in the whole plan; it is given the open file."""
        return reader(self._stream)

    def sha256(self) -> str:
        """The hex SHA-256 of all that was written, once that is on the disk."""
        for each in self._synced:
            each.result()
        return self._digest.hexdigest()


def plan_writer(
    module: ModuleType, write: Callable[[Piece], object], stop: list[BaseException]
) -> trt.IStreamWriter:
    """A writer that hands each piece to ``write``.

    TensorRT calls it from C++ code, which no exception must reach: it is put into ``stop`` and the
    build ended, for the caller to raise.
    """
    base: type[trt.IStreamWriter] = module.IStreamWriter

    class Writer(base):  # type: ignore[misc] # the class is that of the flavour
        def __init__(self) -> None:
            base.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                if not stop:
                    write(data)
            except BaseException as error:  # Ctrl-C too: see the docstring
                stop.append(error)
            return 0 if stop else len(data)

    return Writer()


class StreamingBuilder:
    """A builder whose ``build_serialized_network`` gives the plan to ``write``.

    Polygraphy calls that method, and keeps the timing cache after it.
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
        """Whether there is a plan, all of it written."""
        builder: trt.Builder = self._builder
        if hasattr(builder, "build_serialized_network_to_stream"):
            writer = plan_writer(self._module, self._write, self._stop)
            return bool(builder.build_serialized_network_to_stream(network, config, writer))
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            return False
        # Not bytes(): that would hold the plan twice.
        self._write(memoryview(plan))
        return True
