"""Read and decode images to crops in this process.

Worker processes import this module, so it depends on numpy and Pillow but not on torch.
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
from clipdeploy.imaging.archives import Place, Reader, unreadable
from clipdeploy.imaging.crops import CropCache, CropShelf
from clipdeploy.imaging.fingerprints import Fingerprint, fingerprint
from clipdeploy.imaging.preprocess import crop_file

__all__ = ["Decoder", "Failure", "Loaded", "Loader", "Source", "ThreadLoader", "usable_cores"]

# Pillow releases the GIL while it decodes and resizes.
_THREADS = 4


class Loaded(NamedTuple):
    """A decoded image: the hex SHA-256 of its file, uint8 (S, S, 3) pixels, its fingerprint."""

    sha256: str
    pixels: NDArray[np.uint8]
    fingerprint: Fingerprint


class Failure(NamedTuple):
    """An image that cannot be decoded: message and hint of a ``DatasetError``."""

    message: str
    hint: str


@dataclass(frozen=True)
class Source:
    """The folder or archive of the images, their preprocessing, and a cache of crops."""

    root: Path
    spec: Preprocess
    cache: CropCache | None = None


class Loader(Protocol):
    """Decodes images and returns them in the order of submission.

    ``capacity``: number of images that may be submitted before a result has to be taken.
    """

    capacity: int

    def submit(self, name: str, place: Place | None) -> None:
        """Queue an image for decoding; :meth:`send` starts the queued images."""

    def send(self) -> None:
        """Start decoding the queued images."""

    def result(self) -> Loaded | Failure:
        """Wait for the result of the oldest image submitted."""

    def close(self) -> None:
        """Stop decoding and free all resources."""


class Decoder:
    """Reads, hashes, decodes and crops one image at a time; safe in several threads."""

    def __init__(self, source: Source, shelf: CropShelf | None = None) -> None:
        """``shelf`` is searched for a crop of the same bytes before decoding."""
        self._source = source
        self._shelf = shelf
        self._reader = Reader(source.root)

    def load(self, name: str, place: Place | None) -> Loaded | Failure:
        """Decode one image."""
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
            failed = unreadable(f"the image {where}", "it does not fit into memory")
            return Failure(failed.message, failed.hint)

    def close(self) -> None:
        """Close the archive."""
        self._reader.close()


class ThreadLoader:
    """Decodes in up to four threads of this process."""

    capacity = 32

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._pool = ThreadPoolExecutor(min(_THREADS, usable_cores()))
        self._pending: deque[Future[Loaded | Failure]] = deque()

    def submit(self, name: str, place: Place | None) -> None:
        """Start decoding an image."""
        self._pending.append(self._pool.submit(self._decoder.load, name, place))

    def send(self) -> None:
        """Do nothing: :meth:`submit` has started each image."""

    def result(self) -> Loaded | Failure:
        """Wait for the result of the oldest image submitted."""
        return self._pending.popleft().result()

    def close(self) -> None:
        """Stop after the images being decoded now."""
        self._pool.shutdown(cancel_futures=True)
        self._decoder.close()


def usable_cores() -> int:
    """The number of cores allowed by the CPU affinity and the container's quota (cgroup v2)."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no cgroup, or the quota is "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, -(-int(quota) // int(period)))
    return max(1, cores)
