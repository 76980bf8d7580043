"""The classes of images that lie in one flat folder, from the label files that people have.

    list       val.txt, meta/val.txt          NAME CLASS (mmpretrain, Caffe)
    solution   LOC_val_solution.csv, *.csv    a column of images and one of classes, with or without
                                              a header, quoted or not: Kaggle's and others'
    devkit     ILSVRC2012_validation_ground_truth.txt: see :mod:`clipdeploy.imaging.devkit`

A class is a class's name, or its number in logit order, from 0 on unless the file or the user says
otherwise.  An image is called by its path, by its file's name if no other image has the same, or by
that without its suffix.
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
    """What the images may be called in a label file.

    ``paths`` maps it to what an image is called in the folder or archive:
    ``{"x.png": "val/x.png", "val/x.png": "val/x.png"}``.
    """

    paths: Mapping[str, str]

    @cached_property
    def _short(self) -> dict[str, str]:
        """File names, and those without their suffix, that only one image has; "" for others."""
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
        """The image that is called so; None if none is, and "" if several are."""
        name = PurePosixPath(text.replace("\\", "/")).as_posix()
        return self.paths.get(name) or self._short.get(name)


def lists_any(file: LabelFile, names: Names) -> bool:
    """Whether the file lists any of these images."""
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
    """The class indices of images.

    ``first`` is the number of the first class where classes are numbers; None: 0, unless the file
    has each number from 1 to that of the classes and no 0.

    Raises:
        DatasetError: a line that is empty, has no class, or one that does not exist; a name with
            two classes or of two images; a devkit without its ``meta.mat``.
    """
    if file.kind == "devkit":
        if first is not None:
            raise DatasetError(
                f"{file.where} has IDs of the devkit, which have an order of their own",
                hint="leave out --first-class",
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
            faults.add(line, f"{name} is the name of several images")
        elif image is None:
            missing.append(name)
        elif found.setdefault(image, label) != label:
            faults.add(line, f"{image} has two classes")
    faults.refuse("name each image by its path below the folder")
    return Labels(found, tuple(missing), repeated, classes)


def _indices(
    file: LabelFile, rows: Sequence[Row], classes: Classes, first: int | None
) -> tuple[Classes, dict[str, int]]:
    """The classes with their names, and the index of each class that the rows mention."""
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
            f"{file.where} has classes that are no numbers", hint="leave out --first-class"
        )
    index: dict[str, int] = {}
    faults = Faults(file.where)
    for row in rows:
        by_name, number = classes.index.get(row.label), numbers.get(row.label)
        if number is None and by_name is not None:
            index[row.label] = by_name
        elif number is None or not 0 <= number - base < classes.count:
            faults.add(row.line, _class_fault(row.label, classes, base))
        elif first is None and by_name is not None and by_name != number - base:
            faults.add(row.line, f"{row.label} is the name of class {by_name}, and a number")
        else:
            index[row.label] = number - base
    faults.refuse(
        "a class is a name, or its number in logit order; where the first one is 1: --first-class 1"
    )
    if not classes.names:
        classes = Classes(classes.count, tuple(str(base + i) for i in range(classes.count)))
    return classes, index


def _named_by(file: LabelFile, texts: Iterable[str], count: int) -> Classes:
    names = tuple(sorted(text for text in texts if text))
    if len(names) != count:
        raise DatasetError(
            f"{file.where} names {len(names)} classes, the model has {count} without names",
            hint="name them in the order of the logits: --class-names FILE",
        )
    return Classes(count, names)


def _class_fault(text: str, classes: Classes, first: int) -> str:
    """What is wrong with a class that is neither a name nor one of the numbers."""
    if not _NUMBER.fullmatch(text):
        return f"{text!r} is no class of the model" if text else "it has no class"
    number = int(text)
    if number < 0:
        return f"class {text} is negative"
    size = "too small" if number < first else "too large"
    return f"class {text} is {size}, the model has {classes.count} classes from {first} on"


def _unique(
    file: LabelFile, rows: Sequence[Row], index: Mapping[str, int]
) -> tuple[list[tuple[int, str, int]], tuple[str, ...]]:
    """(line, image, class) of each image, and a sentence for each that is listed again."""
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
                row.line, f"{row.image} has class {label}, it has class {other} in line {before}"
            )
    faults.refuse("keep one line for each image")
    return [(line, image, label) for image, (line, label) in first.items()], tuple(repeated)
