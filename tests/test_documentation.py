"""The README against the program: every command is in it, and what it shows to type exists."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from clipdeploy.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_is_in_the_readme_and_has_help() -> None:
    for name, command in main.commands.items():
        assert f"clipdeploy {name}" in README
        assert command.help


def command_lines() -> list[str]:
    lines = re.findall(r"^    (clipdeploy(?: [^\s#]+)+)(?:\s+#.*)?$", README, flags=re.MULTILINE)
    return sorted(set(lines))


def test_there_are_command_lines_to_check() -> None:
    assert len(command_lines()) >= 4


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_parse(line: str) -> None:
    words = line.split()[1:]
    command = main.commands[words[0]]
    assert isinstance(command, click.Command)
    command.make_context(words[0], words[1:])


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_scripts_of_the_readme_exist() -> None:
    for script in set(re.findall(r"scripts/\w+\.(?:sh|py)", README)):
        assert (ROOT / script).is_file(), script
