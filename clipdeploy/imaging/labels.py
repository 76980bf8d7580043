"""Read the classes of a flat folder's images from a label file.

    list       val.txt, meta/val.txt          NAME CLASS (mmpretrain, Caffe)
    solution   LOC_val_solution.csv, *.csv    an image column and a class column, with or without a
                                              header, quoted or not (Kaggle and others)
    devkit     ILSVRC2012_validation_ground_truth.txt: see :mod:`clipdeploy.imaging.devkit`

A class is given by its name, or by its number in logit order, counted from 0 unless the file or the
user sets it to 1.  An image is given by its path, by its file name if that is unique, or by its
unique file name without the suffix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

from clipdeploy.core.errors import DatasetError
from clipdeploy.imaging.classes import Classes
from clipdeploy.imaging.devkit import official_number, read_devkit
from clipdeploy.imaging.folders import first_of
from clipdeploy.imaging.label_files import Faults, LabelFile, Labels
from clipdeploy.imaging.label_rows import Row, label_rows

__all__ = ["Names", "lists_any", "read_labels"]

_NUMBER = re.compile(r"-?\d{1,9}", re.ASCII)


@dataclass(frozen=True)
class Names:
    """The names that a label file may use for the images.

    ``paths`` maps each of them to the image's path in the folder or archive:
    ``{"x.png": "val/x.png", "val/x.png": "val/x.png"}``.
    """

    paths: Mapping[str, str]

    @cached_property
    def _short(self) -> dict[str, str]:
        """File names, with and without suffix -> the image, or "" if several have the name."""
        short: dict[str, str] = {}
        for image in dict.fromkeys(self.paths.values()):
            path = PurePosixPath(image)
            for name in {path.name, path.stem}:
                short[name] = "" if short.get(name, image) != image else image
        return short

    @property
    def images(self) -> list[str]:
        """All images, sorted."""
        return sorted(set(self.paths.values()))

    def find(self, text: str) -> str | None:
        """The image with this name: None if there is none, "" if there are several."""
        name = PurePosixPath(text.replace("\\", "/")).as_posix()
        return self.paths.get(name) or self._short.get(name)


def lists_any(file: LabelFile, names: Names) -> bool:
    """Whether the label file lists any of these images."""
    if file.kind == "devkit":
        return not file.beside or any(map(official_number, names.paths))
    try:
        return any(names.find(row.image) is not None for row in label_rows(file, names.find))
    except DatasetError:
        if file.beside:
            return False
        raise


def read_labels(
    file: LabelFile, names: Names, classes: Classes, first: int | None = None
) -> Labels:
    """Read the class index of each image.

    ``first`` is the number of the first class where classes are numbers.  None detects it: 1 if the
    file has every number from 1 to the count of classes and no 0, else 0.

    Raises:
        DatasetError: a line is empty or has no valid class, an image has two classes, a name fits
            several images, or the ``meta.mat`` of a devkit is missing.
    """
    if file.kind == "devkit":
        if first is not None:
            raise DatasetError(
                f"{file.where} contains devkit IDs, which are not class numbers",
                hint="remove --first-class",
            )
        return read_devkit(file, names.images, classes)
    rows = label_rows(file, names.find)
    classes, index = _indices(file, rows, classes, first)
    listed, repeated = _unique(file, rows, index)
    faults = Faults(file.where)
    found: dict[str, int] = {}
    missing = []
    for line, name, label in listed:
        image = names.find(name)
        if image == "":
            faults.add(line, f"several images are named {name}")
        elif image is None:
            missing.append(name)
        elif found.setdefault(image, label) != label:
            faults.add(line, f"{image} has two classes")
    faults.raise_any("name each image by its path below the folder")
    return Labels(found, tuple(missing), repeated, classes)


def _indices(
    file: LabelFile, rows: Sequence[Row], classes: Classes, first: int | None
) -> tuple[Classes, dict[str, int]]:
    """The classes with their names, and the index of each class in the rows."""
    texts = dict.fromkeys(row.label for row in rows)
    numbers = {text: int(text) for text in texts if _NUMBER.fullmatch(text)}
    if not classes.names and set(texts) - set(numbers):
        classes = _named_by(file, texts, classes.count)
    base = first
    if base is None:
        only = not set(texts) - set(numbers)
        base = (first_of(set(numbers.values()), classes.count) or 0) if only else 0
    elif not numbers:
        raise DatasetError(
            f"the classes in {file.where} are not numbers", hint="remove --first-class"
        )
    index: dict[str, int] = {}
    faults = Faults(file.where)
    for row in rows:
        by_name, number = classes.find(row.label), numbers.get(row.label)
        if number is None and by_name is not None:
            index[row.label] = by_name
        elif number is None or not 0 <= number - base < classes.count:
            faults.add(row.line, _class_fault(row.label, classes, base))
        elif first is None and by_name is not None and by_name != number - base:
            faults.add(row.line, f"{row.label} is both a number and the name of class {by_name}")
        else:
            index[row.label] = number - base
    faults.raise_any(
        "give each class by its name or its number in logit order; if the numbers start at 1, use "
        "--first-class 1"
    )
    if not classes.names:
        classes = Classes(classes.count, tuple(str(base + i) for i in range(classes.count)))
    return classes, index


def _named_by(file: LabelFile, texts: Iterable[str], count: int) -> Classes:
    names = tuple(sorted(text for text in texts if text))
    if len(names) != count:
        raise DatasetError(
            f"{file.where} names {len(names)} classes, but the model has {count} unnamed ones",
            hint="pass their names in logit order: --class-names FILE",
        )
    return Classes(count, names)


def _class_fault(text: str, classes: Classes, first: int) -> str:
    """Describe why ``text`` is neither a class name nor a valid class number."""
    if not _NUMBER.fullmatch(text):
        return f"{text!r} is not a class of the model" if text else "it has no class"
    number = int(text)
    if number < 0:
        return f"class {text} is negative"
    size = "too small" if number < first else "too large"
    return f"class {text} is {size}: the model has {classes.count} classes, counted from {first}"


def _unique(
    file: LabelFile, rows: Sequence[Row], index: Mapping[str, int]
) -> tuple[list[tuple[int, str, int]], tuple[str, ...]]:
    """(line, image, class) of each image, and a sentence for each repeated line."""
    first: dict[str, tuple[int, int]] = {}
    faults = Faults(file.where)
    repeated = []
    for row in rows:
        label = index[row.label]
        if row.image not in first:
            first[row.image] = (row.line, label)
        elif first[row.image][1] == label:
            before = first[row.image][0]
            repeated.append(f"{file.where} lists {row.image} in lines {before} and {row.line}")
        else:
            before, other = first[row.image]
            faults.add(
                row.line, f"{row.image} has class {label}, but class {other} in line {before}"
            )
    faults.raise_any("keep one line for each image")
    return [(line, image, label) for image, (line, label) in first.items()], tuple(repeated)
