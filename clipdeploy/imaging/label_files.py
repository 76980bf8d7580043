"""Find label files, and collect the errors in their lines."""

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
# Relative path -> the file's bytes, None if there is no such file.
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
# Kaggle's images are in ILSVRC/Data/CLS-LOC/val, its solution is beside ILSVRC.
_BESIDE: tuple[tuple[LabelKind, str], ...] = (
    *_CANDIDATES,
    ("solution", f"../../../{_SOLUTION}"),
)
_SHOWN = 4


@dataclass(frozen=True)
class Labels:
    """The class index of each image by its name.

    ``missing`` are listed images without a file, ``repeated`` a sentence for each image that is
    listed twice with the same class.  ``classes`` includes the names from the file if they were
    unknown before.
    """

    index: dict[str, int]
    missing: tuple[str, ...]
    repeated: tuple[str, ...]
    classes: Classes


@dataclass(frozen=True)
class LabelFile:
    """A label file: its path for messages, its bytes, and a reader for the files beside it.

    ``beside``: the file is outside the images' folder, so it may belong to other images.
    """

    kind: LabelKind
    where: str
    data: bytes
    sibling: Get
    beside: bool = False

    def lines(self) -> list[str]:
        """The lines, without empty ones at the end.

        Raises:
            DatasetError: the file is not UTF-8.
        """
        try:
            return self.data.decode("utf-8-sig").rstrip().splitlines()
        except UnicodeDecodeError as error:
            raise DatasetError(
                f"{self.where} is not UTF-8 text: {error}", hint="convert it to UTF-8"
            ) from error


def kind_of(path: Path) -> LabelKind:
    """The kind of a label file, judged by its name."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return "solution"
    return "devkit" if "ground_truth" in path.name else "list"


def is_label_file(name: str) -> bool:
    """Whether a file has the usual name of a label file or of ``meta.mat``."""
    usual = {PurePosixPath(candidate).name for _, candidate in _CANDIDATES}
    return PurePosixPath(name).name in usual | {"meta.mat"}


def find_label_files(inside: Get, beside: Get, where: str) -> Iterator[LabelFile]:
    """Find label files at the usual places, first inside the images' folder, then beside it."""
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
    """Collects the errors of a label file and raises them as one."""

    where: str
    lines: list[int] = field(default_factory=list)
    first: str = ""

    def add(self, line: int, text: str) -> None:
        """Record an error of a line, counted from 1."""
        if not self.lines:
            self.first = text
        self.lines.append(line)

    def raise_any(self, hint: str) -> None:
        """Raise the errors recorded so far, if any.

        Raises:
            DatasetError: the first error, and the numbers of some other bad lines.
        """
        if not self.lines:
            return
        rest = [str(line) for line in self.lines[1:]]
        more = ""
        if rest:
            numbers = ", ".join(rest[:_SHOWN]) + (", ..." if len(rest) > _SHOWN else "")
            more = f"; {len(rest)} more bad lines: {numbers}"
        raise DatasetError(f"{self.where}, line {self.lines[0]}: {self.first}{more}", hint=hint)
