"""Images as people have them: listed, labelled and drawn from.

A folder, a zip or a plain tar; class folders, or a flat folder with a label file.  Nothing is
unpacked, and nothing is left out silently: see :func:`survey`.
"""

from __future__ import annotations

import io
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from clipdeploy.core.errors import DatasetError
from clipdeploy.imaging.archives import Place, Reader
from clipdeploy.imaging.classes import Classes
from clipdeploy.imaging.formats import (
    HEAD_BYTES,
    begins_like_an_image,
    has_doubtful_suffix,
    has_image_suffix,
    may_be_an_image,
    opens,
)
from clipdeploy.imaging.layouts import Files, Labelling, Layout, find_layout
from clipdeploy.imaging.listing import Listing, list_files
from clipdeploy.imaging.survey import Few, Survey

__all__ = ["ImageEntry", "ImageFolder", "open_images", "select", "survey", "with_labels"]

# Folders that programs keep beside the images, and whose copies of them are none of the data:
# macOS's archives, Synology's thumbnails, Windows' bin.  Names with a dot in front are hidden too.
_NO_DATA = frozenset(("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"))
_TABLES_SHOWN = 3
# Standard deviations above the mean that are no chance: Chebyshev's bound is 1 in 100.
_BY_CHANCE = 10.0


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One image: its path inside the folder or archive, and its class index, if it has one.

    ``place`` is where it lies in an archive.
    """

    name: str
    label: int | None
    place: Place | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class _Origin:
    """What listing and labelling found, beside the images.

    ``unasked``: the classes of images are not read.  ``partial``: the number of classes with an
    image, if the others lack one by more than chance, else 0.
    """

    layout: str = "no labels"
    class_names: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    unasked: bool = False
    partial: int = 0


@dataclass(frozen=True)
class ImageFolder:
    """The images under ``root``, sorted by name."""

    root: Path
    entries: tuple[ImageEntry, ...]
    origin: _Origin = field(default=_Origin(), compare=False, repr=False)

    @property
    def labelled(self) -> bool:
        """True if every image has a class."""
        return all(entry.label is not None for entry in self.entries)

    def reader(self) -> Reader:
        """Something that gives the bytes of an entry; close it after use."""
        return Reader(self.root, {entry.name: entry.place for entry in self.entries})


def _is_hidden(name: str) -> bool:
    """Checkpoints of notebooks, resource forks of macOS, thumbnails of a disk station."""
    return any(part.startswith(".") or part in _NO_DATA for part in PurePosixPath(name).parts)


def _refuse_unprintable(names: Sequence[str], path: Path) -> None:
    """Names that are not UTF-8 cannot be written into a table or a report."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DatasetError(
                f"{path} holds a file whose name is not UTF-8: {name!a}", hint="rename it"
            ) from None


def open_images(
    path: Path,
    classes: Sequence[str] = (),
    *,
    count: int | None = None,
    asked: Labelling = Labelling(),
) -> ImageFolder:
    """List the images of a folder, a zip or a plain tar.

    With ``classes`` (folder names in logit order) they get their class: from their folders, else
    from a label file inside or beside; images that neither mentions have none.  Where the names are
    unknown, ``count`` is the number of classes, and the folders or the label file name them.
    ``asked`` is what the user says about all that.

    Raises:
        DatasetError: no such folder, no image in it, a folder that is not among the classes, an
            archive that cannot be read, or a bad label file.
    """
    if not path.exists():
        raise DatasetError(f"{path} does not exist", hint="check its spelling")
    listing = list_files(path)
    _refuse_unprintable([file.name for file in listing.files], path)
    places = {file.name: file.place for file in listing.files}
    reader = Reader(path, places)
    try:
        names, hidden = _images(path, listing, reader)
        others = frozenset(places) - frozenset(names)
        wanted = Classes(len(classes) if count is None else count, tuple(classes))
        found = find_layout(Files(path, names, others, reader.read), wanted, asked)
    finally:
        reader.close()
    ignored = (*listing.ignored, *(f"{name} is hidden" for name in hidden))
    left_out = _left_out(names, found, asked)
    kept = [name for name in names if name not in left_out]
    origin = _Origin(
        layout=found.name,
        class_names=found.classes.names,
        missing=found.missing,
        repeated=found.repeated,
        ignored=ignored,
        others=_not_used(others, hidden, found),
        skipped=tuple(left_out),
        unasked=asked.layout == "none" or not wanted,
        partial=_partial(found),
    )
    entries = (ImageEntry(name, found.index.get(name), places[name]) for name in kept)
    return ImageFolder(path, tuple(entries), origin)


def _images(path: Path, listing: Listing, reader: Reader) -> tuple[tuple[str, ...], list[str]]:
    """The images, sorted, and what is hidden and looks like one.

    Raises:
        DatasetError: there is no image.
    """
    images, hidden = [], []
    for name in sorted(file.name for file in listing.files):
        if _is_hidden(name):
            if has_image_suffix(name):
                hidden.append(name)
        elif has_image_suffix(name) or _is_image_inside(path, reader, name):
            images.append(name)
    if not images:
        raise DatasetError(
            f"{path} holds no image ({len(listing.files) - len(hidden)} other files)",
            hint="give a folder, a zip or a tar of images that Pillow reads",
        )
    return tuple(images), hidden


def _is_image_inside(path: Path, reader: Reader, name: str) -> bool:
    """Whether the content is an image's, where the name does not say."""
    if not may_be_an_image(name):
        return False
    try:
        with open(path / name, "rb") if path.is_dir() else io.BytesIO(reader.read(name)) as stream:
            if has_doubtful_suffix(name):
                return opens(stream)
            return begins_like_an_image(stream.read(HEAD_BYTES))
    except (OSError, DatasetError):  # it cannot be read, and is reported as no image
        return False


def _left_out(names: Sequence[str], found: Layout, asked: Labelling) -> dict[str, None]:
    """The images without a class, if such are to be skipped and others have one."""
    if not asked.skip_unlabelled or not found.index:
        return {}
    return {name: None for name in names if name not in found.index}


def _partial(found: Layout) -> int:
    """The number of classes with an image where chance does not explain that others have none.

    Of n images drawn from K classes, classes without an image have

        mean  m = K (1 - 1/K)^n,    variance  m + K (K - 1) (1 - 2/K)^n - m^2
    """
    count, images = found.classes.count, len(found.index)
    present = len(set(found.index.values()))
    if not present or count < 2:
        return 0
    mean = count * (1 - 1 / count) ** images
    variance = mean + count * (count - 1) * (1 - 2 / count) ** images - mean**2
    most = mean + _BY_CHANCE * math.sqrt(max(variance, 0.0))
    return present if count - present > most else 0


def _not_used(others: Collection[str], hidden: Sequence[str], found: Layout) -> tuple[str, ...]:
    """Files that are neither images nor the label file."""
    seen = {*hidden, *found.read}
    return tuple(sorted(name for name in others if name not in seen))


def with_labels(images: ImageFolder) -> ImageFolder:
    """The same images, if each has a class or classes are not read.

    Raises:
        DatasetError: some have none, with what to do about it.
    """
    bare = [entry.name for entry in images.entries if entry.label is None]
    if not bare or images.origin.unasked:
        return images
    if len(bare) < len(images.entries):
        where = _common_folder(entry.name for entry in images.entries if entry.label is not None)
        apart = where and not any(name.startswith(where) for name in bare)
        mend = f"give {images.root}/{where.rstrip('/')}" if apart else "label or remove them"
        raise DatasetError(
            f"{len(bare)} of {len(images.entries)} images have no class: {Few.of(bare)}",
            hint=f"{mend}, or pass --skip-unlabelled",
        )
    tables = [name for name in images.origin.others if name.endswith((".csv", ".tsv", ".txt"))]
    named = " or ".join(tables[:_TABLES_SHOWN]) or "FILE"
    raise DatasetError(
        f"no labels were found for the {len(bare)} images of {images.root}: neither class folders "
        "nor a label file",
        hint=f"name a label file, --labels {named}; to compare logits alone: --layout none",
    )


def _common_folder(names: Iterable[str]) -> str:
    folder = os.path.commonpath([name.rpartition("/")[0] or "." for name in names])
    return "" if folder in ("", ".") else f"{folder}/"


def survey(images: ImageFolder) -> Survey:
    """Count the images and classes, and collect the problems that the listing shows."""
    origin = images.origin
    present = {entry.label for entry in images.entries} - {None}
    absent = (name for index, name in enumerate(origin.class_names) if index not in present)
    bare = (entry.name for entry in images.entries if entry.label is None)
    return Survey(
        layout=origin.layout,
        images=len(images.entries),
        classes=len(present),
        absent_classes=Few.of(absent),
        missing=Few.of(origin.missing),
        unlabelled=Few.of(bare if origin.class_names else ()),
        skipped=Few.of(origin.skipped),
        repeated=Few.of(origin.repeated),
        ignored=Few.of(origin.ignored),
        others=Few.of(origin.others),
    )


def select(images: ImageFolder, count: int, seed: int) -> ImageFolder:
    """``count`` images, drawn by ``seed`` and spread evenly over the classes.

    The numbers of two classes differ by one at most where both have enough images.  Images without
    a class are spread over their folders.

    Raises:
        DatasetError: there are fewer.
    """
    if count > len(images.entries):
        raise DatasetError(
            f"{images.root} holds {len(images.entries)} images, {count} were asked for",
            hint="ask for fewer, or add images",
        )
    groups: dict[int | str, list[ImageEntry]] = defaultdict(list)
    for entry in images.entries:
        folder = entry.name.rpartition("/")[0]
        groups[folder if entry.label is None else entry.label].append(entry)
    generator = np.random.default_rng(seed)
    queues = [[group[i] for i in generator.permutation(len(group))] for group in groups.values()]
    # Round robin: the first image of every class, then the second, in a random order of classes.
    order = generator.permutation(len(queues))
    chosen: list[ImageEntry] = []
    for turn in range(max(map(len, queues))):
        chosen.extend(queues[i][turn] for i in order if turn < len(queues[i]))
    kept = sorted(chosen[:count], key=lambda entry: entry.name)
    return ImageFolder(images.root, tuple(kept), images.origin)
