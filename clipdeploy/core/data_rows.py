"""Reads the tables in ``clipdeploy/data`` and tables of the user, and their columns' values."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeVar

from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.files import read_regular

__all__ = ["DataRow", "read_rows", "read_table"]

T = TypeVar("T")


@dataclass(frozen=True)
class DataRow:
    """A row of a table: the file's name, the line (from 1), the text of each column.

    ``hint`` says where the columns are explained.
    """

    file: str
    line: int
    columns: dict[str, str | None]
    hint: str = ""

    def value(self, column: str, kind: Callable[[str], T], default: T | None = None) -> T:
        """The value of a column, converted by ``kind``; ``default`` if it is blank.

        Raises:
            ArtifactError: the value is invalid, or blank without a default.
        """
        text = (self.columns.get(column) or "").strip()
        if not text and default is not None:
            return default
        try:
            if not text:
                raise ValueError("it is blank")
            return kind(text)
        except ValueError as error:
            raise ArtifactError(
                f"{self.file}, line {self.line}: no valid value in column {column}: {error}",
                hint=self.hint,
            ) from error


def read_rows(file: str, *, hint: str = "") -> list[DataRow]:
    """All rows of ``clipdeploy/data/FILE``, a CSV file whose first line names the columns."""
    text = resources.files("clipdeploy").joinpath("data", file).read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return [DataRow(file, line, row, hint) for line, row in enumerate(rows, start=2)]


# A table of the user has a page of text.
_MOST_BYTES = 1 << 20


def read_table(path: Path, columns: tuple[str, ...], *, hint: str = "") -> list[DataRow]:
    """All rows of a CSV file of the user, whose first line names some of ``columns``.

    Blank lines are left out.

    Raises:
        FileError: the file cannot be read.
        ArtifactError: it is not UTF-8, a column is unknown or named twice, or a row has more values
            than there are columns.
    """
    try:
        lines = read_regular(path, _MOST_BYTES).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ArtifactError(
            f"{path} is not a CSV file in UTF-8: {error.reason}", hint=hint
        ) from error
    rows = list(enumerate(csv.reader(lines), start=1))
    header = [name.strip() for name in rows[0][1]] if rows else []
    for index, name in enumerate(header):
        if name not in columns or name in header[:index]:
            fault = "unknown" if name not in columns else "there twice"
            raise ArtifactError(f"{path}, line 1: column {name!r} is {fault}", hint=hint)
    found = []
    for line, values in rows[1:]:
        if len(values) > len(header):
            raise ArtifactError(
                f"{path}, line {line}: {len(values)} values in {len(header)} columns", hint=hint
            )
        if any(value.strip() for value in values):
            given: dict[str, str | None] = dict(zip(header, values, strict=False))
            found.append(DataRow(str(path), line, given, hint))
    return found
