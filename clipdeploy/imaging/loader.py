"""Decode images ahead of the consumer, in worker processes if there are many.

    this process                             a worker
    tasks (slot, name, place)  -- pipe -->   read, SHA-256, decode, resize, crop -> slot
    copy the slot, free it     <-- pipe --   hashes and thumbnail, or an error

The slots, uint8 (S, S, 3) each, are in one anonymous memory file that the workers inherit.  The
kernel frees it with the last process, even a killed one, and the size of a container's ``/dev/shm``
does not limit it.  A worker exits when its pipe is closed, so none outlives the parent.  The number
of slots limits how far ahead images are decoded.

Workers are new processes, not forks: the parent has threads, and a lock that a thread holds during
a fork is never released in the child.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.errors import DatasetError
from clipdeploy.imaging.archives import Place
from clipdeploy.imaging.crops import CropShelf
from clipdeploy.imaging.decoding import (
    Decoder,
    Failure,
    Loaded,
    Loader,
    Source,
    ThreadLoader,
    usable_cores,
)
from clipdeploy.imaging.fingerprints import Fingerprint

__all__ = ["ProcessLoader", "open_loader", "serve"]

# Below this many bytes of images (200 of ImageNet's), starting a process (a third of a second)
# costs more than it saves.  Decoding time depends on the number of bytes, not on the crop.
_FEW_BYTES = 20e6
# The answers to this many tasks, with two texts each, fit into a pipe (64 KiB).  So a worker never
# blocks on its answers, and the parent can block on sending a task without a deadlock.
_QUEUE = 24
_TEXT_BYTES = 1200
_PIPE_BYTES = 64 << 10
_SLOT_BYTES = 96 << 20
_NICE = 10
# Start another worker once each has this many tasks, so that few images start few workers.
_BUSY = 2
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from clipdeploy.imaging.loader import serve; serve(*map(int, sys.argv[2:]))"
)


def open_loader(
    source: Source, total_bytes: float, workers: int | None, shelf: CropShelf | None
) -> Loader:
    """Open a loader with ``workers`` processes, or with threads of this process if it is 0.

    None uses one process per core if ``total_bytes``, the approximate size of all images, is large.
    Processes need Linux's anonymous memory files; other systems use threads.
    """
    if workers is None:
        workers = usable_cores() if total_bytes >= _FEW_BYTES else 0
    if workers <= 0 or not sys.executable or not hasattr(os, "memfd_create"):
        return ThreadLoader(Decoder(source, shelf))
    return ProcessLoader(source, workers)


class _Crash(NamedTuple):
    """The traceback of an unexpected exception in a worker: a bug, not a bad image."""

    text: str


class _Decoded(NamedTuple):
    """A decoded image without its pixels, which are in the slot."""

    sha256: str
    fingerprint: Fingerprint


Answer = _Decoded | Failure | _Crash
# Precedes each pickled answer with its length, so that one read can return several answers.
_LENGTH = struct.Struct("<I")


_Task = tuple[int, str, Place | None]


@dataclass
class _Job:
    name: str
    slot: int
    answer: Answer | None = None


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    tasks: Connection
    answers: Connection
    # Oldest first, in the order in which the worker answers.
    jobs: deque[_Job] = field(default_factory=deque)
    unsent: list[_Task] = field(default_factory=list)
    received: bytearray = field(default_factory=bytearray)

    def send(self) -> bool:
        """Send the unsent tasks; False if the worker has exited."""
        tasks, self.unsent = self.unsent, []
        if not tasks:
            return True
        try:
            # Connection.send() without multiprocessing's own reducers, which are slower.
            self.tasks.send_bytes(pickle.dumps(tasks))
        except BrokenPipeError:
            return False
        return True

    def collect(self) -> bool:
        """Read the answers in the pipe, waiting for at least one; False if it is closed."""
        data = os.read(self.answers.fileno(), _PIPE_BYTES)
        received, at = self.received, 0
        received += data
        while len(received) - at >= _LENGTH.size:
            end = at + _LENGTH.size + _LENGTH.unpack_from(received, at)[0]
            if end > len(received):
                break
            answer: Answer = pickle.loads(received[at + _LENGTH.size : end])
            self.jobs.popleft().answer = answer
            at = end
        del received[:at]
        return bool(data)

    def stop(self) -> None:
        # Safe to kill: a worker only reads files.
        self.process.kill()
        self.process.wait()
        self.tasks.close()
        self.answers.close()


def _start(source: Source, memory: int) -> _Worker:
    task_end, tasks = os.pipe()
    answers, answer_end = os.pipe()
    # On any error below, these are closed with their last reference, and the worker exits.
    writer, reader = Connection(tasks, readable=False), Connection(answers, writable=False)
    ends = (task_end, answer_end, memory)
    boot = [sys.executable, "-P", "-c", _BOOT, json.dumps([str(path) for path in sys.path])]
    try:
        process = subprocess.Popen(
            [*boot, *map(str, ends)],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # Only this process handles Ctrl-C.
            start_new_session=True,
            # numpy needs no thread pool in a worker.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
    except OSError as error:
        raise DatasetError(
            f"cannot start an image decoding process: {error.strerror}",
            hint="use fewer processes, or none with --workers 0",
        ) from error
    finally:
        os.close(task_end)
        os.close(answer_end)
    with suppress(BrokenPipeError):  # it exited already: the first task reports that
        writer.send(source)
    return _Worker(process, writer, reader)


class ProcessLoader:
    """Decodes in up to ``workers`` processes and returns results in order; see this module."""

    def __init__(self, source: Source, workers: int) -> None:
        size = source.spec.size
        one = size * size * 3
        self.capacity = max(_BUSY * workers, min(_QUEUE * workers, _SLOT_BYTES // one))
        self._source = source
        self._limit = workers
        self._workers: list[_Worker] = []
        self._of_pipe: dict[int, _Worker] = {}
        self._poll = select.poll()
        self._jobs: deque[tuple[_Job, _Worker]] = deque()
        self._free = list(range(self.capacity))
        self._memory = os.memfd_create("clipdeploy-crops")
        os.ftruncate(self._memory, self.capacity * one)
        self._slots = _slots(self._memory, size)

    def submit(self, name: str, place: Place | None) -> None:
        """Queue an image; the next :meth:`send` or :meth:`result` sends it to a worker.

        Raises:
            DatasetError: a worker could not be started, or died.
        """
        job = _Job(name, self._free.pop())
        worker = self._choose()
        worker.jobs.append(job)
        self._jobs.append((job, worker))
        worker.unsent.append((job.slot, name, place))

    def send(self) -> None:
        """Send the queued images to the workers.

        Raises:
            DatasetError: a worker died.
        """
        for worker in self._workers:
            if not worker.send():
                raise self._death(worker)

    def _choose(self) -> _Worker:
        worker = min(self._workers, key=lambda worker: len(worker.jobs), default=None)
        if len(self._workers) < self._limit and (worker is None or len(worker.jobs) >= _BUSY):
            self.send()  # the others decode while this one starts
            worker = _start(self._source, self._memory)
            self._workers.append(worker)
            self._of_pipe[worker.answers.fileno()] = worker
            self._poll.register(worker.answers, select.POLLIN)
        assert worker is not None  # the limit is at least one
        return worker

    def result(self) -> Loaded | Failure:
        """Wait for the result of the oldest image submitted.

        Raises:
            DatasetError: a worker died; the message names the image it was decoding.
        """
        self.send()
        job, worker = self._jobs.popleft()
        if job.answer is None:
            self._wait(job, worker)
        self._free.append(job.slot)
        if isinstance(job.answer, _Crash):
            raise RuntimeError(f"a worker failed on {job.name}: {job.answer.text}")
        if isinstance(job.answer, Failure):
            return job.answer
        assert job.answer is not None  # set by _wait
        sha256, found = job.answer
        return Loaded(sha256, self._slots[job.slot].copy(), found)

    def _wait(self, job: _Job, worker: _Worker) -> None:
        """Wait for the job's worker only, so that other workers do not wake this thread."""
        while job.answer is None:
            if not worker.collect():
                raise self._death(worker)
        # Collect the others' answers: the next job goes to the worker with the fewest jobs.
        for pipe, _ in self._poll.poll(0):
            if not self._of_pipe[pipe].collect():
                raise self._death(self._of_pipe[pipe])

    def _death(self, worker: _Worker) -> DatasetError:
        while worker.collect():  # the answers it sent before it died
            pass
        code = worker.process.wait()
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.strsignal(-code) or 'signal'} (signal {-code})"
        on = f" while decoding {self._source.root}/{worker.jobs[0].name}" if worker.jobs else ""
        return DatasetError(
            f"an image decoding process {how}{on}",
            hint="if memory ran out, use fewer processes; otherwise check this image",
        )

    def close(self) -> None:
        """Stop the workers immediately and free the memory."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()
        del self._slots
        os.close(self._memory)


def _slots(memory: int, size: int) -> NDArray[np.uint8]:
    """The memory file as uint8 (slots, S, S, 3)."""
    return np.frombuffer(mmap.mmap(memory, 0), np.uint8).reshape(-1, size, size, 3)


def serve(task_end: int, answer_end: int, memory: int) -> None:
    """Run a worker: decode the images from the pipe until it is closed."""
    # Inference threads wait for each other, so a decoder that delays one of them delays all.
    os.nice(_NICE)
    tasks = Connection(task_end, writable=False)
    answers = Connection(answer_end, readable=False)
    with suppress(EOFError, BrokenPipeError):
        source: Source = tasks.recv()
        slots = _slots(memory, source.spec.size)
        decoder = Decoder(source, source.cache.open(source.spec) if source.cache else None)
        while True:
            batch: list[_Task] = pickle.loads(tasks.recv_bytes())
            for slot, name, place in batch:
                answer = pickle.dumps(_answer(decoder, slots[slot], name, place))
                _write(answers.fileno(), _LENGTH.pack(len(answer)) + answer)


def _answer(decoder: Decoder, slot: NDArray[np.uint8], name: str, place: Place | None) -> Answer:
    try:
        loaded = decoder.load(name, place)
    except Exception:  # the parent raises it
        return _Crash(_end_of(traceback.format_exc()))
    if isinstance(loaded, Failure):
        return Failure(_end_of(loaded.message), _end_of(loaded.hint))
    slot[:] = loaded.pixels
    return _Decoded(loaded.sha256, loaded.fingerprint)


def _write(pipe: int, data: bytes) -> None:
    while data:
        data = data[os.write(pipe, data) :]


def _end_of(text: str) -> str:
    return text.encode("utf-8", "replace")[-_TEXT_BYTES:].decode("utf-8", "ignore")
