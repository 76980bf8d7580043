"""Ctrl-C while foreign code runs that swallows what Python raises in it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["interrupts"]


@contextmanager
def interrupts(stop: list[BaseException]) -> Iterator[None]:
    """Put Ctrl-C into ``stop`` while the block runs; raise it once the block has ended.

    Python raises it in whatever Python code comes next.  In a build that is most likely TensorRT's
    logger, in a checkpoint PyTorch's look at a foreign buffer, and both swallow it.  Only the main
    thread can arrange this, and a handler that somebody else has set stays.
    """
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: stop.append(KeyboardInterrupt()))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
