"""Which class each image of a folder or archive has, however people laid it out.

folders    CLASS/NAME, perhaps below folders that all images share (val/CLASS/NAME), see
           :mod:`clipdeploy.imaging.folders`
list, devkit, solution     flat, with a label file: see :mod:`clipdeploy.imaging.labels`
none       no image has a class
auto       the first of these that is there
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, cast, get_args

from clipdeploy.core.errors import DatasetError, UsageError
from clipdeploy.core.files import read_regular
from clipdeploy.core.paths import convert_paths
from clipdeploy.imaging.classes import Classes
from clipdeploy.imaging.devkit import official_number
from clipdeploy.imaging.folders import ClassFolders, class_folders
from clipdeploy.imaging.label_files import (
    Get,
    LabelFile,
    LabelKind,
    find_label_files,
    is_label_file,
    kind_of,
)
from clipdeploy.imaging.labels import Names, lists_any, read_labels

__all__ = ["Files", "Labelling", "Layout", "LayoutName", "find_layout"]

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
class Labelling:
    """What the user says about the images' classes.

    ``labels`` is a label file.  ``first`` is the number of the first class where classes are
    numbers, None to find it out.  ``skip_unlabelled`` leaves images without a class out, instead
    of refusing a folder that is no class.  ``class_names`` is a file that names the classes where
    the checkpoint does not, see :func:`clipdeploy.imaging.classes.read_class_names`.

    Raises:
        UsageError: no layout is called so, or two things that exclude each other.
    """

    layout: LayoutName = "auto"
    labels: Path | None = None
    first_class: Literal[0, 1] | None = None
    skip_unlabelled: bool = False
    class_names: Path | None = None

    def __post_init__(self) -> None:
        convert_paths(self, "labels", "class_names")
        if self.layout not in get_args(LayoutName):
            known = ", ".join(get_args(LayoutName))
            raise UsageError(f"no layout is called {self.layout!r}", hint=f"one of {known}")
        if self.labels is not None and self.layout in ("folders", "none"):
            raise UsageError(
                f"--labels with --layout {self.layout}: no label file is read there",
                hint="leave out one of them",
            )
        if self.first_class not in (None, 0, 1):
            raise UsageError(
                f"the first class cannot be {self.first_class}", hint="--first-class 0 or 1"
            )
        if self.layout == "none" and (self.first_class is not None or self.skip_unlabelled):
            raise UsageError(
                "--layout none reads no classes", hint="leave out --first-class, --skip-unlabelled"
            )


@dataclass(frozen=True)
class Layout:
    """The class index of each image that has one, and what the labels say beyond that.

    ``name`` is a phrase for a report, such as ``classes from val/meta/val.txt``.  ``classes`` have
    the names that folders or labels gave where they were unknown.  ``read`` are the label files
    among the images.
    """

    name: str
    index: dict[str, int]
    classes: Classes
    missing: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    read: tuple[str, ...] = ()


def find_layout(files: Files, classes: Classes, asked: Labelling = Labelling()) -> Layout:
    """The classes of the images.

    Raises:
        DatasetError: a folder that is no class, or a label file that is missing or bad.
    """
    if asked.layout == "none" or not classes:
        return Layout("no labels", {}, classes)
    prefixes = _shared_folders(files.images)
    unclear: DatasetError | None = None
    if asked.labels is None and asked.layout in ("auto", "folders"):
        try:
            if found := _by_folder(files, prefixes, classes, asked):
                return found
        except DatasetError as error:
            # Where names are unknown, folders may be no classes at all.
            if classes.names or asked.layout == "folders":
                raise
            unclear = error
    if asked.layout != "folders":
        paths = {image[len(prefix) :]: image for prefix in prefixes for image in files.images}
        names = Names(paths)
        file = _label_file(files, prefixes, names, asked)
        if file is not None:
            labels = read_labels(file, names, classes, asked.first_class)
            return Layout(
                f"classes from {file.where}",
                labels.index,
                labels.classes,
                labels.missing,
                labels.repeated,
                tuple(name for name in files.others if is_label_file(name)),
            )
    if asked.layout not in ("auto", "folders"):
        raise DatasetError(
            f"{files.root} has no label file of the layout {asked.layout!r}, inside or beside it",
            hint="name one with --labels",
        )
    if unclear is not None:
        raise unclear
    _refuse_parts(files, classes)
    if asked.layout == "folders" or not asked.skip_unlabelled:
        _refuse_unknown(files, _folders(files.images, ""), classes)
    return Layout("no labels", {}, classes)


def _shared_folders(images: Sequence[str]) -> list[str]:
    """The folders that all images are in: ``["", "val/"]`` for val/CLASS/NAME."""
    shared = os.path.commonpath([image.rpartition("/")[0] for image in images])
    parts = PurePosixPath(shared).parts
    return ["".join(f"{part}/" for part in parts[:depth]) for depth in range(len(parts) + 1)]


def _folders(images: Sequence[str], prefix: str) -> set[str]:
    """The folders right below ``prefix`` that hold images."""
    below = (image[len(prefix) :].partition("/") for image in images)
    return {folder for folder, slash, _ in below if slash}


def _by_folder(
    files: Files, prefixes: Sequence[str], classes: Classes, asked: Labelling
) -> Layout | None:
    """Classes from the folders below the first prefix that has any."""
    for prefix in prefixes if classes.names else prefixes[-1:]:
        where = f"{files.root}/{prefix}".rstrip("/")
        folders = sorted(_folders(files.images, prefix))
        found = class_folders(folders, classes, asked.first_class, where) if folders else None
        if found is None:
            continue
        if not asked.skip_unlabelled:
            _refuse_unknown(files, found.others, found.classes)
        return Layout(_told(where, found), _classes_of(files, prefix, found), found.classes)
    return None


def _told(where: str, found: ClassFolders) -> str:
    return f"class folders in {where}" + (f" ({found.how})" if found.how else "")


def _classes_of(files: Files, prefix: str, found: ClassFolders) -> dict[str, int]:
    index = {}
    for image in files.images:
        folder, slash, _ = image[len(prefix) :].partition("/")
        if slash and folder in found.index:
            index[image] = found.index[folder]
    return index


def _refuse_parts(files: Files, classes: Classes) -> None:
    """Folders such as train/ and val/ are sets of images of their own."""
    inside: dict[str, None] = {}
    for image in files.images:
        *above, folder, _ = ("", "", *PurePosixPath(image).parts)
        if folder in classes.index:
            inside["/".join(part for part in above if part)] = None
        elif official_number(image):
            inside["/".join(part for part in (*above, folder) if part)] = None
    sets = [folder for folder in inside if folder]
    if sets:
        shown = ", ".join(sets[:_SHOWN]) + (", ..." if len(sets) > _SHOWN else "")
        raise DatasetError(
            f"{files.root} holds sets of images in folders of their own: {shown}",
            hint=f"give one of them: {files.root}/{sets[0]}",
        )


def _refuse_unknown(files: Files, folders: Collection[str], classes: Classes) -> None:
    unknown = sorted(folders)
    if not unknown:
        return
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    known = classes.examples() if classes.names else f"the model has {classes.count} classes"
    raise DatasetError(
        f"{files.root} has folders that are no class: {', '.join(unknown[:_SHOWN])}{more}",
        hint=f"{known}; if it has others, export again with --class-names FILE, "
        "or leave such images out with --skip-unlabelled",
    )


def _label_file(
    files: Files, prefixes: Sequence[str], names: Names, asked: Labelling
) -> LabelFile | None:
    """The label file that the user named, else the first one at a usual place."""
    wanted = asked.layout
    if asked.labels is not None:
        kind = kind_of(asked.labels) if wanted == "auto" else cast(LabelKind, wanted)
        data = read_regular(asked.labels)
        candidates = iter([LabelFile(kind, str(asked.labels), data, _beside(asked.labels))])
    else:
        inside, beside = _inside(files, prefixes), _beside(files.root)
        candidates = find_label_files(inside, beside, str(files.root))
    for file in candidates:
        if wanted not in ("auto", file.kind):
            continue
        if lists_any(file, names):
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
        path = folder / name
        return read_regular(path) if path.is_file() else None

    return get
