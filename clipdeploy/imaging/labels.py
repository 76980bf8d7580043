"""The classes of images that lie in one flat folder, from the label files that people have.

    list       val.txt, meta/val.txt                      NAME CLASS, 0-based (mmpretrain, Caffe)
    devkit     ILSVRC2012_validation_ground_truth.txt     a 1-based ILSVRC2012_ID for each image
    solution   LOC_val_solution.csv                       ImageId,PredictionString (Kaggle)

The devkit's line n belongs to ILSVRC2012_val_{n:08d}.  Its IDs are in an order of their own, not
that of the wnids: only the devkit's data/meta.mat (field WNID of ``synsets``) maps them, and
nothing is guessed without it.  Sources: readme.txt of ILSVRC2012_devkit_t12; mmpretrain 1.2
``datasets/imagenet.py``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from clipdeploy.imaging.label_files import Faults, LabelFile
from exporters.errors import DatasetError

__all__ = ["Labels", "read_labels", "speaks_of"]

_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})", re.ASCII)
# (line, name, class)
Listed = list[tuple[int, str, int]]


@dataclass(frozen=True)
class Labels:
    """Class of each image by its name; ``missing`` are listed but not there.

    ``repeated``: a sentence for each name that is listed twice, with the same class.
    """

    classes: dict[str, int]
    missing: tuple[str, ...]
    repeated: tuple[str, ...] = ()


def speaks_of(file: LabelFile, names: Mapping[str, str]) -> bool:
    """Whether the file lists any of these images; ``names`` as in :func:`read_labels`."""
    if file.kind == "devkit":
        return not file.beside or any(map(_number, names))
    try:
        lines = file.lines()
    except DatasetError:
        if file.beside:
            return False
        raise
    if file.kind == "list":
        return any(_as_name(" ".join(line.strip().rsplit(None, 1)[:1])) in names for line in lines)
    stems = {PurePosixPath(name).stem for name in names}
    return any(line.partition(",")[0] in stems for line in lines)


def read_labels(file: LabelFile, names: Mapping[str, str], classes: Sequence[str]) -> Labels:
    """The class indices of images.

    ``names`` maps what an image may be called in the file to what it is called in the folder:
    ``{"x.png": "val/x.png", "val/x.png": "val/x.png"}``.

    Raises:
        DatasetError: a line that is empty, has no class, or one that does not exist; a name with
            two classes; a devkit without its ``meta.mat``.
    """
    if file.kind == "devkit":
        return _devkit(file, sorted(set(names.values())), classes)
    if file.kind == "list":
        listed, repeated = _unique(file, _read_list(file, classes))
        there = names
    else:
        listed, repeated = _unique(file, _read_solution(file, classes))
        there = {PurePosixPath(name).stem: image for name, image in names.items()}
    found = {there[key]: label for key, label in listed.items() if key in there}
    return Labels(found, tuple(key for key in listed if key not in there), repeated)


def _class_fault(text: str, count: int) -> str:
    """What is wrong with a class index, empty if nothing is."""
    if not re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
        return f"{text!r} is no class number"
    if text.startswith("-"):
        return f"class {text} is negative"
    if int(text) >= count:
        return f"class {text} is too large, the model has {count} classes from 0 on"
    return ""


def _read_list(file: LabelFile, classes: Sequence[str]) -> Listed:
    listed: Listed = []
    faults = Faults(file.where)
    for line, text in enumerate(file.lines(), 1):
        parts = text.strip().rsplit(None, 1)
        if len(parts) != 2:
            faults.add(line, "the line is empty" if not parts else f"{parts[0]!r} has no class")
        elif fault := _class_fault(parts[1], len(classes)):
            faults.add(line, fault)
        else:
            listed.append((line, _as_name(parts[0]), int(parts[1])))
    faults.refuse("each line is NAME CLASS, classes from 0 on in logit order")
    return listed


def _read_solution(file: LabelFile, classes: Sequence[str]) -> Listed:
    index = {name: position for position, name in enumerate(classes)}
    listed: Listed = []
    faults = Faults(file.where)
    for line, text in enumerate(file.lines(), 1):
        image, _, prediction = text.partition(",")
        # "n01751748 111 108 230 366 ...": the class and a box, for each object of that class.
        name = prediction.strip().partition(" ")[0]
        if name in index:
            listed.append((line, image, index[name]))
        elif line > 1 or image != "ImageId":
            faults.add(line, f"{name!r} is no class of the model" if name else "it has no class")
    faults.refuse("each line is IMAGE,CLASS x y x y")
    return listed


def _unique(file: LabelFile, listed: Listed) -> tuple[dict[str, int], tuple[str, ...]]:
    first: dict[str, tuple[int, int]] = {}
    faults = Faults(file.where)
    repeated = []
    for line, name, label in listed:
        if name not in first:
            first[name] = (line, label)
        elif first[name][1] == label:
            repeated.append(f"{file.where} lists {name} in lines {first[name][0]} and {line}")
        else:
            before = "has class {1} in line {0}".format(*first[name])
            faults.add(line, f"{name} has class {label}, it {before}")
    faults.refuse("keep one line for each image")
    return {name: label for name, (_, label) in first.items()}, tuple(repeated)


def _devkit(file: LabelFile, names: Sequence[str], classes: Sequence[str]) -> Labels:
    truth = _devkit_classes(file, _read_ids(file), classes)
    numbered = {number: name for name in names if (number := _number(name))}
    if not numbered and len(names) != len(truth):
        raise DatasetError(
            f"{file.where} has {len(truth)} lines for {len(names)} images",
            hint="name the images ILSVRC2012_val_00000001.JPEG ..., or give all of them",
        )
    by_number = numbered or dict(enumerate(names, 1))
    found = {name: truth[n - 1] for n, name in by_number.items() if n <= len(truth)}
    absent = (n for n in range(1, len(truth) + 1) if n not in by_number)
    return Labels(found, tuple(f"ILSVRC2012_val_{n:08d}" for n in absent))


def _number(name: str) -> int:
    """The number in an image's official name, 0 if it has another name."""
    match = _NUMBERED.fullmatch(PurePosixPath(name).stem)
    return int(match[1]) if match else 0


def _as_name(text: str) -> str:
    """A listed name without ``./``."""
    return PurePosixPath(text).as_posix()


def _devkit_classes(file: LabelFile, ids: Mapping[int, str], classes: Sequence[str]) -> list[int]:
    """The class index of each line."""
    index = {name: position for position, name in enumerate(classes)}
    truth = []
    faults = Faults(file.where)
    for line, text in enumerate(file.lines(), 1):
        text = text.strip()
        name = ids.get(int(text)) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else None
        if name in index:
            truth.append(index[name])
        else:
            faults.add(line, f"ID {text} is no class of the model" if text else "the line is empty")
    faults.refuse("each line is the ILSVRC2012_ID of one image, from 1 on")
    return truth


def _read_ids(file: LabelFile) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid, from the ``meta.mat`` beside the ground truth."""
    data = file.sibling("meta.mat")
    if data is None:
        raise DatasetError(
            f"{file.where} holds ILSVRC2012 IDs, and no meta.mat lies beside it to map them",
            hint="copy data/meta.mat of ILSVRC2012_devkit_t12 there, or use val.txt",
        )
    try:
        from scipy.io import loadmat  # type: ignore[import-untyped]
    except ImportError as error:
        raise DatasetError(
            "meta.mat of the devkit is read with scipy, which is not installed",
            hint="pip install scipy, or use val.txt",
        ) from error
    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except Exception as error:  # scipy raises whatever the damage leads it to
        raise DatasetError(
            f"meta.mat beside {file.where} cannot be read: {error}",
            hint="copy data/meta.mat of ILSVRC2012_devkit_t12 again",
        ) from error
