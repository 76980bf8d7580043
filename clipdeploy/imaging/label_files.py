"""Label files: where people keep them, what is read from them, and the report of their faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from clipdeploy.core.errors import DatasetError
from clipdeploy.imaging.classes import Classes

__all__ = [
    "Faults",
    "Get",
    "LabelFile",
    "LabelKind",
    "Labels",
    "find_label_files",
    "is_label_file",
    "kind_of",
]

LabelKind = Literal["list", "devkit", "solution"]
# The bytes of a file by its relative path, None if there is no such file.
Get = Callable[[str], bytes | None]

_SOLUTION = "LOC_val_solution.csv"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_CANDIDATES: tuple[tuple[LabelKind, str], ...] = (
    ("list", "val.txt"),
    ("list", "meta/val.txt"),
    ("solution", _SOLUTION),
    ("devkit", _TRUTH),
    ("devkit", f"data/{_TRUTH}"),
    ("devkit", f"devkit/data/{_TRUTH}"),
    ("devkit", f"ILSVRC2012_devkit_t12/data/{_TRUTH}"),
)
# Kaggle's images are in ILSVRC/Data/CLS-LOC/val, and the solution beside ILSVRC.
_BESIDE: tuple[tuple[LabelKind, str], ...] = (
    *_CANDIDATES,
    ("solution", f"../../../{_SOLUTION}"),
)
_SHOWN = 4


@dataclass(frozen=True)
class Labels:
    """Class index of each image by its name; ``missing`` are listed but not there.

    ``repeated``: a sentence for each name that is listed twice, with the same class.  ``classes``
    have the names that the file gave where they were unknown.
    """

    index: dict[str, int]
    missing: tuple[str, ...]
    repeated: tuple[str, ...]
    classes: Classes


@dataclass(frozen=True)
class LabelFile:
    """A label file: where it lies, its bytes, and those of the files beside it.

    ``beside`` says that it lies outside the images' folder, so that it may be of other images.
    """

    kind: LabelKind
    where: str
    data: bytes
    sibling: Get
    beside: bool = False

    def lines(self) -> list[str]:
        """Its lines, without the empty ones at the end.

        Raises:
            DatasetError: it is not UTF-8.
        """
        try:
            return self.data.decode("utf-8-sig").rstrip().splitlines()
        except UnicodeDecodeError as error:
            raise DatasetError(f"{self.where} is no text: {error}") from error


def kind_of(path: Path) -> LabelKind:
    """What sort of label file a user names, by its name."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return "solution"
    return "devkit" if "ground_truth" in path.name else "list"


def is_label_file(name: str) -> bool:
    """Whether a file is called as label files and what belongs to them are."""
    usual = {PurePosixPath(candidate).name for _, candidate in _CANDIDATES}
    return PurePosixPath(name).name in usual | {"meta.mat"}


def find_label_files(inside: Get, beside: Get, where: str) -> Iterator[LabelFile]:
    """Label files at the usual places, in the images' folder or archive and then beside it."""
    for get, candidates in ((inside, _CANDIDATES), (beside, _BESIDE)):
        outside = get is beside
        for kind, name in candidates:
            data = get(name)
            if data is None:
                continue
            folder = str(PurePosixPath(name).parent)

            def sibling(other: str, get: Get = get, folder: str = folder) -> bytes | None:
                return get(PurePosixPath(folder, other).as_posix())

            shown = f"{where}/{name}" if not outside else f"{name} beside {where}"
            yield LabelFile(kind, shown, data, sibling, outside)


@dataclass
class Faults:
    """Bad lines, told together in one sentence."""

    where: str
    lines: list[int] = field(default_factory=list)
    first: str = ""

    def add(self, line: int, text: str) -> None:
        """Note what is wrong with a line, counted from 1."""
        if not self.lines:
            self.first = text
        self.lines.append(line)

    def refuse(self, hint: str) -> None:
        """Go on if no line is bad.

        Raises:
            DatasetError: the first bad line, and the numbers of some others.
        """
        if not self.lines:
            return
        rest = [str(line) for line in self.lines[1:]]
        more = ""
        if rest:
            numbers = ", ".join(rest[:_SHOWN]) + (", ..." if len(rest) > _SHOWN else "")
            more = f"; {len(rest)} more bad lines: {numbers}"
        raise DatasetError(f"{self.where}, line {self.lines[0]}: {self.first}{more}", hint=hint)
