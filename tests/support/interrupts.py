"""Starts processes that receive Ctrl-C, even if the tests run with it ignored."""

from __future__ import annotations

import signal

__all__ = ["hear_interrupts"]


def hear_interrupts() -> None:
    """For ``preexec_fn``: a shell without job control starts ``command &`` with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
