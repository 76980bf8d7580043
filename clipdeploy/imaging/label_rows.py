"""Parse a list or table of images and classes into one row per image.

A line of a list is ``NAME CLASS``.  In a table (comma, semicolon or tab) the image column is the
one with the most image names, and the class column is found by its header, or is the only other
column.  A first line without an image name is a header.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from clipdeploy.core.errors import DatasetError
from clipdeploy.imaging.formats import has_image_suffix
from clipdeploy.imaging.label_files import Faults, LabelFile

__all__ = ["Row", "label_rows"]

_DELIMITERS = ",;\t"
# Kaggle's solution lists a class and a box per object: "n01751748 111 108 230 366 n0175 ...".
_WITH_BOX = re.compile(r"(\S+)(?:\s+-?\d+){4}(?:\s|$)", re.ASCII)
_CLASS_HEADERS = (
    "predictionstring",
    "class",
    "label",
    "class_id",
    "classid",
    "class_index",
    "label_id",
    "labels",
    "target",
    "category",
    "category_id",
    "wnid",
    "synset",
    "class_name",
    "classname",
    "y",
)
_SAMPLED_ROWS = 200
Find = Callable[[str], str | None]


class Row(NamedTuple):
    """A line number, counted from 1, and the line's names of an image and a class."""

    line: int
    image: str
    label: str


class _Cells(NamedTuple):
    line: int
    cells: list[str]


def label_rows(file: LabelFile, find: Find) -> list[Row]:
    """The rows of a list or table; ``find`` returns the image with a given name, or None.

    Raises:
        DatasetError: the file is not UTF-8, a line is empty or has no class, or the class column
            is ambiguous.
    """
    if file.kind == "solution":
        return _from_table(file, find)
    listed = [_split(line, text) for line, text in enumerate(file.lines(), 1)]
    known = sum(find(row.image) is not None for row in listed[:_SAMPLED_ROWS])
    if not known and any(each in text for text in file.lines()[:2] for each in _DELIMITERS):
        table = _cells(file)
        if any(find(cell) is not None for row in table[:_SAMPLED_ROWS] for cell in row.cells):
            return _from_table(file, find)
    faults = Faults(file.where)
    for row in listed:
        if not row.label:
            faults.add(
                row.line, f"{row.image!r} has no class" if row.image else "the line is empty"
            )
    faults.raise_any("write each line as NAME CLASS, with classes in logit order from 0")
    return listed


def _split(line: int, text: str) -> Row:
    parts = text.strip().rsplit(None, 1)
    return Row(line, parts[0], parts[1]) if len(parts) == 2 else Row(line, "".join(parts), "")


def _cells(file: LabelFile) -> list[_Cells]:
    lines = file.lines()
    head = lines[0] if lines else ""
    delimiter = max(_DELIMITERS, key=head.count)
    reader = csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter, strict=True)
    found, before = [], 0
    try:
        for cells in reader:
            found.append(_Cells(before + 1, [cell.strip() for cell in cells]))
            before = reader.line_num
    except csv.Error as error:
        raise DatasetError(
            f"{file.where}, line {reader.line_num}: not a valid table: {error}",
            hint="close each quote, and keep one image per line",
        ) from error
    return found


def _from_table(file: LabelFile, find: Find) -> list[Row]:
    table = _cells(file)
    faults = Faults(file.where)
    width = max((len(row.cells) for row in table), default=0)
    column = max(range(width), key=lambda at: _images(table, at, find), default=0)
    header: list[str] = []
    if len(table) > 1 and not any(
        find(cell) is not None or has_image_suffix(cell) for cell in table[0].cells
    ):
        header, table = [cell.lower() for cell in table[0].cells], table[1:]
    at = _class_column(file, table, header, column, width)
    rows = []
    for row in table:
        if len(row.cells) <= max(column, at):
            faults.add(row.line, "it has no class" if any(row.cells) else "the line is empty")
        else:
            boxed = _WITH_BOX.match(row.cells[at])
            label = boxed[1] if boxed else row.cells[at]
            rows.append(Row(row.line, row.cells[column], label))
    faults.raise_any("write each line as IMAGE,CLASS")
    return rows


def _images(table: Sequence[_Cells], at: int, find: Find) -> int:
    cells = (row.cells[at] for row in table[:_SAMPLED_ROWS] if at < len(row.cells))
    return sum(find(cell) is not None for cell in cells)


def _class_column(
    file: LabelFile, table: Sequence[_Cells], header: Sequence[str], images: int, width: int
) -> int:
    others = [at for at in range(width) if at != images]
    named = [name for name in _CLASS_HEADERS if name in header]
    at_named = [header.index(name) for name in named if header.index(name) != images]
    if len(at_named) == 1 or (at_named and _alike(table, at_named)):
        return at_named[0]
    if len(others) == 1:
        return others[0]
    shown = ", ".join(header) or f"{width} columns"
    raise DatasetError(
        f"the class column of {file.where} is ambiguous: {shown}",
        hint="keep two columns, IMAGE,CLASS, or name one column 'label'",
    )


def _alike(table: Sequence[_Cells], columns: Sequence[int]) -> bool:
    """Whether columns are the same classes under other names, such as numbers and words."""
    width = max(columns)
    rows = [row.cells for row in table if len(row.cells) > width]
    pairs = {tuple(row[at] for at in columns) for row in rows}
    return all(len({pair[each] for pair in pairs}) == len(pairs) for each in range(len(columns)))
