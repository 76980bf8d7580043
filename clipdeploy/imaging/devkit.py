"""The classes of ImageNet's validation images from the development kit.

``ILSVRC2012_validation_ground_truth.txt`` has a 1-based ILSVRC2012_ID for each image: line n is
that of ILSVRC2012_val_{n:08d}.  The IDs are in an order of their own, not that of the wnids: only
the kit's data/meta.mat (field WNID of ``synsets``) maps them, and nothing is guessed without it.
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
    """The number in an image's official name, 0 if it has another name."""
    match = _NUMBERED.fullmatch(PurePosixPath(name).stem)
    return int(match[1]) if match else 0


def read_devkit(file: LabelFile, names: Sequence[str], classes: Classes) -> Labels:
    """The classes of the images ``names``, by the numbers in their names or in their order.

    Raises:
        DatasetError: an ID that is no class, no ``meta.mat``, or other numbers of lines and images.
    """
    truth = _devkit_classes(file, _read_ids(file), classes)
    numbered = {number: name for name in names if (number := official_number(name))}
    if not numbered and len(names) != len(truth):
        raise DatasetError(
            f"{file.where} has {len(truth)} lines for {len(names)} images",
            hint="name the images ILSVRC2012_val_00000001.JPEG ..., or give all of them",
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
            hint='pip install "clipdeploy[devkit]", or use val.txt',
        ) from error
    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except Exception as error:  # scipy raises whatever the damage leads it to
        raise DatasetError(
            f"meta.mat beside {file.where} cannot be read: {error}",
            hint="copy data/meta.mat of ILSVRC2012_devkit_t12 again",
        ) from error
