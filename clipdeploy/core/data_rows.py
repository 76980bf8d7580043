"""Reads the tables in ``clipdeploy/data``, and the values of their columns."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import TypeVar

from clipdeploy.core.errors import ArtifactError

__all__ = ["DataRow", "read_rows"]

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
