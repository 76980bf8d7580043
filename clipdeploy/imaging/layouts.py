"""Find the class of each image from the layout of a folder or archive.

folders    CLASS/NAME, also below folders that all images share (val/CLASS/NAME); see
           :mod:`clipdeploy.imaging.folders`
list, devkit, solution     a flat folder with a label file; see :mod:`clipdeploy.imaging.labels`
none       labels are not read
auto       the first of these that applies
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
from clipdeploy.imaging.folders import ClassFolders, class_folders, spelled_folders
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
    """The images and other files of a folder or archive by name; ``read`` returns one's bytes."""

    root: Path
    images: tuple[str, ...]
    others: frozenset[str]
    read: Callable[[str], bytes]


@dataclass(frozen=True)
class Labelling:
    """How the images' labels are stored.

    Args:
        layout: ``folders``, ``list``, ``devkit``, ``solution``, ``none`` or ``auto``.
        labels: a label file.
        first_class: the number of the first class where classes are numbers; None detects it.
        skip_unlabelled: leave out images without a class instead of raising an error.
        class_names: a file of class names for a checkpoint that has none, see
            :func:`clipdeploy.imaging.classes.read_class_names`.

    Raises:
        UsageError: an unknown layout, or two options that exclude each other.
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
            raise UsageError(f"unknown layout {self.layout!r}", hint=f"use one of {known}")
        if self.labels is not None and self.layout in ("folders", "none"):
            raise UsageError(
                f"--labels cannot be used with --layout {self.layout}, which reads no label file",
                hint="remove one of the two options",
            )
        if self.first_class not in (None, 0, 1):
            raise UsageError(
                f"the first class cannot be {self.first_class}",
                hint="use --first-class 0 or --first-class 1",
            )
        if self.layout == "none" and (self.first_class is not None or self.skip_unlabelled):
            raise UsageError(
                "--layout none reads no labels",
                hint="remove --first-class and --skip-unlabelled",
            )


@dataclass(frozen=True)
class Layout:
    """The class index of each labelled image, and other findings about the labels.

    ``name`` is a phrase for reports, such as ``classes from val/meta/val.txt``.  ``classes``
    includes the names from folders or labels if they were unknown before.  ``missing`` are listed
    images without a file, ``repeated`` a sentence for each image that is listed twice, ``read`` the
    label files among the images.
    """

    name: str
    index: dict[str, int]
    classes: Classes
    missing: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    read: tuple[str, ...] = ()


def find_layout(files: Files, classes: Classes, labelling: Labelling = Labelling()) -> Layout:
    """Find the images' classes.

    Raises:
        DatasetError: a folder is not a class, or a label file is missing or invalid.
    """
    if labelling.layout == "none" or not classes:
        return Layout("no labels", {}, classes)
    prefixes = _shared_folders(files.images)
    unclear: DatasetError | None = None
    if labelling.labels is None and labelling.layout in ("auto", "folders"):
        try:
            if found := _by_folder(files, prefixes, classes, labelling):
                return found
        except DatasetError as error:
            # Without class names, folders may be something else than classes.
            if classes.names or labelling.layout == "folders":
                raise
            unclear = error
    if labelling.layout != "folders":
        paths = {image[len(prefix) :]: image for prefix in prefixes for image in files.images}
        names = Names(paths)
        file = _label_file(files, prefixes, names, labelling)
        if file is not None:
            labels = read_labels(file, names, classes, labelling.first_class)
            return Layout(
                f"classes from {file.where}",
                labels.index,
                labels.classes,
                labels.missing,
                labels.repeated,
                tuple(name for name in files.others if is_label_file(name)),
            )
    if labelling.layout not in ("auto", "folders"):
        raise DatasetError(
            f"no label file of layout {labelling.layout!r} was found in or beside {files.root}",
            hint="pass one with --labels",
        )
    if unclear is not None:
        raise unclear
    _refuse_parts(files, classes)
    if labelling.layout == "folders" or not labelling.skip_unlabelled:
        _refuse_unknown(files, _folders(files.images, ""), classes)
    return Layout("no labels", {}, classes)


def _shared_folders(images: Sequence[str]) -> list[str]:
    """The folders that contain all images: ``["", "val/"]`` for val/CLASS/NAME."""
    shared = os.path.commonpath([image.rpartition("/")[0] for image in images])
    parts = PurePosixPath(shared).parts
    return ["".join(f"{part}/" for part in parts[:depth]) for depth in range(len(parts) + 1)]


def _folders(images: Sequence[str], prefix: str) -> set[str]:
    """The folders directly below ``prefix`` that contain images."""
    below = (image[len(prefix) :].partition("/") for image in images)
    return {folder for folder, slash, _ in below if slash}


def _by_folder(
    files: Files, prefixes: Sequence[str], classes: Classes, labelling: Labelling
) -> Layout | None:
    """Classes from the folders below the first prefix that has any.

    Other spellings count only below the last one: a folder of all images may be called anything.
    """
    first = labelling.first_class
    for prefix in prefixes if classes.names else prefixes[-1:]:
        where = f"{files.root}/{prefix}".rstrip("/")
        folders = sorted(_folders(files.images, prefix))
        if not folders:
            continue
        found = class_folders(folders, classes, first, where)
        misfit = found is None or (found.others and not found.how)
        if misfit and first is None and prefix == prefixes[-1]:
            found = spelled_folders(folders, classes, where) or found
        if found is None:
            continue
        if not labelling.skip_unlabelled:
            _refuse_unknown(files, found.others, found.classes, found.index.values())
        name = f"class folders in {where}" + (f" ({found.how})" if found.how else "")
        return Layout(name, _classes_of(files, prefix, found), found.classes)
    return None


def _classes_of(files: Files, prefix: str, found: ClassFolders) -> dict[str, int]:
    index = {}
    for image in files.images:
        folder, slash, _ = image[len(prefix) :].partition("/")
        if slash and folder in found.index:
            index[image] = found.index[folder]
    return index


def _refuse_parts(files: Files, classes: Classes) -> None:
    """Refuse a folder of several image sets, such as train/ and val/."""
    inside: dict[str, None] = {}
    for image in files.images:
        *above, folder, _ = ("", "", *PurePosixPath(image).parts)
        if classes.find(folder) is not None:
            inside["/".join(part for part in above if part)] = None
        elif official_number(image):
            inside["/".join(part for part in (*above, folder) if part)] = None
    sets = [folder for folder in inside if folder]
    if sets:
        shown = ", ".join(sets[:_SHOWN]) + (", ..." if len(sets) > _SHOWN else "")
        raise DatasetError(
            f"{files.root} contains several sets of images: {shown}",
            hint=f"pass one of them: {files.root}/{sets[0]}",
        )


def _refuse_unknown(
    files: Files, folders: Collection[str], classes: Classes, matched: Collection[int] = ()
) -> None:
    unknown = sorted(folders)
    if not unknown:
        return
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    known = classes.examples() if classes.names else f"the model has {classes.count} classes"
    shown = ", ".join(_with_nearest(each, classes) for each in unknown[:_SHOWN])
    left = sorted(set(range(len(classes.names))) - set(matched)) if matched else []
    missing = ", ".join(classes.names[each] for each in left[:_SHOWN])
    rest = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    without = f"; classes without a folder: {missing}{rest}" if left else ""
    raise DatasetError(
        f"{files.root} has folders that are not classes: {shown}{more}{without}",
        hint=f"{known}; if it has other classes, export again with --class-names FILE, "
        "or leave the images out with --skip-unlabelled",
    )


def _with_nearest(folder: str, classes: Classes) -> str:
    near = classes.nearest(folder)
    return f"{folder} (nearest: {near})" if near else folder


def _label_file(
    files: Files, prefixes: Sequence[str], names: Names, labelling: Labelling
) -> LabelFile | None:
    """The label file that the user passed, else the first one at a usual place."""
    wanted = labelling.layout
    if labelling.labels is not None:
        kind = kind_of(labelling.labels) if wanted == "auto" else cast(LabelKind, wanted)
        data = read_regular(labelling.labels)
        candidates = iter([LabelFile(kind, str(labelling.labels), data, _beside(labelling.labels))])
    else:
        inside, beside = _inside(files, prefixes), _beside(files.root)
        candidates = find_label_files(inside, beside, str(files.root))
    for file in candidates:
        if wanted not in ("auto", file.kind):
            continue
        if lists_any(file, names):
            return file
        # A label file beside the folder may belong to other images.
        if not file.beside:
            raise DatasetError(
                f"{file.where} lists none of the {len(files.images)} images",
                hint="pass the folder that its names are relative to",
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
