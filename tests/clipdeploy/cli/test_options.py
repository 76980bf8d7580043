"""Option names: one name for one thing, and former names that still work."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_cases import every_command
from verify_command import run

from clipdeploy.cli.main import main
from clipdeploy.cli.options import Option
from clipdeploy.cli.settings import SETTINGS, load_settings

COMMANDS = dict(every_command(main))
# The command, words with a former name, the present name, and the parameter that it sets.
FORMER = [
    ("export", "--batch 4", "--fixed-batch", "fixed_batch"),
    ("verify run", "--limit 9 --data x", "--images", "val_images"),
    ("verify run", "--report a.md --data x", "--output", "reports"),
    ("verify run", "--cache --data x", "--cache-crops", "cache_crops"),
    ("verify run", "--no-cache --data x", "--no-cache-crops", "cache_crops"),
    ("verify merge", "--report a.md", "--output", "reports"),
    ("bisect", "--plot=a.svg --data x", "--output", "plot"),
    ("verify texts", "--report a.html x.txt", "--output", "reports"),
    ("search", "--plot a.svg --data x", "--output", "plot"),
    ("search", "--confirm y --data x", "--confirm-data", "confirm_data"),
    ("benchmark", "--plot a.svg", "--output", "plot"),
    ("benchmark", "--provider cpu", "--device", "device"),
    ("deploy", "--val x", "--val-data", "val_data"),
    ("deploy", "--limit 9 --val-data x", "--val-images", "val_images"),
    ("deploy", "--calibration y --val-data x", "--calibration-data", "calibration_data"),
    ("deploy", "--images 9 --val-data x", "--calibration-images", "calibration_images"),
]
DATA = ("calibration_data", "val_data", "calibration_images", "val_images")


def options() -> list[tuple[str, Option]]:
    return [
        (" ".join(path), each)
        for path, command in COMMANDS.items()
        for each in command.params
        if isinstance(each, Option)
    ]


def old_name(words: str) -> str:
    return words.split()[0].partition("=")[0]


def parsed(name: str, words: str) -> dict[str, object]:
    return COMMANDS[tuple(name.split())].make_context("clipdeploy", words.split()).params


@pytest.mark.parametrize(("name", "words", "new", "parameter"), FORMER)
def test_a_former_name_sets_the_same_value(name: str, words: str, new: str, parameter: str) -> None:
    before, after = parsed(name, words), parsed(name, words.replace(old_name(words), new, 1))
    assert before == after
    assert before[parameter] is not None


@pytest.mark.parametrize(("name", "words", "new", "parameter"), FORMER)
def test_a_former_name_is_noted_once_and_not_in_the_help(
    name: str, words: str, new: str, parameter: str, cwd: Path
) -> None:
    typed = [*name.split(), *words.split(), "--model", "demo"]
    result = run(*typed, *words.split())
    note = f"{old_name(words)} is now {new}\n"
    assert result.stderr.count(note) == 1, result.output
    assert note not in run(*typed, "--quiet").stderr
    shown = run(*name.split(), "--help").output.split()
    assert new in [word.rstrip(",") for word in shown]
    if (name, old_name(words)) != ("deploy", "--images"):
        assert old_name(words) not in [word.rstrip(",") for word in shown]


def test_all_former_names_are_tested() -> None:
    known = {(name, old, new) for name, each in options() for old, new in each.formerly.items()}
    assert known == {(name, old_name(words), new) for name, words, new, _ in FORMER}


def test_a_former_name_without_its_value_is_a_usage_error() -> None:
    result = run("deploy", "--val")
    assert result.exit_code == 2
    assert "--val" in result.stderr


@pytest.mark.parametrize("parameter", DATA)
def test_images_have_the_same_names_in_every_command(parameter: str) -> None:
    long = f"--{parameter.replace('_', '-')}"
    short = "--data" if parameter.endswith("data") else "--images"
    found = [each for _, each in options() if long in each.opts]
    assert len(found) >= 3
    for each in found:
        assert each.name == parameter
        assert set(each.opts) <= {long, short}


def test_every_file_is_written_by_output() -> None:
    found = [each for _, each in options() if "-o" in each.opts]
    assert len(found) == 6
    assert all("--output" in each.opts for each in found)


OLD_SETTINGS = [setting for setting in SETTINGS if setting.old_name]


@pytest.mark.parametrize("setting", OLD_SETTINGS, ids=lambda setting: setting.old_name)
def test_a_former_key_gives_the_same_setting(setting: object, cwd: Path) -> None:
    row = next(each for each in SETTINGS if each is setting)
    text = "true" if row.example is True else "5" if row.example == 20.0 else '"images"'
    (cwd / "clipdeploy.toml").write_text(f"{row.old_name} = {text}\n")
    old = load_settings()
    assert old.renamed == (f"clipdeploy.toml: {row.old_name} is now {row.name}",)
    (cwd / "clipdeploy.toml").write_text(f"{row.name} = {text}\n")
    new = load_settings()
    assert (new.given, new.renamed) == (old.given, ())
    (cwd / "clipdeploy.toml").write_text(f"{row.old_name} = {text}\n{row.name} = {text}\n")
    result = run("config")
    assert result.exit_code == 2
    assert f"{row.old_name} and {row.name} are the same setting" in result.stderr


@pytest.mark.parametrize("setting", OLD_SETTINGS, ids=lambda setting: setting.old_name)
def test_a_former_variable_gives_the_same_setting(
    setting: object, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = next(each for each in SETTINGS if each is setting)
    if not row.old_variable:
        return
    monkeypatch.setenv(row.old_variable, "1")
    found = run("config")
    assert found.exit_code == 0
    assert f"{row.old_variable} is now {row.variable}\n" in found.stderr
    assert f"{row.old_variable} is not a setting" not in found.stderr
    assert load_settings().given[row.name].origin == row.old_variable
    monkeypatch.setenv(row.variable, "1")
    assert load_settings().given[row.name].origin == row.variable
