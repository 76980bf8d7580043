"""What one gives once instead of with every command: ``clipdeploy.toml`` and the environment.

:data:`SETTINGS` is the table of all of them: a new setting is a new row, and
:func:`clipdeploy.cli.params.setting_option` feeds it to an option.  The command line outranks the
environment, the environment the file, the file the default.

The file is looked for in the working folder and nowhere else, so that a command means the same
whoever gives it there; ``$CLIPDEPLOY_CONFIG`` names another one.  The Python API reads no settings
but the environment variables that it documents.

Every ``--help`` imports this file, and so what only reading needs is imported there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clipdeploy.cli.setting_types import (
    FLAG,
    FOLDER,
    IMAGES,
    MODEL,
    URL,
    Kind,
    Value,
    choice,
    number,
)
from clipdeploy.core.errors import UsageError

__all__ = [
    "CONFIG_FILE",
    "CONFIG_VARIABLE",
    "SETTINGS",
    "Found",
    "Setting",
    "Settings",
    "load_settings",
    "nearest",
    "setting_called",
    "strangers",
]

CONFIG_FILE = "clipdeploy.toml"
CONFIG_VARIABLE = "CLIPDEPLOY_CONFIG"
_PREFIX = "CLIPDEPLOY_"
# Of a file of settings, which has a page of text.
_MOST_BYTES = 1 << 20

Source = Literal["command line", "environment", "file", "default"]


@dataclass(frozen=True)
class Setting:
    """A row: the key in the file, the environment variable, what it takes, and a line of help.

    ``default`` is the value where nobody gives one, or None, and then ``otherwise`` says what
    happens.  ``exported``: the library itself reads the variable, so a value of the file is put
    there for the time of a command.
    """

    name: str
    variable: str
    kind: Kind
    help: str
    example: Value
    default: Value | None = None
    otherwise: str = ""
    exported: bool = False


SETTINGS = (
    Setting(
        "workspace",
        "CLIPDEPLOY_WORKSPACE",
        FOLDER,
        "Folder of the artifacts.",
        example="artifacts",
        default=Path("artifacts"),
    ),
    Setting(
        "model",
        "CLIPDEPLOY_MODEL",
        MODEL,
        "Model that a command without --model takes.",
        example="clip-vit-base-p16",
        otherwise="the workspace's last one",
    ),
    Setting(
        "calibration",
        "CLIPDEPLOY_CALIBRATION",
        IMAGES,
        "Calibration images: a folder or an archive.",
        example="images/calibration",
        otherwise="none",
    ),
    Setting(
        "validation",
        "CLIPDEPLOY_VALIDATION",
        IMAGES,
        "Labelled images that artifacts are judged on: a folder or an archive.",
        example="images/val",
        otherwise="none",
    ),
    Setting(
        "backend",
        "CLIPDEPLOY_BACKEND",
        choice("auto", "tensorrt", "tensorrt-rtx"),
        "TensorRT flavour that engines are built with.",
        example="tensorrt",
        default="auto",
    ),
    Setting(
        "max_drop",
        "CLIPDEPLOY_MAX_DROP",
        number(0, 100),
        "Percentage points of top-1 that an artifact may lose.",
        example=0.5,
        default=1.0,
    ),
    Setting(
        "cache",
        "CLIPDEPLOY_HOME",
        FOLDER,
        "Folder of downloads, timing caches and kept crops.",
        example="~/.cache/clipdeploy",
        otherwise="~/.cache/clipdeploy",
        exported=True,
    ),
    Setting(
        "keep_crops",
        "CLIPDEPLOY_KEEP_CROPS",
        FLAG,
        "Keep decoded crops and PyTorch's logits for the next verification.",
        example=True,
        default=False,
    ),
    Setting(
        "crops_size",
        "CLIPDEPLOY_CROPS_SIZE",
        number(0),
        "Most gigabytes of kept crops.",
        example=20.0,
        otherwise="34 GB",
    ),
    Setting(
        "offline",
        "CLIPDEPLOY_OFFLINE",
        FLAG,
        "Download nothing.",
        example=True,
        default=False,
        exported=True,
    ),
    Setting(
        "mirror",
        "CLIPDEPLOY_MIRROR",
        URL,
        "Server that published checkpoints are fetched from instead.",
        example="https://mirror.example/clip",
        otherwise="the publisher's",
        exported=True,
    ),
)


def setting_called(name: str) -> Setting:
    """The row of that name."""
    return next(setting for setting in SETTINGS if setting.name == name)


@dataclass(frozen=True)
class Found:
    """A value and where it came from; ``origin`` is the variable's or the file's name."""

    value: Value | None
    source: Source
    origin: str


@dataclass(frozen=True)
class Settings:
    """The settings that somebody gave, by name, and the file that was read, if any."""

    file: Path | None
    given: Mapping[str, Found]

    def look_up(self, setting: Setting) -> Found:
        """What holds for a setting, its default where nobody gave it."""
        return self.given.get(setting.name) or Found(setting.default, "default", "default")

    @contextmanager
    def in_environment(self, outranked: Mapping[str, Value]) -> Iterator[None]:
        """Put what the library reads from the environment there, for as long as a command runs.

        ``outranked`` are the values of the command line, by setting.
        """
        given = {name: found.value for name, found in self.given.items()} | dict(outranked)
        wanted = {
            setting.variable: _as_text(value)
            for setting in SETTINGS
            if setting.exported and (value := given.get(setting.name)) is not None
        }
        before = {variable: os.environ.get(variable) for variable in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for variable, text in before.items():
                if text is None:
                    os.environ.pop(variable, None)
                else:
                    os.environ[variable] = text


def _as_text(value: Value) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    # Absolute: a worker may have another working folder.
    return str(value.absolute() if isinstance(value, Path) else value)


def load_settings() -> Settings:
    """Read the file and the environment, each value checked.

    Raises:
        UsageError: a file that is no TOML, an unknown key, a value that is not what it should be.
        FileError: the file cannot be read.
    """
    path = _config_file()
    given = {} if path is None else _from_file(path)
    for setting in SETTINGS:
        if text := os.environ.get(setting.variable):
            value = setting.kind.checked(text, setting.variable, setting.example)
            given[setting.name] = Found(value, "environment", setting.variable)
    return Settings(path, given)


def _config_file() -> Path | None:
    if named := os.environ.get(CONFIG_VARIABLE):
        path = Path(named).expanduser()
        if not path.exists():
            raise UsageError(
                f"{CONFIG_VARIABLE} names {named}, which is not there",
                hint=f"correct the path, or unset {CONFIG_VARIABLE}",
            )
        # The usual way to have no file at all.
        return None if named == os.devnull else path
    path = Path(CONFIG_FILE)
    return path if os.path.lexists(path) else None


def _from_file(path: Path) -> dict[str, Found]:
    known = {setting.name: setting for setting in SETTINGS}
    given = {}
    for key, raw in _read(path).items():
        if key not in known:
            section = "the file has no sections; " if isinstance(raw, dict) else ""
            raise UsageError(
                f"{path}: no setting is called {key!r}", hint=section + nearest(key, known)
            )
        value = known[key].kind.from_toml(raw, f"{path}: {key}", known[key].example)
        if isinstance(value, Path):
            value = path.parent / value
        given[key] = Found(value, "file", str(path))
    return given


def _read(path: Path) -> dict[str, object]:
    import tomllib

    from clipdeploy.core.files import read_regular

    data = read_regular(path, _MOST_BYTES)
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is no TOML: {error}", hint='a line is NAME = VALUE, texts in quotes: "..."'
        ) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint: the known name that is spelled most like ``name``, else all of them."""
    import difflib

    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"nearest: {near[0]}" if near else f"there are {', '.join(names)}"


def strangers() -> list[str]:
    """Variables of the environment that look like settings and are none."""
    known = {CONFIG_VARIABLE, *(setting.variable for setting in SETTINGS)}
    return sorted(name for name in os.environ if name.startswith(_PREFIX) and name not in known)
