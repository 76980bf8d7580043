"""A stand-in for ``torch.cuda``, which rehearses code for a GPU on the CPU.

A stream is a queue: what is launched on it, and copies to or from memory of the GPU that need not
wait, run only when somebody waits for the stream or an event.  Code that reads a result too early
finds what was there before.  A CUDA graph records launches without running them.  Only what
:mod:`clipdeploy.runners.engine` and ``scripts/bench/gemm.py`` call is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = ["cuda_stand_in"]

Work = Callable[[], object]


class _Machine:
    """The streams, the storages of GPU memory by address, and the graph that is recorded."""

    def __init__(self) -> None:
        self.streams: dict[int, _Stream] = {}
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.current = _Stream(self)
        self.recorded: list[Work] | None = None

    def launch(self, work: Work) -> None:
        """Record ``work``, or queue it on the current stream."""
        queue = self.current.queue if self.recorded is None else self.recorded
        queue.append(work)

    def wait(self) -> None:
        """Run everything that was launched."""
        for stream in self.streams.values():
            stream.synchronize()

    def is_own(self, tensor: Any) -> bool:
        """Whether a tensor is in GPU memory."""
        return (
            isinstance(tensor, torch.Tensor)
            and tensor.untyped_storage().data_ptr() in self.storages
        )

    @contextmanager
    def stream(self, chosen: _Stream) -> Iterator[None]:
        """Make a stream the current one."""
        before, self.current = self.current, chosen
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: _Graph, stream: _Stream | None = None) -> Iterator[None]:
        """Record what is launched."""
        with self.stream(stream or self.current):
            self.recorded = []
            try:
                yield
            finally:
                graph.works, self.recorded = self.recorded, None


class _Stream:
    def __init__(self, machine: _Machine) -> None:
        self.queue: list[Work] = []
        self.cuda_stream = 1 + len(machine.streams)
        machine.streams[self.cuda_stream] = self

    def synchronize(self) -> None:
        """Run the queue."""
        works, self.queue = self.queue, []
        with _disable_current_modes():
            for work in works:
                work()


class _Graph:
    def __init__(self, machine: _Machine) -> None:
        self.works: list[Work] = []
        self._machine = machine

    def replay(self) -> None:
        """Launch what was recorded."""
        for work in self.works:
            self._machine.launch(work)


class _Event:
    def __init__(self, machine: _Machine) -> None:
        self._machine, self._at = machine, 0.0

    def record(self, stream: _Stream | None = None) -> None:
        """Take the time when the stream comes here."""
        (stream or self._machine.current).queue.append(self._take)

    def _take(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """Wait for the event."""
        self._machine.wait()

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds to another event."""
        return 1e3 * (end._at - self._at)


class _Deferring(TorchDispatchMode):
    """Launches on the current stream what reads or writes GPU memory."""

    def __init__(self, machine: _Machine) -> None:
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default and any(map(self._machine.is_own, args[:2])):
            self._machine.launch(lambda: func(*args, **kwargs))
            may_return = kwargs.get("non_blocking") or args[2:] == (True,)
            if not may_return:
                self._machine.wait()
            return args[0]
        if self._machine.is_own(kwargs.get("out")):
            self._machine.launch(lambda: func(*args, **kwargs))
            return kwargs["out"]
        return func(*args, **kwargs)


@contextmanager
def cuda_stand_in() -> Iterator[None]:
    """Replace ``torch.cuda``, and memory of the GPU, within the block."""
    machine, empty = _Machine(), torch.empty

    def allocate(*shape: Any, device: str = "cpu", pin_memory: bool = False, **more: Any) -> Any:
        made = empty(*shape, **more)
        if device == "cuda":
            storage = made.untyped_storage()
            # It stays alive, else its address would be given to memory of the CPU.
            machine.storages[storage.data_ptr()] = storage
        return made

    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_name": lambda *device: "stand-in",
        "Stream": lambda: _Stream(machine),
        "ExternalStream": lambda handle: machine.streams[handle],
        "current_stream": lambda: machine.current,
        "stream": machine.stream,
        "Event": lambda enable_timing=False: _Event(machine),
        "CUDAGraph": lambda: _Graph(machine),
        "graph": machine.graph,
        "synchronize": machine.wait,
    }
    with ExitStack() as stack:
        for name, each in replaced.items():
            stack.enter_context(patch.object(torch.cuda, name, each))
        stack.enter_context(patch.object(torch, "empty", allocate))
        stack.enter_context(_Deferring(machine))
        yield
