"""Images as people have them: class folders, a flat folder, or a zip archive of either."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from clipdeploy.preprocess import crop_image, decode
from exporters.artifact import Preprocess
from exporters.errors import DatasetError

__all__ = ["Crop", "ImageFolder", "Skipped", "iter_crops", "open_images", "select"]

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"))
_LOOKAHEAD = 32
_SHOWN = 5


@dataclass(frozen=True)
class ImageEntry:
    """One image: its path inside the folder or archive, and its class index, if it has one."""

    name: str
    label: int | None


@dataclass(frozen=True)
class Crop:
    """A decoded image: uint8 (S, S, 3), and the SHA-256 of the file's bytes."""

    entry: ImageEntry
    sha256: str
    pixels: NDArray[np.uint8]


@dataclass
class Skipped:
    """Images that could not be read and were skipped because the user allowed it."""

    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ImageFolder:
    """The images under ``root``, sorted by name."""

    root: Path
    entries: tuple[ImageEntry, ...]

    @property
    def labelled(self) -> bool:
        """True if every image has a class."""
        return all(entry.label is not None for entry in self.entries)

    def reader(self) -> _FolderReader | _ZipReader:
        """Something that gives the bytes of an entry; close it after use."""
        return _ZipReader(self.root) if self.root.is_file() else _FolderReader(self.root)


class _FolderReader:
    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str) -> bytes:
        try:
            return (self._root / name).read_bytes()
        except OSError as error:
            raise DatasetError(
                f"cannot read the image {self._root / name}: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Nothing is open."""


class _ZipReader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._archive = zipfile.ZipFile(path)

    def read(self, name: str) -> bytes:
        try:
            return self._archive.read(name)
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise DatasetError(f"cannot read {name} in {self._path}: {error}") from error

    def close(self) -> None:
        """Close the archive."""
        self._archive.close()


def _list_folder(root: Path) -> list[str]:
    # os.walk does not follow links to folders, so a loop of links ends.
    return [
        Path(folder, name).relative_to(root).as_posix()
        for folder, _, names in os.walk(root)
        for name in names
    ]


def _list_zip(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise DatasetError(
            f"{path} is no readable zip archive: {error}", hint="pass a folder or a zip of images"
        ) from error
    for name in names:
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise DatasetError(f"{path} holds an entry outside itself: {name!r}")
    return names


def _refuse_unprintable(names: Sequence[str], path: Path) -> None:
    """Names that are not UTF-8 cannot be written into a table or a report."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DatasetError(
                f"{path} holds a file whose name is not UTF-8: {name!a}", hint="rename it"
            ) from None


def open_images(path: Path, classes: Sequence[str] = ()) -> ImageFolder:
    """List the images of a folder or zip archive.

    With ``classes`` (folder names in logit order), images in class folders get their class, and a
    folder that is no class is refused; images right at the top have no class.

    Raises:
        DatasetError: no such folder, no image in it, or a folder that is not among the classes.
    """
    if not path.exists():
        raise DatasetError(f"{path} does not exist", hint="check the path given to --data")
    names = _list_folder(path) if path.is_dir() else _list_zip(path)
    _refuse_unprintable(names, path)
    images = sorted(name for name in names if PurePosixPath(name).suffix.lower() in _SUFFIXES)
    if not images:
        raise DatasetError(
            f"{path} holds no image ({len(names)} other files)",
            hint=f"images end in {' '.join(sorted(_SUFFIXES))}",
        )
    index = {name: position for position, name in enumerate(classes)}
    folders = {PurePosixPath(name).parts[0] for name in images if "/" in name}
    unknown = sorted(folders - index.keys())
    if classes and unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise DatasetError(
            f"{path} has folders that are no class: {', '.join(unknown[:_SHOWN])}{more}",
            hint=f"the model's {len(classes)} classes are {classes[0]}, {classes[1]}, ...",
        )
    entries = (
        ImageEntry(name, index.get(PurePosixPath(name).parts[0]) if "/" in name else None)
        for name in images
    )
    return ImageFolder(path, tuple(entries))


def select(images: ImageFolder, count: int, seed: int) -> ImageFolder:
    """``count`` images, drawn by ``seed`` and spread evenly over the top folders.

    Raises:
        DatasetError: there are fewer.
    """
    if count > len(images.entries):
        raise DatasetError(
            f"{images.root} holds {len(images.entries)} images, {count} were asked for",
            hint="ask for fewer with --images, or add images",
        )
    groups: dict[str, list[ImageEntry]] = defaultdict(list)
    for entry in images.entries:
        groups[entry.name.rpartition("/")[0]].append(entry)
    generator = np.random.default_rng(seed)
    queues = [[group[i] for i in generator.permutation(len(group))] for group in groups.values()]
    # Round robin: the first image of every folder, then the second, in a random order of folders.
    order = generator.permutation(len(queues))
    chosen: list[ImageEntry] = []
    for turn in range(max(map(len, queues))):
        chosen.extend(queues[i][turn] for i in order if turn < len(queues[i]))
    kept = sorted(chosen[:count], key=lambda entry: entry.name)
    return ImageFolder(images.root, tuple(kept))


def iter_crops(
    images: ImageFolder, spec: Preprocess, *, skipped: Skipped | None = None, workers: int = 2
) -> Iterator[Crop]:
    """Decode the images in order, a few ahead of the consumer.

    With ``skipped`` an unreadable image is listed there and left out.

    Raises:
        DatasetError: an image that cannot be read, without ``skipped``.
    """
    reader = images.reader()

    def load(entry: ImageEntry) -> Crop:
        data = reader.read(entry.name)
        where = f"{images.root}/{entry.name}"
        image = decode(data, where, exif_orientation=spec.exif_orientation)
        return Crop(entry, hashlib.sha256(data).hexdigest(), crop_image(image, spec))

    pool = ThreadPoolExecutor(workers)
    try:
        pending = []
        entries = iter(images.entries)
        for entry in entries:
            pending.append((entry, pool.submit(load, entry)))
            if len(pending) < _LOOKAHEAD:
                continue
            yield from _finish(*pending.pop(0), skipped)
        for item in pending:
            yield from _finish(*item, skipped)
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()


def _finish(entry: ImageEntry, future: Future[Crop], skipped: Skipped | None) -> Iterator[Crop]:
    try:
        yield future.result()
    except DatasetError:
        if skipped is None:
            raise
        skipped.names.append(entry.name)
