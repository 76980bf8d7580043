"""Images as people have them: listed, labelled and drawn from.

A folder, a zip or a plain tar; class folders, or a flat folder with a label file.  Nothing is
unpacked, and nothing is left out silently: see :func:`survey`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from clipdeploy.imaging.archives import Place, Reader
from clipdeploy.imaging.layouts import Files, LayoutName, find_layout
from clipdeploy.imaging.listing import list_files
from clipdeploy.imaging.survey import Few, Reading, Survey
from exporters.errors import DatasetError

__all__ = ["ImageEntry", "ImageFolder", "open_images", "select", "survey"]

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"))


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
    """What listing and labelling found, beside the images."""

    layout: str = "no labels"
    class_names: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


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


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _SUFFIXES


def _is_macos_double(name: str) -> bool:
    """Resource forks that macOS puts beside files in archives: named like images, but none."""
    path = PurePosixPath(name)
    return path.name.startswith("._") or "__MACOSX" in path.parts


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
    layout: LayoutName = "auto",
    labels: Path | None = None,
) -> ImageFolder:
    """List the images of a folder, a zip or a plain tar.

    With ``classes`` (folder names in logit order) they get their class: from their folders, else
    from a label file inside or beside; images that neither mentions have none.  ``layout`` and
    ``labels`` (a label file) say which, see :mod:`clipdeploy.imaging.layouts`.

    Raises:
        DatasetError: no such folder, no image in it, a folder that is not among the classes, an
            archive that cannot be read, or a bad label file.
    """
    if not path.exists():
        raise DatasetError(f"{path} does not exist", hint="check its spelling")
    listing = list_files(path)
    _refuse_unprintable([file.name for file in listing.files], path)
    places = {file.name: file.place for file in listing.files}
    doubles = [name for name in places if _is_image(name) and _is_macos_double(name)]
    names = tuple(sorted(name for name in places if _is_image(name) and not _is_macos_double(name)))
    if not names:
        raise DatasetError(
            f"{path} holds no image ({len(places) - len(doubles)} other files)",
            hint=f"images end in {' '.join(sorted(_SUFFIXES))}",
        )
    reader = Reader(path, places)
    try:
        files = Files(path, names, frozenset(places) - frozenset(names), reader.read)
        found = find_layout(files, classes, layout, labels)
    finally:
        reader.close()
    ignored = (*listing.ignored, *(f"{name} is a resource fork of macOS" for name in doubles))
    origin = _Origin(found.name, tuple(classes), found.missing, found.repeated, ignored)
    entries = (ImageEntry(name, found.classes.get(name), places[name]) for name in names)
    return ImageFolder(path, tuple(entries), origin)


def survey(images: ImageFolder, reading: Reading | None = None) -> Survey:
    """What there is and what is odd about it; ``reading`` adds what reading the images showed."""
    origin, reading = images.origin, reading or Reading()
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
        repeated=Few.of(origin.repeated),
        ignored=Few.of(origin.ignored),
        images_read=reading.read,
        unreadable=Few.of(reading.unreadable),
        duplicates=Few.of(reading.duplicates),
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
