"""What a setting may be: read from a line of TOML or from the text of an environment variable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clipdeploy.core.addresses import masked
from clipdeploy.core.errors import UsageError

__all__ = [
    "FLAG",
    "FOLDER",
    "IMAGES",
    "MODEL",
    "URL",
    "Kind",
    "Value",
    "as_toml",
    "choice",
    "number",
]

Value = str | Path | float | bool

# click's words for a flag in an environment variable.
_TRUE = ("1", "true", "t", "yes", "y", "on")
_FALSE = ("0", "false", "f", "no", "n", "off")


@dataclass(frozen=True)
class Kind:
    """``wanted`` says what it is; ``types`` are those of TOML that it is written as.

    ``parse`` takes such a value, or the text of a variable.  It raises ``ValueError`` for a wrong
    one, or :class:`UsageError` where it has more to say.  ``choices`` are all values, if few;
    ``shown`` is a value's text as it may be printed.
    """

    wanted: str
    types: tuple[type, ...]
    parse: Callable[[object], Value]
    choices: tuple[str, ...] = ()
    shown: Callable[[str], str] = str

    def checked(self, raw: object, where: str, example: Value) -> Value:
        """The value of ``raw``; errors begin with ``where`` and give the ``example``.

        Raises:
            UsageError: it is none.
        """
        given = f"{where} = {self._as_toml(raw)}"
        try:
            return self.parse(raw)
        except ValueError as error:
            raise UsageError(
                f"{given} is not {self.wanted}", hint=f"such as {as_toml(example)}"
            ) from error
        except UsageError as error:
            raise UsageError(f"{given}: {error.message}", hint=error.hint) from error

    def from_toml(self, raw: object, where: str, example: Value) -> Value:
        """:meth:`checked` for a value of TOML, which has to have the right type as well.

        Raises:
            UsageError: it is none.
        """
        # type, not isinstance: a bool of Python is an int.
        if type(raw) not in self.types:
            raise UsageError(
                f"{where} = {self._as_toml(raw)} is not {self.wanted}",
                hint=f"such as {as_toml(example)}",
            )
        return self.checked(raw, where, example)

    def _as_toml(self, raw: object) -> str:
        return as_toml(self.shown(raw) if isinstance(raw, str) else raw)


def as_toml(value: object) -> str:
    """A value as a line of TOML would have it."""
    if isinstance(value, str | Path):
        import json

        return json.dumps(str(value), ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _path(raw: object) -> Path:
    try:
        path = Path(str(raw)).expanduser()
    except RuntimeError as error:  # ~nobody
        raise ValueError(raw) from error
    if not str(raw).strip():
        raise ValueError(raw)
    return path


def _flag(raw: object) -> bool:
    word = str(raw).strip().lower()
    if word not in _TRUE + _FALSE:
        raise ValueError(raw)
    return word in _TRUE


def _url(raw: object) -> str:
    if "://" not in str(raw):
        raise ValueError(raw)
    return str(raw)


def _model(raw: object) -> str:
    from clipdeploy.models import cards

    cards.find(str(raw))
    return str(raw)


FOLDER = Kind("a path", (str,), _path)
IMAGES = Kind("a path", (str,), _path)
FLAG = Kind("true or false", (bool,), _flag)
URL = Kind("an address", (str,), _url, shown=masked)
MODEL = Kind("a model's name", (str,), _model)


def number(least: float, most: float = math.inf) -> Kind:
    """A number from ``least`` to ``most``."""

    def parse(raw: object) -> float:
        value = float(str(raw))
        if not (math.isfinite(value) and least <= value <= most):
            raise ValueError(raw)
        return value

    span = f"of {least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
    return Kind(f"a number {span}", (float, int), parse)


def choice(*names: str) -> Kind:
    """One of a few names."""

    def parse(raw: object) -> str:
        if raw not in names:
            raise ValueError(raw)
        return str(raw)

    return Kind(f"one of {', '.join(names)}", (str,), parse, names)
