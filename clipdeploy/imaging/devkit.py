"""Read the classes of ImageNet's validation images from the development kit.

Line n of ``ILSVRC2012_validation_ground_truth.txt`` is the 1-based ILSVRC2012_ID of
ILSVRC2012_val_{n:08d}.  The IDs are not in the order of the wnids; only the kit's data/meta.mat
(field WNID of ``synsets``) maps one to the other, so it is required.
Sources: readme.txt of ILSVRC2012_devkit_t12; mmpretrain 1.2 ``datasets/imagenet.py``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from clipdeploy.core.errors import DatasetError
from clipdeploy.imaging.classes import Classes
from clipdeploy.imaging.label_files import Faults, LabelFile, Labels

__all__ = ["official_number", "read_devkit"]

_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})", re.ASCII)


def official_number(name: str) -> int:
    """The number in an official image name, 0 for other names."""
    match = _NUMBERED.fullmatch(PurePosixPath(name).stem)
    return int(match[1]) if match else 0


def read_devkit(file: LabelFile, names: Sequence[str], classes: Classes) -> Labels:
    """Read the classes of the images ``names`` by the number in each name, else by their order.

    Raises:
        DatasetError: an ID is not a class, ``meta.mat`` is missing or invalid, or the counts of
            lines and unnumbered images differ.
    """
    truth = _devkit_classes(file, _read_ids(file), classes)
    numbered = {number: name for name in names if (number := official_number(name))}
    if not numbered and len(names) != len(truth):
        raise DatasetError(
            f"{file.where} has {len(truth)} lines for {len(names)} images",
            hint="name the images ILSVRC2012_val_00000001.JPEG ..., or pass all of them",
        )
    by_number = numbered or dict(enumerate(names, 1))
    found = {name: truth[n - 1] for n, name in by_number.items() if n <= len(truth)}
    absent = (n for n in range(1, len(truth) + 1) if n not in by_number)
    missing = tuple(f"ILSVRC2012_val_{n:08d}" for n in absent)
    return Labels(found, missing, (), classes)


def _devkit_classes(file: LabelFile, ids: Mapping[int, str], classes: Classes) -> list[int]:
    """The class index of each line."""
    truth = []
    faults = Faults(file.where)
    for line, text in enumerate(file.lines(), 1):
        text = text.strip()
        name = ids.get(int(text)) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else None
        if name in classes.index:
            truth.append(classes.index[name])
        else:
            fault = f"ID {text} is not a class of the model" if text else "the line is empty"
            faults.add(line, fault)
    faults.raise_any("write the ILSVRC2012_ID of one image, counted from 1, on each line")
    return truth


def _read_ids(file: LabelFile) -> dict[int, str]:
    """Read ILSVRC2012_ID -> wnid from the ``meta.mat`` beside the ground truth."""
    data = file.sibling("meta.mat")
    if data is None:
        raise DatasetError(
            f"the ILSVRC2012 IDs in {file.where} need a meta.mat beside it, which is missing",
            hint="copy data/meta.mat of ILSVRC2012_devkit_t12 there, or use val.txt",
        )
    try:
        from scipy.io import loadmat  # type: ignore[import-untyped]
    except ImportError as error:
        raise DatasetError(
            "reading the devkit's meta.mat needs scipy, which is not installed",
            hint='pip install "clipdeploy[devkit]", or use val.txt',
        ) from error
    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise DatasetError(
            f"meta.mat beside {file.where} cannot be read: {error}",
            hint="copy data/meta.mat of ILSVRC2012_devkit_t12 again",
        ) from error
