"""Runs a slow piece of Python again and again, each time in a process to kill.

The imports are made once: each run is forked after them.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

__all__ = ["killed_runs"]

# A line starts a run; answered by its process, and when it has ended by its exit code.
_LOOP = """
import os as _os, sys as _sys
for _ in _sys.stdin:
    _pid = _os.fork()
    if _pid == 0:
        run()
        _os._exit(0)
    print(_pid, flush=True)
    print(_os.waitstatus_to_exitcode(_os.waitpid(_pid, 0)[1]), flush=True)
"""
_PATIENCE = 120.0


@contextmanager
def _runs(code: str, words: tuple[str, ...]) -> Iterator[tuple[TextIO, TextIO]]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code + _LOOP, *words]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdin, process.stdout
        process.stdin.close()


def killed_runs(
    code: str, *words: str, partial: Path, times: int, seed: int, delay: float
) -> Iterator[int]:
    """Yield the exit code of each run of ``run()``, which ``code`` defines; ``words`` are its argv.

    A run is killed once it has changed the file ``partial``, so that each kill falls into its loop,
    after another random time of at most ``delay`` seconds.
    """
    generator = random.Random(seed)
    with _runs(code, words) as (start, answers):
        for _ in range(times):
            before = _content(partial)
            start.write("\n")
            start.flush()
            process = int(answers.readline())
            deadline = time.monotonic() + _PATIENCE
            # A process that has ended is gone: the other one has waited for it.
            while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
                if _content(partial) not in (b"", before):
                    break
                time.sleep(0.01)
            time.sleep(generator.random() * delay)
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            yield int(answers.readline())


def _content(path: Path) -> bytes:
    """Return what is in a file, or nothing if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
