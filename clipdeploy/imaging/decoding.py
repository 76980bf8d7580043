"""From the name of an image to its crop, in this process.

Worker processes import this module, so that it stays light: numpy and Pillow, no torch.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.errors import DatasetError
from clipdeploy.core.passport import Preprocess
from clipdeploy.imaging.archives import Place, Reader
from clipdeploy.imaging.crops import CropCache, CropShelf
from clipdeploy.imaging.fingerprints import Fingerprint, fingerprint
from clipdeploy.imaging.preprocess import crop_file

__all__ = ["Decoder", "Failure", "Loaded", "Loader", "Source", "ThreadLoader", "usable_cores"]

# Pillow leaves the interpreter's lock while it decodes and resizes, so that threads help.
_THREADS = 4


class Loaded(NamedTuple):
    """A decoded image: the hex SHA-256 of its file's bytes, uint8 (S, S, 3), its fingerprint."""

    sha256: str
    pixels: NDArray[np.uint8]
    fingerprint: Fingerprint


class Failure(NamedTuple):
    """An image that cannot be used: the parts of a ``DatasetError``."""

    message: str
    hint: str


@dataclass(frozen=True)
class Source:
    """Where images come from and how they become crops; ``cache`` may hold some already."""

    root: Path
    spec: Preprocess
    cache: CropCache | None = None


class Loader(Protocol):
    """Takes images in order and gives them back decoded, in the same order.

    ``capacity``: how many may be submitted before a result has to be taken.
    """

    capacity: int

    def submit(self, name: str, place: Place | None) -> None:
        """Have an image decoded; after several, :meth:`send` has them started."""

    def send(self) -> None:
        """Start what was submitted."""

    def result(self) -> Loaded | Failure:
        """The oldest image submitted; waits for it."""

    def close(self) -> None:
        """Stop, whatever is under way."""


class Decoder:
    """Reads, hashes, decodes and crops one image at a time; safe in several threads."""

    def __init__(self, source: Source, shelf: CropShelf | None = None) -> None:
        """``shelf`` gives the pixels where it has those of the same bytes."""
        self._source = source
        self._shelf = shelf
        self._reader = Reader(source.root)

    def load(self, name: str, place: Place | None) -> Loaded | Failure:
        """The crop of an image, or why there is none."""
        where = f"{self._source.root}/{name}"
        spec = self._source.spec
        try:
            data = self._reader.read(name, place)
            sha256 = hashlib.sha256(data).hexdigest()
            if self._shelf and (found := self._shelf.find(sha256)):
                return Loaded(sha256, *found)
            pixels = crop_file(data, where, spec)
            return Loaded(sha256, pixels, fingerprint(pixels))
        except DatasetError as error:
            return Failure(error.message, error.hint)
        except MemoryError:
            return Failure(
                f"cannot read the image {where}: it does not fit into memory",
                "repair or remove it, or pass --skip-unreadable",
            )

    def close(self) -> None:
        """Close the archive."""
        self._reader.close()


class ThreadLoader:
    """Decodes in a few threads of this process."""

    capacity = 32

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._pool = ThreadPoolExecutor(min(_THREADS, usable_cores()))
        self._pending: deque[Future[Loaded | Failure]] = deque()

    def submit(self, name: str, place: Place | None) -> None:
        """Have an image decoded."""
        self._pending.append(self._pool.submit(self._decoder.load, name, place))

    def send(self) -> None:
        """Nothing to do: each image is started as it is submitted."""

    def result(self) -> Loaded | Failure:
        """The oldest image submitted; waits for it."""
        return self._pending.popleft().result()

    def close(self) -> None:
        """Stop after the images under way."""
        self._pool.shutdown(cancel_futures=True)
        self._decoder.close()


def usable_cores() -> int:
    """Cores this process may use: its affinity, and its container's CPU quota (cgroup v2)."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no cgroup, or the quota is "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, -(-int(quota) // int(period)))
    return max(1, cores)
