"""Helpers for the tables of bisections and searches."""

from __future__ import annotations

from rich.table import Table

from exporters.metrics import BROKEN_DB

__all__ = ["decibels", "number_columns"]


def decibels(value: float | None) -> str:
    """An SQNR in dB as text: ``equal`` without error, ``broken`` if the output is not finite."""
    if value is None:
        return "equal"
    return "broken" if value == BROKEN_DB else f"{value:.1f}"


def number_columns(table: Table, titles: tuple[str, ...]) -> Table:
    """Add a right-aligned column for each title and return ``table``."""
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table
