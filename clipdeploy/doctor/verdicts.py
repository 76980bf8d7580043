"""One finding, and short ways to make one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Level", "error", "good", "note", "warning"]

Level = Literal["good", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    ``error``: export, build or verify cannot run; ``warning``: something is slower or missing;
    ``note``: good to know.  ``mend`` is the command to type, empty where nothing has to be done.
    """

    level: Level
    subject: str
    text: str
    mend: str = ""


def good(subject: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding("good", subject, text)


def note(subject: str, text: str, mend: str) -> Finding:
    """Good to know."""
    return Finding("note", subject, text, mend)


def warning(subject: str, text: str, mend: str) -> Finding:
    """Something is slower, or missing."""
    return Finding("warning", subject, text, mend)


def error(subject: str, text: str, mend: str) -> Finding:
    """Export, build or verify cannot run."""
    return Finding("error", subject, text, mend)
