"""Decode images ahead of the consumer, in processes where there are many.

    this process                             a worker
    tasks (slot, name, place)  -- pipe -->   read, SHA-256, decode, resize, crop -> slot
    copy the slot, free it     <-- pipe --   hashes and thumbnail, or what is wrong with the image

The slots, uint8 (S, S, 3) each, lie in one anonymous memory file that the workers inherit.  It has
no name: the kernel frees it with the last process, however that ends, and the size of a container's
``/dev/shm`` does not bound it.  A worker ends when its pipe does, so none outlives its parent.  The
number of slots is the back pressure: nobody decodes further ahead.

Workers are started as programs of their own, not forked: the parent has threads, and a forked copy
of a lock that a thread holds is never released.
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

# Below this many bytes of images, 200 of ImageNet's, the start of a process (a third of a second)
# costs more than it saves.  Decoding takes about as long as there are bytes, whatever the crop.
_FEW_BYTES = 20e6
# The answers to this many tasks, of two texts at most, fit into a pipe (64 KiB) together: a worker
# never waits to be heard, and so the parent may wait for a worker to take a task.
_QUEUE = 24
_TEXT_BYTES = 1200
_PIPE_BYTES = 64 << 10
_SLOT_BYTES = 96 << 20
_NICE = 10
# Tasks a worker has before another one is started: few images start few workers.
_BUSY = 2
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from clipdeploy.imaging.loader import serve; serve(*map(int, sys.argv[2:]))"
)


def open_loader(
    source: Source, total_bytes: float, workers: int | None, shelf: CropShelf | None
) -> Loader:
    """Threads of this process, or ``workers`` processes (None: one a core for many images).

    ``total_bytes``: about how many all images have.

    Processes need Linux's anonymous memory files; elsewhere threads decode.
    """
    if workers is None:
        workers = usable_cores() if total_bytes >= _FEW_BYTES else 0
    if workers <= 0 or not sys.executable or not hasattr(os, "memfd_create"):
        return ThreadLoader(Decoder(source, shelf))
    return ProcessLoader(source, workers)


class _Crash(NamedTuple):
    """What a worker met that no image can cause: a mistake in this program."""

    text: str


class _Decoded(NamedTuple):
    """What is to be known of a crop beside its pixels."""

    sha256: str
    fingerprint: Fingerprint


Answer = _Decoded | Failure | _Crash
# A pickled answer's length, before it: one read takes as many answers as there are.
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
    # Oldest first, as they are worked on.
    jobs: deque[_Job] = field(default_factory=deque)
    unsent: list[_Task] = field(default_factory=list)
    received: bytearray = field(default_factory=bytearray)

    def send(self) -> bool:
        """Hand over what there is to do; False if the worker is gone."""
        tasks, self.unsent = self.unsent, []
        if not tasks:
            return True
        try:
            # As Connection.send() does it, without the reducers that only multiprocessing needs.
            self.tasks.send_bytes(pickle.dumps(tasks))
        except BrokenPipeError:
            return False
        return True

    def collect(self) -> bool:
        """Take the answers that are in the pipe, or wait for one; False if it is closed."""
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
        # It holds nothing that needs care: it only reads files.
        self.process.kill()
        self.process.wait()
        self.tasks.close()
        self.answers.close()


def _start(source: Source, memory: int) -> _Worker:
    task_end, tasks = os.pipe()
    answers, answer_end = os.pipe()
    # Whatever goes wrong below, these are closed with their last reference, which ends the worker.
    writer, reader = Connection(tasks, readable=False), Connection(answers, writable=False)
    ends = (task_end, answer_end, memory)
    boot = [sys.executable, "-P", "-c", _BOOT, json.dumps([str(path) for path in sys.path])]
    try:
        process = subprocess.Popen(
            [*boot, *map(str, ends)],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # Ctrl-C is this process's to handle, and numpy needs no threads of its own there.
            start_new_session=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
    except OSError as error:
        raise DatasetError(
            f"cannot start a process that decodes images: {error.strerror}",
            hint="decode in fewer processes, or in none with --workers 0",
        ) from error
    finally:
        os.close(task_end)
        os.close(answer_end)
    with suppress(BrokenPipeError):  # it ended at once: its first task will find out
        writer.send(source)
    return _Worker(process, writer, reader)


class ProcessLoader:
    """Decodes in up to ``workers`` processes, results in order; see the top of this file."""

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
        """Have an image decoded, from the next :meth:`send` or :meth:`result` on.

        Raises:
            DatasetError: a worker could not be started, or died.
        """
        job = _Job(name, self._free.pop())
        worker = self._choose()
        worker.jobs.append(job)
        self._jobs.append((job, worker))
        worker.unsent.append((job.slot, name, place))

    def send(self) -> None:
        """Hand the workers what was submitted.

        Raises:
            DatasetError: a worker died.
        """
        for worker in self._workers:
            if not worker.send():
                raise self._death(worker)

    def _choose(self) -> _Worker:
        worker = min(self._workers, key=lambda worker: len(worker.jobs), default=None)
        if len(self._workers) < self._limit and (worker is None or len(worker.jobs) >= _BUSY):
            self.send()  # they decode while another one is started
            worker = _start(self._source, self._memory)
            self._workers.append(worker)
            self._of_pipe[worker.answers.fileno()] = worker
            self._poll.register(worker.answers, select.POLLIN)
        assert worker is not None  # the limit is one at least
        return worker

    def result(self) -> Loaded | Failure:
        """The oldest image submitted; waits for it.

        Raises:
            DatasetError: a worker died; the image it was on is named.
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
        assert job.answer is not None  # it was waited for
        sha256, found = job.answer
        return Loaded(sha256, self._slots[job.slot].copy(), found)

    def _wait(self, job: _Job, worker: _Worker) -> None:
        """Wait for the worker that has the job; other workers do not wake this thread."""
        while job.answer is None:
            if not worker.collect():
                raise self._death(worker)
        # The next job goes to whoever has the fewest left.
        for pipe, _ in self._poll.poll(0):
            if not self._of_pipe[pipe].collect():
                raise self._death(self._of_pipe[pipe])

    def _death(self, worker: _Worker) -> DatasetError:
        while worker.collect():  # what it finished before it died
            pass
        code = worker.process.wait()
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.strsignal(-code) or 'signal'} (signal {-code})"
        on = f"{self._source.root}/{worker.jobs[0].name}" if worker.jobs else "no image"
        return DatasetError(
            f"a process that decodes images {how} while it was on {on}",
            hint="if memory ran out use fewer processes, else look at this image",
        )

    def close(self) -> None:
        """Stop the workers at once and give their memory back."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()
        del self._slots
        os.close(self._memory)


def _slots(memory: int, size: int) -> NDArray[np.uint8]:
    """The memory file as uint8 (slots, S, S, 3)."""
    return np.frombuffer(mmap.mmap(memory, 0), np.uint8).reshape(-1, size, size, 3)


def serve(task_end: int, answer_end: int, memory: int) -> None:
    """A worker's life: decode what comes through the pipe until it closes."""
    # The model's threads wait for each other: one that a decoder keeps waiting stalls them all.
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
    except Exception:  # told to the parent, which raises it
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
