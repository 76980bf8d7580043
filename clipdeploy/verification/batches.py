"""Decodes images ahead, in batches that are the same in every run."""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Collection, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from clipdeploy.core.errors import DatasetError
from clipdeploy.core.passport import Preprocess
from clipdeploy.imaging import Crop, CropCache, ImageFolder, Skipped, iter_crops, survey
from clipdeploy.imaging.archives import ZipPlace
from clipdeploy.imaging.crop_shards import NO_STAMP
from clipdeploy.imaging.crops import Stamps, pixels_key
from clipdeploy.imaging.scan import file_sizes
from exporters.samples import GraphSamples, Samples, stack_crops

__all__ = [
    "DecodedBatch",
    "ImageSource",
    "Source",
    "decoded_batches",
    "digest_of_contents",
    "digest_of_entries",
    "digest_of_files",
    "prefetched",
    "shuffled",
]

T = TypeVar("T")

_ORDER_SEED = 0
# Files whose bytes go into the digest of contents; the sizes of all the others do.
_SAMPLED = 64


@dataclass(frozen=True)
class DecodedBatch:
    """The crops of one batch, and the names of the images that could not be read."""

    number: int
    crops: tuple[Crop, ...]
    unreadable: tuple[str, ...]

    def samples(self, spec: Preprocess) -> GraphSamples:
        """Return the crops as model input; there must be at least one."""
        return Samples(stack_crops([crop.pixels for crop in self.crops]), spec)


class Source(Protocol):
    """What a verification runs on, in the order of the run: images or texts."""

    @property
    def listed(self) -> ImageFolder:
        """The names and classes."""

    @property
    def decoder(self) -> str:
        """The key of everything that turns a file or a text into a model's input."""

    def contents(self) -> str:
        """A digest of the contents, which does not depend on the folder."""

    def stamps(self) -> str:
        """A digest of the state of the files; empty if it is not known."""

    def problems(self) -> tuple[str, ...]:
        """A sentence for each problem that was found."""

    def batches(self, size: int, numbers: Collection[int]) -> Generator[DecodedBatch]:
        """Yield the batches with these ``numbers``, see :func:`decoded_batches`."""


@dataclass(frozen=True)
class ImageSource:
    """Images, in the order of verification; for the other fields see :func:`decoded_batches`."""

    listed: ImageFolder
    spec: Preprocess
    skip_unreadable: bool = False
    workers: int | None = None
    cache: CropCache | None = None

    @property
    def decoder(self) -> str:
        """See :class:`Source`."""
        return pixels_key(self.spec)

    def contents(self) -> str:
        """See :class:`Source`."""
        return digest_of_contents(self.listed)

    def stamps(self) -> str:
        """See :class:`Source`."""
        return digest_of_files(self.listed)

    def problems(self) -> tuple[str, ...]:
        """See :class:`Source`."""
        return survey(self.listed).problems()

    def batches(self, size: int, numbers: Collection[int]) -> Generator[DecodedBatch]:
        """See :class:`Source`."""
        return decoded_batches(
            self.listed,
            self.spec,
            size,
            numbers,
            skip_unreadable=self.skip_unreadable,
            workers=self.workers,
            cache=self.cache,
        )


def prefetched(items: Generator[T], depth: int = 2) -> Iterator[T]:
    """Yield the same items, made in a thread up to ``depth`` ahead of the consumer.

    NumPy, file reading and ONNX Runtime release the GIL, so that producer and consumer overlap.
    """
    pool = ThreadPoolExecutor(1)
    try:
        pending = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()


def shuffled(images: ImageFolder) -> ImageFolder:
    """Return the images in the order of verification: random, and always the same."""
    order = np.random.default_rng(_ORDER_SEED).permutation(len(images.entries))
    return ImageFolder(images.root, tuple(images.entries[i] for i in order), images.origin)


def digest_of_entries(images: ImageFolder) -> str:
    """Return the SHA-256 of names and classes in order."""
    digest = hashlib.sha256()
    for entry in images.entries:
        digest.update(repr((entry.name, entry.label)).encode())
    return digest.hexdigest()


def digest_of_contents(images: ImageFolder) -> str:
    """Return the SHA-256 of all file sizes (and CRC-32, in a zip) and of the bytes of 64 files.

    It does not depend on the folder, and distinguishes image sets with the same names without
    reading all files. The 64 are spread over the list.
    """
    digest = hashlib.sha256()
    for entry, size in zip(images.entries, file_sizes(images), strict=True):
        crc = entry.place.crc if isinstance(entry.place, ZipPlace) else 0
        digest.update(repr((entry.name, size, crc)).encode())
    reader = images.reader()
    try:
        step = max(1, len(images.entries) // _SAMPLED)
        for entry in images.entries[::step]:
            with suppress(DatasetError):  # the size of an unreadable file is in the digest
                data = reader.read(entry.name, entry.place)
                digest.update(hashlib.sha256(data).digest())
    finally:
        reader.close()
    return digest.hexdigest()


def digest_of_files(images: ImageFolder) -> str:
    """Return a hash of the current state of all files; empty if one was changed just now."""
    stamps, digest = Stamps(images.root), hashlib.sha256()
    for entry in images.entries:
        stamp = stamps.of(entry.name)
        if stamp == NO_STAMP:
            return ""
        digest.update(stamp)
    return digest.hexdigest()


def decoded_batches(
    images: ImageFolder,
    spec: Preprocess,
    size: int,
    numbers: Collection[int],
    *,
    skip_unreadable: bool = False,
    workers: int | None = None,
    cache: CropCache | None = None,
) -> Generator[DecodedBatch]:
    """Yield the batches with these ``numbers``, of at most ``size`` images, in order.

    Batches are cut from the whole list: which images share a batch does not depend on ``numbers``.
    An unreadable image makes its batch smaller.

    Raises:
        DatasetError: an image cannot be read, unless ``skip_unreadable``.
    """
    wanted = sorted(numbers)
    of_name = {entry.name: at // size for at, entry in enumerate(images.entries)}
    entries = tuple(entry for entry in images.entries if of_name[entry.name] in numbers)
    skipped = Skipped()
    crops = iter_crops(
        ImageFolder(images.root, entries, images.origin),
        spec,
        skipped=skipped if skip_unreadable else None,
        workers=workers,
        cache=cache,
    )
    held: dict[int, list[Crop]] = defaultdict(list)
    for crop in crops:
        number = of_name[crop.entry.name]
        # The first crop of a later batch ends all earlier ones.
        while wanted[0] < number:
            yield _batch(wanted.pop(0), held, skipped, of_name)
        held[number].append(crop)
    while wanted:
        yield _batch(wanted.pop(0), held, skipped, of_name)


def _batch(
    number: int, held: dict[int, list[Crop]], skipped: Skipped, of_name: dict[str, int]
) -> DecodedBatch:
    unreadable = tuple(name for name in skipped.names if of_name[name] == number)
    return DecodedBatch(number, tuple(held.pop(number, ())), unreadable)
