"""Types of settings, read from a TOML value or from the text of an environment variable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clipdeploy.core.addresses import masked
from clipdeploy.core.errors import ClipdeployError, UsageError

__all__ = [
    "FLAG",
    "FOLDER",
    "IMAGES",
    "MODEL",
    "URL",
    "SettingType",
    "Value",
    "as_toml",
    "choice",
    "number",
]

Value = str | Path | float | bool

# The words that click accepts for a flag in an environment variable.
_TRUE = ("1", "true", "t", "yes", "y", "on")
_FALSE = ("0", "false", "f", "no", "n", "off")


@dataclass(frozen=True)
class SettingType:
    """How a setting is parsed and shown.

    ``wanted`` names the type in errors, ``types`` are the TOML types that it accepts.  ``parse``
    takes a TOML value or the text of a variable; it raises ``ValueError`` for a wrong value, or
    :class:`UsageError` with a more precise message.  ``choices`` are all possible values, if they
    are few.  ``shown`` turns a value into text that may be printed.  ``look_up`` checks
    a value that depends on other settings; it is called when all are known.
    """

    wanted: str
    types: tuple[type, ...]
    parse: Callable[[object], Value]
    choices: tuple[str, ...] = ()
    shown: Callable[[str], str] = str
    look_up: Callable[[Value], object] | None = None

    def checked(self, raw: object, where: str, example: Value) -> Value:
        """Parse ``raw``; errors begin with ``where`` and give the ``example``.

        Raises:
            UsageError: the value is wrong.
        """
        try:
            return self.parse(raw)
        except ValueError as error:
            raise UsageError(
                f"{where} = {self._as_toml(raw)} is not {self.wanted}",
                hint=f"such as {as_toml(example)}",
            ) from error

    def check_known(self, value: Value, where: str) -> None:
        """Check a value that depends on other settings; errors begin with ``where``.

        Raises:
            UsageError: the value is wrong.
        """
        try:
            if self.look_up is not None:
                self.look_up(value)
        except ClipdeployError as error:
            given = f"{where} = {self._as_toml(value)}"
            raise UsageError(f"{given}: {error.message}", hint=error.hint) from error

    def from_toml(self, raw: object, where: str, example: Value) -> Value:
        """Parse a TOML value, which must also have the right TOML type.

        Raises:
            UsageError: the value or its type is wrong.
        """
        # type(), not isinstance(): a bool is an int in Python.
        if type(raw) not in self.types:
            raise UsageError(
                f"{where} = {self._as_toml(raw)} is not {self.wanted}",
                hint=f"such as {as_toml(example)}",
            )
        return self.checked(raw, where, example)

    def _as_toml(self, raw: object) -> str:
        return as_toml(self.shown(raw) if isinstance(raw, str) else raw)


def as_toml(value: object) -> str:
    """A value in TOML notation."""
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


def _find_card(name: Value) -> object:
    from clipdeploy.models import cards

    return cards.find(str(name))


FILE = SettingType("a path", (str,), _path)
FOLDER = SettingType("a path", (str,), _path)
IMAGES = SettingType("a path", (str,), _path)
FLAG = SettingType("true or false", (bool,), _flag)
URL = SettingType("an address", (str,), _url, shown=masked)
# A model may have its card in the file of the setting "cards".
MODEL = SettingType("a model's name", (str,), str, look_up=_find_card)


def number(least: float, most: float = math.inf) -> SettingType:
    """A number from ``least`` to ``most``."""

    def parse(raw: object) -> float:
        value = float(str(raw))
        if not (math.isfinite(value) and least <= value <= most):
            raise ValueError(raw)
        return value

    span = f"of {least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
    return SettingType(f"a number {span}", (float, int), parse)


def choice(*names: str) -> SettingType:
    """One of a few names."""

    def parse(raw: object) -> str:
        if raw not in names:
            raise ValueError(raw)
        return str(raw)

    return SettingType(f"one of {', '.join(names)}", (str,), parse, names)
