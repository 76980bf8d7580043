"""Precedence, held for every row of the table, and what is said to a file that is wrong.

Covers: clipdeploy/cli/setting_types.py, clipdeploy/core/cache.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from clipdeploy.cli.main import main
from clipdeploy.cli.params import SettingOption
from clipdeploy.cli.setting_types import FLAG, FOLDER, IMAGES, MODEL, URL, SettingType, as_toml
from clipdeploy.cli.settings import (
    CONFIG_FILE,
    SETTINGS,
    Setting,
    load_settings,
    setting_called,
)
from clipdeploy.core.cache import cache_folder
from clipdeploy.core.errors import FileError, UsageError
from clipdeploy.models import cards
from clipdeploy.models.download import address

pytestmark = pytest.mark.usefixtures("cwd")

DOCUMENT = Path(__file__).parents[3] / "docs" / "configuration.md"


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(result: Result, code: int, *words: str) -> None:
    """One line on stderr, and in it the words that help."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr


def write(*lines: str, to: Path = Path(CONFIG_FILE)) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text("\n".join(lines), encoding="utf-8")


def three_values(type_: SettingType) -> tuple[Any, Any, Any]:
    """Values that all hold for a type and whose neighbours differ: of file, variable, option."""
    if type_.choices:
        return type_.choices[-1], type_.choices[-2], type_.choices[-1]
    if type_ is FLAG:
        return True, False, True
    if type_ is MODEL:
        return tuple(card.name for card in cards.all_cards()[:3])
    if type_ is URL:
        return "https://a.example", "https://b.example", "https://c.example"
    if type_ in (FOLDER, IMAGES):
        return "a", "b", "c"
    return 0.25, 0.5, 0.75


def the_same(type_: SettingType, value: object, expected: object) -> bool:
    return value == (Path(str(expected)) if type_ in (FOLDER, IMAGES) else expected)


def fed_options() -> Iterator[tuple[tuple[str, ...], SettingOption]]:
    """Every option that a setting feeds, with the words of its command."""
    groups: list[tuple[tuple[str, ...], click.Command]] = [((), main)]
    while groups:
        words, command = groups.pop()
        if isinstance(command, click.Group):
            groups += [((*words, name), each) for name, each in command.commands.items()]
        for param in command.params:
            if isinstance(param, SettingOption):
                yield words, param


FED = [
    pytest.param(words, option, id=" ".join([*words, option.opts[0]]))
    for words, option in fed_options()
]


def parsed(words: tuple[str, ...], *given: str) -> dict[str, Any]:
    """The values that a command would get; other things that it needs are not asked for."""
    command: click.Command = main
    context = None
    for word in words:
        context = click.Context(command, parent=context, info_name=word)
        assert isinstance(command, click.Group)
        command = command.commands[word]
    made = command.make_context(words[-1], list(given), parent=context, resilient_parsing=True)
    return made.params


def typed(option: SettingOption, value: object) -> list[str]:
    if option.is_flag:
        return [(option.opts if value else option.secondary_opts)[0]]
    return [option.opts[0], str(value)]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_environment_over_file_over_default(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    type_, (filed, exported, _) = setting.type, three_values(setting.type)
    found = load_settings().look_up(setting)
    assert (found.value, found.source) == (setting.default, "default")
    write(f"{setting.name} = {as_toml(filed)}")
    found = load_settings().look_up(setting)
    assert the_same(type_, found.value, filed)
    assert (found.source, found.origin) == ("file", CONFIG_FILE)
    monkeypatch.setenv(setting.variable, str(exported).lower() if type_ is FLAG else str(exported))
    found = load_settings().look_up(setting)
    assert the_same(type_, found.value, exported)
    assert (found.source, found.origin) == ("environment", setting.variable)
    monkeypatch.setenv(setting.variable, "")
    assert load_settings().look_up(setting).source == "file"


@pytest.mark.parametrize(("words", "option"), FED)
def test_command_line_over_environment_over_file(
    words: tuple[str, ...], option: SettingOption, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, name = option.setting, str(option.name)
    type_, (filed, exported, given) = setting.type, three_values(setting.type)
    assert parsed(words)[name] == setting.default
    write(f"{setting.name} = {as_toml(filed)}")
    if not option.deferred:
        assert the_same(type_, parsed(words)[name], filed)
        monkeypatch.setenv(setting.variable, str(exported))
        assert the_same(type_, parsed(words)[name], exported)
    assert the_same(type_, parsed(words, *typed(option, given))[name], given)


@pytest.mark.parametrize(("words", "option"), FED)
def test_the_command_line_can_outrank_a_flag_either_way(
    words: tuple[str, ...], option: SettingOption
) -> None:
    assert not option.is_flag or option.secondary_opts


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_setting_is_an_option_or_handed_to_the_library(setting: Setting) -> None:
    options = [option for _, option in fed_options() if option.setting is setting]
    assert options or setting.exported


def test_options_for_images_and_workspaces_are_fed() -> None:
    """No --data, --workspace or --model is forgotten; what `merge` takes is elsewhere recorded."""
    fed = {(words, option.opts[0]) for words, option in fed_options()}
    groups: list[tuple[tuple[str, ...], click.Command]] = [((), main)]
    while groups:
        words, command = groups.pop()
        if isinstance(command, click.Group):
            groups += [((*words, name), each) for name, each in command.commands.items()]
        for param in command.params:
            if param.opts[0] in ("--data", "--workspace", "--model", "--backend", "--max-drop"):
                assert (words, param.opts[0]) in fed | {(("verify", "merge"), "--data")}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_examples_and_wrong_types(setting: Setting) -> None:
    write(f"{setting.name} = {as_toml(setting.example)}")
    assert load_settings().given[setting.name].source == "file"
    write(f"{setting.name} = [1, 2]")
    with pytest.raises(UsageError) as refusal:
        load_settings()
    said = str(refusal.value)
    assert f"{CONFIG_FILE}: {setting.name} = [1, 2] is not {setting.type.wanted}" in said
    assert f"such as {as_toml(setting.example)}" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("workspace = artifacts", "is not valid TOML"),
        ("= 1", "is not valid TOML"),
        ("max_drop = 1\nmax_drop = 2", "is not valid TOML"),
        ("max_drop = " + "9" * 5000, "is not valid TOML"),
        ("max_dorp = 1", "unknown setting 'max_dorp' (nearest: max_drop)"),
        ("max-drop = 1", "nearest: max_drop"),
        ("zzz = 1", "there are workspace, model"),
        ("[verify]\nmax_drop = 1", "the file has no sections"),
        ('max_drop = "1"', 'max_drop = "1" is not a number from 0 to 100 (such as 0.5)'),
        ("max_drop = true", "max_drop = true is not a number from 0 to 100"),
        ("max_drop = -0.1", "max_drop = -0.1 is not a number from 0 to 100"),
        ("max_drop = 100.5", "is not a number from 0 to 100"),
        ("max_drop = nan", "is not a number from 0 to 100"),
        ("cache_size = inf", "cache_size = inf is not a number of 0 or more"),
        ("offline = 1", "offline = 1 is not true or false"),
        ('offline = "yes"', 'offline = "yes" is not true or false'),
        ("workspace = 3", 'workspace = 3 is not a path (such as "artifacts")'),
        ('val_data = ""', 'val_data = "" is not a path'),
        ('home = "~nobody-of-this-name/x"', "is not a path"),
        ('backend = "tensort"', "is not one of auto, tensorrt, tensorrt-rtx"),
        ('model = "clip-vit-bas-p16"', "unknown model 'clip-vit-bas-p16' (nearest: "),
        ('mirror = "mirror.example"', "is not an address"),
    ],
)
def test_a_wrong_file_ends_a_command_in_one_line(line: str, said: str) -> None:
    write(line)
    refused(run("zoo", "list"), 2, CONFIG_FILE, said)
    refused(run("config"), 2, CONFIG_FILE, said)


@pytest.mark.parametrize(
    ("variable", "text", "said"),
    [
        ("CLIPDEPLOY_MAX_DROP", "much", '"much" is not a number from 0 to 100 (such as 0.5)'),
        ("CLIPDEPLOY_MAX_DROP", "nan", "is not a number from 0 to 100"),
        ("CLIPDEPLOY_OFFLINE", "perhaps", "is not true or false"),
        ("CLIPDEPLOY_BACKEND", "a\nb", '"a\\nb" is not one of auto'),
        ("CLIPDEPLOY_MODEL", "vit", "unknown model 'vit'"),
        ("CLIPDEPLOY_CONFIG", "nowhere.toml", "is nowhere.toml, which does not exist"),
    ],
)
def test_a_wrong_variable_ends_a_command_in_one_line(
    variable: str, text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    refused(run("zoo", "list"), 2, variable, said)


def test_one_setting_under_two_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in SETTINGS:
        if not setting.old_variable:
            continue
        with monkeypatch.context() as patch:
            patch.setenv(setting.variable, str(setting.example))
            patch.setenv(setting.old_variable, f"{setting.example}0")
            said = f"{setting.old_variable} and {setting.variable} are the same setting"
            refused(run("zoo", "list"), 2, setting.variable, said)
            # Set to the same value, as for an older version as well.
            patch.setenv(setting.old_variable, str(setting.example))
            assert run("zoo", "list").exit_code == 0


@pytest.mark.parametrize("text", ["1", "true", "YES", "on"])
@pytest.mark.parametrize("no", ["0", "False", "no", "off"])
def test_words_for_a_flag(text: str, no: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for word, value in ((text, True), (no, False)):
        monkeypatch.setenv("CLIPDEPLOY_OFFLINE", word)
        assert load_settings().given["offline"].value is value


def test_a_file_that_cannot_be_read(cwd: Path) -> None:
    (cwd / CONFIG_FILE).mkdir()
    with pytest.raises(FileError, match=r"cannot read clipdeploy\.toml"):
        load_settings()
    refused(run("zoo", "list"), 1, "cannot read clipdeploy.toml")


def test_a_file_that_is_not_utf8(cwd: Path) -> None:
    (cwd / CONFIG_FILE).write_bytes(b'workspace = "\xff"')
    refused(run("zoo", "list"), 2, "clipdeploy.toml is not valid TOML")


def test_a_byte_order_mark_of_an_editor_is_no_matter(cwd: Path) -> None:
    (cwd / CONFIG_FILE).write_text("max_drop = 0.5", encoding="utf-8-sig")
    assert load_settings().given["max_drop"].value == 0.5


def test_help_and_completion_do_not_read_a_broken_file() -> None:
    write("max_drop =")
    for words in (("--help",), ("verify", "run", "--help"), ("--version",), ("completion", "zsh")):
        result = run(*words)
        assert result.exit_code == 0, words
        assert "not valid TOML" not in result.output
    refused(run("verify", "--data", "x", "--max-drop", "1"), 2, "is not valid TOML")


def test_only_the_working_folder_is_looked_in(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("max_drop = 0.5")
    assert load_settings().file == Path(CONFIG_FILE)
    (cwd / "below").mkdir()
    monkeypatch.chdir(cwd / "below")
    assert load_settings().file is None
    monkeypatch.setenv("CLIPDEPLOY_CONFIG", "../clipdeploy.toml")
    found = load_settings().given["max_drop"]
    assert (found.value, found.origin) == (0.5, "../clipdeploy.toml")


def test_relative_paths_start_at_the_file_or_at_the_working_folder(
    cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = cwd / "kept" / "settings.toml"
    write('workspace = "out"', 'val_data = "/data/val"', 'calibration_data = "~/cal"', to=kept)
    monkeypatch.setenv("CLIPDEPLOY_CONFIG", str(kept))
    given = load_settings().given
    assert given["workspace"].value == cwd / "kept" / "out"
    assert given["val_data"].value == Path("/data/val")
    assert given["calibration_data"].value == Path.home() / "cal"
    monkeypatch.setenv("CLIPDEPLOY_WORKSPACE", "out")
    assert load_settings().given["workspace"].value == Path("out")


def test_the_library_sees_the_file_for_as_long_as_a_command_runs(
    cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = cards.find("clip-vit-base-p16")
    before = cache_folder(), address(card)
    write('home = "kept"', 'mirror = "https://mirror.example/"', "offline = true")
    settings = load_settings()
    with settings.in_environment({}):
        assert cache_folder() == cwd / "kept"
        assert address(card) == f"https://mirror.example/{card.file}"
        assert os.environ["CLIPDEPLOY_OFFLINE"] == "1"
    assert (cache_folder(), address(card)) == before
    assert "CLIPDEPLOY_OFFLINE" not in os.environ
    with settings.in_environment({"offline": False}):
        assert os.environ["CLIPDEPLOY_OFFLINE"] == "0"
    monkeypatch.setenv("CLIPDEPLOY_HOME", "other")
    with load_settings().in_environment({}):
        assert cache_folder() == cwd / "other"
    assert os.environ["CLIPDEPLOY_HOME"] == "other"


def test_a_download_is_forbidden_and_allowed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    write("offline = true", 'mirror = "http://127.0.0.1:9"', 'model = "clip-vit-base-p32"')
    at = ("export", "--workspace", "a")
    result = run(*at)
    assert result.exit_code == 1
    assert "settings: --offline (clipdeploy.toml)" in result.stderr
    assert "downloads are off" in result.stderr
    assert "cannot download http://127.0.0.1:9" in run(*at, "--no-offline").stderr
    monkeypatch.setenv("CLIPDEPLOY_OFFLINE", "0")
    assert "cannot download http://127.0.0.1:9" in run(*at).stderr
    assert "downloads are off" in run(*at, "--offline").stderr


def test_missing_images_name_the_three_ways() -> None:
    for words, variable, line in (
        (("calibrate",), "CLIPDEPLOY_CALIBRATION_DATA", 'calibration_data = "images/calibration"'),
        (("verify",), "CLIPDEPLOY_VAL_DATA", 'val_data = "images/val"'),
        (("search",), "CLIPDEPLOY_VAL_DATA", 'val_data = "images/val"'),
        (("bisect",), "CLIPDEPLOY_VAL_DATA", 'val_data = "images/val"'),
    ):
        result = run(*words)
        assert result.exit_code == 2
        for way in ("--data", variable, line, CONFIG_FILE):
            assert way in result.stderr, words


def test_the_document_has_this_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows == [_documented(setting) for setting in SETTINGS]


def _documented(setting: Setting) -> str:
    options = []
    for words, option in fed_options():
        if option.setting is setting:
            named = "/".join([*option.opts, *option.secondary_opts])
            command = " ".join(words).removesuffix(" run")
            # What every command has is named without one.
            alone = option.opts[0] in ("--workspace", "--model")
            options.append(f"`{named}`" if alone else f"`{command} {named}`")
    otherwise = setting.otherwise or f"`{as_toml(setting.default)}`".replace('"', "")
    cells = (
        f"`{setting.name}`",
        f"`{setting.variable}`",
        ", ".join(sorted(set(options))),
        setting.help,
        otherwise,
    )
    return f"| {' | '.join(cells)} |"


def test_types_take_what_they_show() -> None:
    assert as_toml(Path('a "b"')) == json.dumps('a "b"')
    assert as_toml(True) == "true"
    assert setting_called("max_drop").default == 1.0
