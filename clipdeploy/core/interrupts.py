"""Delivers Ctrl-C after native code that would suppress it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["interrupts"]


@contextmanager
def interrupts(stop: list[BaseException]) -> Iterator[None]:
    """Append Ctrl-C to ``stop`` while the block runs; the caller raises it afterwards.

    Python raises KeyboardInterrupt in the Python code that runs next.  During a build that is
    usually a TensorRT log callback, and while a checkpoint is loaded a buffer callback of PyTorch;
    both suppress exceptions.  This has no effect outside the main thread, or if the application
    has its own handler for SIGINT.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: stop.append(KeyboardInterrupt()))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
