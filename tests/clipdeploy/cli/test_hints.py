"""A hint names only options that exist, and a command tells only of those that it has."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_cases import every_command
from verify_command import run

import calibration
import clipdeploy
import exporters
from clipdeploy.cli.hints import OPTION, followable, named_commands, options_of
from clipdeploy.cli.main import main

COMMANDS = {" ".join(path): command for path, command in every_command(main) if path}
# Options of these programs are not ours.
OTHERS = ("pip install", "ray start")


def text(node: ast.expr) -> str:
    """The words of a literal, its values left out."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "..."
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def hints() -> Iterator[tuple[str, str]]:
    """Every literal in a ``hint`` or ``mend`` of the three packages, with its place."""
    for package in (clipdeploy, calibration, exporters):
        (root,) = package.__path__
        for path in sorted(Path(root).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                for keyword in node.keywords if isinstance(node, ast.Call) else ():
                    if keyword.arg in ("hint", "mend"):
                        for part in ast.walk(keyword.value):
                            if isinstance(part, ast.expr) and OPTION.search(text(part)):
                                yield text(part), f"{path.name}:{node.lineno}"


HINTS = sorted(set(hints()))


def test_there_are_hints() -> None:
    assert len(HINTS) > 40


@pytest.mark.parametrize(("hint", "place"), HINTS)
def test_options_of_hints_exist(hint: str, place: str) -> None:
    if any(other in hint for other in OTHERS):
        return
    for way in hint.split(", or "):
        options = set(OPTION.findall(way)) - {"--help"}
        assert options <= options_of(main), place
        if named := named_commands(way, main):
            assert options <= set().union(*map(options_of, named)), place


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_tells_of_its_own_options(name: str) -> None:
    command = COMMANDS[name]
    for hint, place in HINTS:
        ways = followable(hint, command, main).split(", or ")
        if len(ways) == len(hint.split(", or ")):
            continue
        for way in ways:
            strange = set(OPTION.findall(way)) & options_of(main) - options_of(command)
            assert not strange or named_commands(way, main), place


@pytest.mark.parametrize(
    ("command", "hint", "expected"),
    [
        ("predict", "remove it, or pass --skip-unreadable", "remove it"),
        ("verify run", "remove it, or pass --skip-unreadable", None),
        ("calibrate", "use fewer processes, or none with --workers 0", "use fewer processes"),
        ("deploy", "choose another --name, or remove it", "remove it"),
        ("package", "choose another --name, or remove it", None),
        # It names the command that has the option.
        ("package", "build it without --strip-weights, or take another", None),
        # Another program's, and nothing else to do.
        ("inspect", "pip install --force-reinstall torch", None),
        ("inspect", "pass --skip-unreadable", None),
    ],
)
def test_ways_that_a_command_does_not_have(command: str, hint: str, expected: str | None) -> None:
    assert followable(hint, COMMANDS[command], main) == (expected or hint)


def test_an_unreadable_image_in_commands_with_and_without_the_option(
    artifacts: Path, digits: Path
) -> None:
    broken = digits / "3" / "broken.png"
    broken.write_bytes(b"\x89PNG and no more")
    at = ("--model", "demo", "--workspace", artifacts)
    predicted = run("predict", broken, *at)
    assert predicted.exit_code == 1
    assert "--skip-unreadable" not in predicted.stderr
    assert "repair or remove it)" in predicted.stderr
    calibrated = run("calibrate", "--data", digits, *at)
    assert calibrated.exit_code == 1
    assert "--skip-unreadable" in calibrated.stderr


def test_too_many_images_are_asked_for(artifacts: Path, digits: Path) -> None:
    at = ("--data", digits, "--model", "demo", "--workspace", artifacts)
    for words in (("calibrate", "--images", "900"), ("verify", "--images", "900", "--graphs-only")):
        result = run(*words, *at)
        assert result.exit_code == 1, result.output
        assert "900 are needed (use fewer images, or add some)" in result.stderr
