"""Which class each image of a folder or archive has, however people laid it out.

folders    CLASS/NAME, perhaps below folders that all images share (val/CLASS/NAME)
list, devkit, solution     flat, with a label file: see :mod:`clipdeploy.imaging.labels`
none       no image has a class
auto       the first of these that is there
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, cast, get_args

from clipdeploy.imaging.label_files import Get, LabelFile, LabelKind, find_label_files, kind_of
from clipdeploy.imaging.labels import read_labels, speaks_of
from exporters.errors import DatasetError, UsageError

__all__ = ["Files", "Layout", "LayoutName", "find_layout"]

LayoutName = Literal["auto", "folders", "list", "devkit", "solution", "none"]

_SHOWN = 5


@dataclass(frozen=True)
class Files:
    """What lies in a folder or archive: images and other files by name, and how to read one."""

    root: Path
    images: tuple[str, ...]
    others: frozenset[str]
    read: Callable[[str], bytes]


@dataclass(frozen=True)
class Layout:
    """The class index of each image that has one, and what the labels say beyond that.

    ``name`` is a phrase for a report, such as ``classes from val/meta/val.txt``.
    """

    name: str
    classes: dict[str, int]
    missing: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()


_UNLABELLED = Layout("no labels", {})


def find_layout(
    files: Files,
    classes: Sequence[str],
    wanted: LayoutName = "auto",
    labels: Path | None = None,
) -> Layout:
    """The classes of the images, as indices into ``classes``; ``labels`` names a label file.

    Raises:
        DatasetError: a folder that is no class, or a label file that is missing or bad.
        UsageError: no layout is called so.
    """
    if wanted not in get_args(LayoutName):
        known = ", ".join(get_args(LayoutName))
        raise UsageError(f"no layout is called {wanted!r}", hint=f"one of {known}")
    if wanted == "none" or not classes:
        return _UNLABELLED
    prefixes = _shared_folders(files.images)
    if labels is None and wanted in ("auto", "folders"):
        prefix = _above_classes(files.images, prefixes, frozenset(classes))
        if prefix is not None:
            return _by_folder(files, prefix, classes)
    if wanted != "folders":
        names = {image[len(prefix) :]: image for prefix in prefixes for image in files.images}
        file = _label_file(files, prefixes, names, wanted, labels)
        if file is not None:
            found = read_labels(file, names, classes)
            return Layout(
                f"classes from {file.where}", found.classes, found.missing, found.repeated
            )
    if wanted not in ("auto", "folders"):
        raise DatasetError(
            f"{files.root} has no label file of the layout {wanted!r}, inside or beside it",
            hint="name one with --labels",
        )
    _refuse_unknown(files, _folders(files.images, ""), classes)
    return _UNLABELLED


def _shared_folders(images: Sequence[str]) -> list[str]:
    """The folders that all images are in: ``["", "val/"]`` for val/CLASS/NAME."""
    shared = os.path.commonpath([image.rpartition("/")[0] for image in images])
    parts = PurePosixPath(shared).parts
    return ["".join(f"{part}/" for part in parts[:depth]) for depth in range(len(parts) + 1)]


def _folders(images: Sequence[str], prefix: str) -> set[str]:
    """The folders right below ``prefix`` that hold images."""
    below = (image[len(prefix) :].partition("/") for image in images)
    return {folder for folder, slash, _ in below if slash}


def _above_classes(
    images: Sequence[str], prefixes: Sequence[str], classes: frozenset[str]
) -> str | None:
    """The first prefix with a class folder below it."""
    for prefix in prefixes:
        if _folders(images, prefix) & classes:
            return prefix
    return None


def _refuse_unknown(files: Files, folders: set[str], classes: Sequence[str]) -> None:
    unknown = sorted(folders - set(classes))
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise DatasetError(
            f"{files.root} has folders that are no class: {', '.join(unknown[:_SHOWN])}{more}",
            hint=f"the model's {len(classes)} classes are {', '.join(classes[:2])}, ...",
        )


def _by_folder(files: Files, prefix: str, classes: Sequence[str]) -> Layout:
    _refuse_unknown(files, _folders(files.images, prefix), classes)
    index = {name: position for position, name in enumerate(classes)}
    found = {}
    for image in files.images:
        folder, slash, _ = image[len(prefix) :].partition("/")
        if slash:
            found[image] = index[folder]
    return Layout(f"class folders in {files.root}/{prefix}".rstrip("/"), found)


def _label_file(
    files: Files,
    prefixes: Sequence[str],
    names: Mapping[str, str],
    wanted: LayoutName,
    labels: Path | None,
) -> LabelFile | None:
    """The label file that the user named, else the first one at a usual place."""
    if labels is not None:
        kind = kind_of(labels) if wanted == "auto" else cast(LabelKind, wanted)
        data = _beside(labels)(labels.name)
        if data is None:
            raise DatasetError(f"there is no label file {labels}", hint="check the path")
        candidates = iter([LabelFile(kind, str(labels), data, _beside(labels))])
    else:
        candidates = find_label_files(
            _inside(files, prefixes), _beside(files.root), str(files.root)
        )
    for file in candidates:
        if wanted not in ("auto", file.kind):
            continue
        if speaks_of(file, names):
            return file
        # A file beside the folder may be of other images; one inside it, or a named one, may not.
        if not file.beside:
            raise DatasetError(
                f"{file.where} lists none of the {len(files.images)} images",
                hint="give the folder that its names are relative to",
            )
    return None


def _inside(files: Files, prefixes: Sequence[str]) -> Get:
    def get(name: str) -> bytes | None:
        for prefix in prefixes:
            if prefix + name in files.others:
                return files.read(prefix + name)
        return None

    return get


def _beside(path: Path) -> Get:
    folder = Path(os.path.abspath(path)).parent

    def get(name: str) -> bytes | None:
        try:
            return (folder / name).read_bytes() if (folder / name).is_file() else None
        except OSError as error:
            raise DatasetError(f"cannot read {folder / name}: {error.strerror}") from error

    return get
