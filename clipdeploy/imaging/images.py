"""Open a set of images: list the files, find their classes, select a subset.

Images are in a folder, a zip or a plain tar, in class folders or with a label file.  Archives are
not unpacked.  :func:`survey` reports every file that is left out.
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

# Folders that hold copies or deleted files instead of data: macOS archives, Synology thumbnails,
# the Windows recycle bin.  Names that start with a dot are hidden too.
_HIDDEN_FOLDERS = frozenset(("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"))
_TABLES_SHOWN = 3
# Standard deviations above the mean that rule out chance: Chebyshev's bound is 1 in 100.
_MAX_DEVIATIONS = 10.0


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One image: its path inside the folder or archive, and its class index if known.

    ``place`` is its position in an archive.
    """

    name: str
    label: int | None
    place: Place | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class _Origin:
    """Findings of listing and labelling, apart from the images.

    ``labels_ignored``: labels are not read.  ``partial``: the number of classes with an image if
    chance does not explain that the other classes have none, else 0.
    """

    layout: str = "no labels"
    class_names: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    labels_ignored: bool = False
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
        """Open a reader for the entries' bytes; the caller closes it."""
        return Reader(self.root, {entry.name: entry.place for entry in self.entries})


def _is_hidden(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(part.startswith(".") or part in _HIDDEN_FOLDERS for part in parts)


def _refuse_unprintable(names: Sequence[str], path: Path) -> None:
    """Refuse names that are not UTF-8: they cannot be written to a table or report."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DatasetError(
                f"{path} contains a file name that is not UTF-8: {name!a}",
                hint="rename the file",
            ) from None


def open_images(
    path: Path,
    classes: Sequence[str] = (),
    *,
    count: int | None = None,
    labelling: Labelling = Labelling(),
) -> ImageFolder:
    """List the images of a folder, a zip or a plain tar.

    Args:
        path: the folder or archive.
        classes: folder names in logit order.  An image gets its class from its folder, else from a
            label file inside or beside ``path``, else none.
        count: the number of classes where their names are unknown; the folders or the label file
            then name them.
        labelling: how labels are stored, as set by the user.

    Raises:
        DatasetError: ``path`` is missing, unreadable or without images; a folder is not a class;
            or a label file is invalid.
    """
    if not path.exists():
        raise DatasetError(f"{path} does not exist", hint="check the path")
    listing = list_files(path)
    _refuse_unprintable([file.name for file in listing.files], path)
    places = {file.name: file.place for file in listing.files}
    reader = Reader(path, places)
    try:
        names, hidden = _images(path, listing, reader)
        others = frozenset(places) - frozenset(names)
        known = Classes(len(classes) if count is None else count, tuple(classes))
        found = find_layout(Files(path, names, others, reader.read), known, labelling)
    finally:
        reader.close()
    ignored = (*listing.ignored, *(f"{name} is hidden" for name in hidden))
    left_out = _left_out(names, found, labelling)
    kept = [name for name in names if name not in left_out]
    origin = _Origin(
        layout=found.name,
        class_names=found.classes.names,
        missing=found.missing,
        repeated=found.repeated,
        ignored=ignored,
        others=_not_used(others, hidden, found),
        skipped=tuple(left_out),
        labels_ignored=labelling.layout == "none" or not known,
        partial=_partial(found),
    )
    entries = (ImageEntry(name, found.index.get(name), places[name]) for name in kept)
    return ImageFolder(path, tuple(entries), origin)


def _images(path: Path, listing: Listing, reader: Reader) -> tuple[tuple[str, ...], list[str]]:
    """The images, sorted, and the hidden files with an image's suffix.

    Raises:
        DatasetError: there are no images.
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
            f"{path} contains no images ({len(listing.files) - len(hidden)} other files)",
            hint="pass a folder, a zip or a tar of images that Pillow can read",
        )
    return tuple(images), hidden


def _is_image_inside(path: Path, reader: Reader, name: str) -> bool:
    """Whether a file without a clear suffix is an image, judged by its content."""
    if not may_be_an_image(name):
        return False
    try:
        with open(path / name, "rb") if path.is_dir() else io.BytesIO(reader.read(name)) as stream:
            if has_doubtful_suffix(name):
                return opens(stream)
            return begins_like_an_image(stream.read(HEAD_BYTES))
    except (OSError, DatasetError):  # unreadable: reported among the other files
        return False


def _left_out(names: Sequence[str], found: Layout, labelling: Labelling) -> dict[str, None]:
    """The images without a class, if the user skips them and other images have one."""
    if not labelling.skip_unlabelled or not found.index:
        return {}
    return {name: None for name in names if name not in found.index}


def _partial(found: Layout) -> int:
    """The number of classes with an image, or 0 if chance explains that others have none.

    For n images drawn from K classes, the number of classes without an image has

        mean  m = K (1 - 1/K)^n,    variance  m + K (K - 1) (1 - 2/K)^n - m^2
    """
    count, images = found.classes.count, len(found.index)
    present = len(set(found.index.values()))
    if not present or count < 2:
        return 0
    mean = count * (1 - 1 / count) ** images
    variance = mean + count * (count - 1) * (1 - 2 / count) ** images - mean**2
    limit = mean + _MAX_DEVIATIONS * math.sqrt(max(variance, 0.0))
    return present if count - present > limit else 0


def _not_used(others: Collection[str], hidden: Sequence[str], found: Layout) -> tuple[str, ...]:
    """The files that are neither images nor label files."""
    seen = {*hidden, *found.read}
    return tuple(sorted(name for name in others if name not in seen))


def with_labels(images: ImageFolder) -> ImageFolder:
    """Return the images if each has a class, or if labels are ignored.

    Raises:
        DatasetError: some images have no class.
    """
    bare = [entry.name for entry in images.entries if entry.label is None]
    if not bare or images.origin.labels_ignored:
        return images
    if len(bare) < len(images.entries):
        where = _common_folder(entry.name for entry in images.entries if entry.label is not None)
        apart = where and not any(name.startswith(where) for name in bare)
        fix = f"pass {images.root}/{where.rstrip('/')}" if apart else "label or remove them"
        raise DatasetError(
            f"{len(bare)} of {len(images.entries)} images have no class: {Few.of(bare)}",
            hint=f"{fix}, or use --skip-unlabelled",
        )
    tables = [name for name in images.origin.others if name.endswith((".csv", ".tsv", ".txt"))]
    named = " or ".join(tables[:_TABLES_SHOWN]) or "FILE"
    raise DatasetError(
        f"no labels found for the {len(bare)} images of {images.root}: there are neither class "
        "folders nor a label file",
        hint=f"pass a label file with --labels {named}, or compare only logits with --layout none",
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
    """Select ``count`` images at random by ``seed``, evenly over the classes.

    The counts of two classes differ by at most one where both have enough images.  Images without
    a class are selected evenly over their folders.

    Raises:
        DatasetError: there are fewer images.
    """
    if count > len(images.entries):
        raise DatasetError(
            f"{images.root} contains {len(images.entries)} images, {count} are needed",
            hint="use fewer images, or add some",
        )
    groups: dict[int | str, list[ImageEntry]] = defaultdict(list)
    for entry in images.entries:
        folder = entry.name.rpartition("/")[0]
        groups[folder if entry.label is None else entry.label].append(entry)
    generator = np.random.default_rng(seed)
    queues = [[group[i] for i in generator.permutation(len(group))] for group in groups.values()]
    # Round robin: one image of every class, then another, with the classes in random order.
    order = generator.permutation(len(queues))
    chosen: list[ImageEntry] = []
    for turn in range(max(map(len, queues))):
        chosen.extend(queues[i][turn] for i in order if turn < len(queues[i]))
    selected = sorted(chosen[:count], key=lambda entry: entry.name)
    return ImageFolder(images.root, tuple(selected), images.origin)
