"""Settings: ``clipdeploy.toml`` and environment variables that give options their values.

:data:`SETTINGS` lists all of them.  To add a setting, add a row there and declare its option with
:func:`clipdeploy.cli.params.setting_option`.  The command line outranks the environment, the
environment outranks the file, and the file outranks the default.

The file is read from the working folder only, or from the path in ``$CLIPDEPLOY_CONFIG``, so that a
command does the same for everyone who runs it there.  The Python API reads no settings except the
environment variables that it documents.

Every ``--help`` imports this module, so modules needed only to read settings are imported later.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clipdeploy.cli.config_fields import choices_of, default_of
from clipdeploy.cli.setting_types import (
    FILE,
    FLAG,
    FOLDER,
    IMAGES,
    MODEL,
    URL,
    SettingType,
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
# Maximum size of a settings file; real ones have a page of text.
_MOST_BYTES = 1 << 20
_BUILD = "clipdeploy.engines.build_config.BuildConfig"
_VERIFY = "clipdeploy.verification.verifier.VerifyConfig"

Source = Literal["command line", "environment", "file", "default"]


@dataclass(frozen=True)
class Setting:
    """A setting: its key in the file, its environment variable, its type and its help.

    ``default`` is the value where none is given; where it is None, ``otherwise`` says what happens.
    ``exported``: the library itself reads the variable, so a value from the file is put into the
    environment while a command runs.  ``old_name`` and ``old_variable`` are former names, which
    still work; empty if there are none.
    """

    name: str
    variable: str
    type: SettingType
    help: str
    example: Value
    default: Value | None = None
    otherwise: str = ""
    exported: bool = False
    old_name: str = ""
    old_variable: str = ""


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
        "Model of a command without --model.",
        example="clip-vit-base-p16",
        otherwise="the workspace's last one",
    ),
    Setting(
        "cards",
        "CLIPDEPLOY_CARDS",
        FILE,
        "File of your own model cards, with the columns of the zoo.",
        example="cards.csv",
        otherwise="none",
        exported=True,
    ),
    Setting(
        "calibration_data",
        "CLIPDEPLOY_CALIBRATION_DATA",
        IMAGES,
        "Calibration images: a folder or an archive.",
        example="images/calibration",
        otherwise="none",
        old_name="calibration",
        old_variable="CLIPDEPLOY_CALIBRATION",
    ),
    Setting(
        "val_data",
        "CLIPDEPLOY_VAL_DATA",
        IMAGES,
        "Labelled images that artifacts are judged on: a folder or an archive.",
        example="images/val",
        otherwise="none",
        old_name="validation",
        old_variable="CLIPDEPLOY_VALIDATION",
    ),
    Setting(
        "backend",
        "CLIPDEPLOY_BACKEND",
        choice(*choices_of(_BUILD, "backend")),
        "TensorRT variant that engines are built with.",
        example="tensorrt",
        default=default_of(_BUILD, "backend"),
    ),
    Setting(
        "max_drop",
        "CLIPDEPLOY_MAX_DROP",
        number(0, 100),
        "Percentage points of top-1 that an artifact may lose.",
        example=0.5,
        default=default_of(_VERIFY, "max_drop"),
    ),
    Setting(
        "home",
        "CLIPDEPLOY_HOME",
        FOLDER,
        "Folder of downloads, cached kernels, kernel times and crops.",
        example="~/.cache/clipdeploy",
        otherwise="~/.cache/clipdeploy",
        exported=True,
        old_name="cache",
    ),
    Setting(
        "cache_crops",
        "CLIPDEPLOY_CACHE_CROPS",
        FLAG,
        "Cache decoded crops and PyTorch's logits for the next verification.",
        example=True,
        default=False,
        old_name="keep_crops",
        old_variable="CLIPDEPLOY_KEEP_CROPS",
    ),
    Setting(
        "cache_size",
        "CLIPDEPLOY_CACHE_SIZE",
        number(0),
        "Maximum size of the crop cache in GB.",
        example=20.0,
        otherwise="34 GB",
        old_name="crops_size",
        old_variable="CLIPDEPLOY_CROPS_SIZE",
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
        "Server to download published checkpoints from.",
        example="https://mirror.example/clip",
        otherwise="the publisher's",
        exported=True,
    ),
)


def setting_called(name: str) -> Setting:
    """The setting of that name."""
    return next(setting for setting in SETTINGS if setting.name == name)


@dataclass(frozen=True)
class Found:
    """A value and its origin, which is the name of a variable or a file."""

    value: Value | None
    source: Source
    origin: str


@dataclass(frozen=True)
class Settings:
    """The settings that were given, by name, and the file that was read, if any.

    ``renamed``: a note for each setting that was given by a former name.
    """

    file: Path | None
    given: Mapping[str, Found]
    renamed: tuple[str, ...] = ()

    def look_up(self, setting: Setting) -> Found:
        """The value of a setting: the given one, else its default."""
        return self.given.get(setting.name) or Found(setting.default, "default", "default")

    @contextmanager
    def in_environment(self, outranked: Mapping[str, Value]) -> Iterator[None]:
        """Set the variables that the library itself reads, while a command runs.

        ``outranked`` are the values from the command line, by setting; they outrank the settings.
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
    """Read and check the settings of the file and of the environment.

    Raises:
        UsageError: the file is not valid TOML, a key is unknown, or a value is wrong.
        FileError: the file cannot be read.
    """
    path = _config_file()
    renamed: list[str] = []
    given = {} if path is None else _from_file(path, renamed)
    for setting in SETTINGS:
        if variable := _given_variable(setting):
            text = os.environ[variable]
            value = setting.type.checked(text, variable, setting.example)
            given[setting.name] = Found(value, "environment", variable)
            if variable != setting.variable:
                renamed.append(f"{variable} is now {setting.variable}")
    settings = Settings(path, given, tuple(renamed))
    with settings.in_environment({}):
        for name, found in given.items():
            if found.value is not None:
                where = f"{found.origin}: {name}" if found.source == "file" else found.origin
                setting_called(name).type.check_known(found.value, where)
    return settings


def _given_variable(setting: Setting) -> str:
    """The variable that gives a setting, by its present or its former name; "" if none does.

    Raises:
        UsageError: both names are set, to different values.
    """
    names = [n for n in (setting.variable, setting.old_variable) if n and os.environ.get(n)]
    if len({os.environ[name] for name in names}) > 1:
        raise UsageError(
            f"{names[1]} and {names[0]} are the same setting",
            hint=f"unset {names[1]}, the former name",
        )
    return names[0] if names else ""


def _config_file() -> Path | None:
    if named := os.environ.get(CONFIG_VARIABLE):
        path = Path(named).expanduser()
        if not path.exists():
            raise UsageError(
                f"{CONFIG_VARIABLE} is {named}, which does not exist",
                hint=f"correct the path, or unset {CONFIG_VARIABLE}",
            )
        # The usual way to choose no file.
        return None if named == os.devnull else path
    path = Path(CONFIG_FILE)
    return path if os.path.lexists(path) else None


def _from_file(path: Path, renamed: list[str]) -> dict[str, Found]:
    known = {setting.name: setting for setting in SETTINGS}
    former = {setting.old_name: setting for setting in SETTINGS if setting.old_name}
    given: dict[str, Found] = {}
    for key, raw in _read(path).items():
        if (setting := known.get(key) or former.get(key)) is None:
            section = "the file has no sections; " if isinstance(raw, dict) else ""
            raise UsageError(f"{path}: unknown setting {key!r}", hint=section + nearest(key, known))
        if setting.name in given:
            raise UsageError(
                f"{path}: {setting.old_name} and {setting.name} are the same setting",
                hint=f"leave out {setting.old_name}, the former name",
            )
        if key != setting.name:
            renamed.append(f"{path}: {key} is now {setting.name}")
        value = setting.type.from_toml(raw, f"{path}: {key}", setting.example)
        if isinstance(value, Path):
            value = path.parent / value
        given[setting.name] = Found(value, "file", str(path))
    return given


def _read(path: Path) -> dict[str, object]:
    import tomllib

    from clipdeploy.core.files import read_regular

    data = read_regular(path, _MOST_BYTES)
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is not valid TOML: {error}",
            hint='write NAME = VALUE in each line, text in quotes: "..."',
        ) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelled ``name``: the most similar known name, else all of them."""
    import difflib

    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"nearest: {near[0]}" if near else f"there are {', '.join(names)}"


def strangers() -> list[str]:
    """Environment variables that look like settings but are not."""
    known = {CONFIG_VARIABLE}
    for setting in SETTINGS:
        known |= {setting.variable, setting.old_variable}
    return sorted(name for name in os.environ if name.startswith(_PREFIX) and name not in known)
