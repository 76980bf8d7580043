"""Defines findings, with a constructor for each level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Level", "error", "good", "note", "warning"]

Level = Literal["good", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    ``error``: export, build or verify cannot run; ``warning``: something is slower or missing;
    ``note``: information.  ``mend`` is the command that fixes it, empty if nothing is wrong.
    """

    level: Level
    subject: str
    text: str
    mend: str = ""


def good(subject: str, text: str) -> Finding:
    """Make a finding for something that works."""
    return Finding("good", subject, text)


def note(subject: str, text: str, mend: str) -> Finding:
    """Make a finding that informs."""
    return Finding("note", subject, text, mend)


def warning(subject: str, text: str, mend: str) -> Finding:
    """Make a finding for something that is slower or missing."""
    return Finding("warning", subject, text, mend)


def error(subject: str, text: str, mend: str) -> Finding:
    """Make a finding for a problem that stops export, build or verify."""
    return Finding("error", subject, text, mend)
