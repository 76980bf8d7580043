"""Every option that takes a number has a span, and refuses what lies outside in one line.

Covers: clipdeploy/core/spans.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from command_cases import every_command
from verify_command import run

from clipdeploy.cli.main import main
from clipdeploy.cli.settings import SETTINGS
from clipdeploy.core.spans import THREADS

LONG = "9" * 5000
# Decibels may be negative, and the mean of samples around 0.
SIGNED = ("--min-sqnr", "--mean")
NEVER = ("-1", "nan", "inf", "-inf", "1e400", "10" * 30, LONG, "x", "")


def numeric(option: click.Parameter) -> bool:
    kinds = (click.types.IntParamType, click.types.FloatParamType)
    return isinstance(option, click.Option) and isinstance(option.type, kinds)


OPTIONS = [
    (path, option.opts[0], option.nargs)
    for path, command in every_command(main)
    for option in command.params
    if numeric(option)
]
# What a command takes beside the option, so that nothing else is missing.
NEEDED = {
    "calibrate": "--data images",
    "search": "--data images",
    "bisect": "--data images",
    "deploy": "--val-data images",
    "predict": "image.png",
    "package": "--triton t",
    "verify run": "--data images",
}


def words(path: tuple[str, ...]) -> list[str]:
    name = " ".join(path)
    return [*path, *NEEDED.get(name, "").split(), "--model", "demo"]


def test_all_are_found() -> None:
    assert len(OPTIONS) >= 35
    assert (("verify", "run"), "--cache-size", 1) in OPTIONS
    assert (("export",), "--mean", 3) in OPTIONS


@pytest.mark.parametrize(("path", "option", "count"), OPTIONS)
def test_a_span_ends_on_both_sides(path: tuple[str, ...], option: str, count: int) -> None:
    command = dict(every_command(main))[path]
    (found,) = (each for each in command.params if option in each.opts)
    assert found.nargs == count
    assert isinstance(found.type, click.IntRange | click.FloatRange)
    assert found.type.min is not None
    assert found.type.min >= (-100 if option in SIGNED else 0)
    assert found.type.max is not None
    assert found.type.max < 2**63


@pytest.mark.parametrize(
    ("path", "option", "count", "value"),
    [
        pytest.param(*each, value, id=f"{each[0]}-{each[1]}-{value[:8] or 'empty'}")
        for each in OPTIONS
        for value in NEVER
        if not (value == "-1" and each[1] in SIGNED)
    ],
)
def test_a_number_that_cannot_be(
    path: tuple[str, ...], option: str, count: int, value: str, cwd: Path
) -> None:
    given = [f"{option}={value}"] if count == 1 else [option, *[value] * count]
    result = run(*words(path), *given)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert option in line
    assert len(line) < 200
    assert list(cwd.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        f"benchmark --batch {LONG}",
        "benchmark --batch 0",
        "benchmark --batch 1,1000000000",
        "benchmark --batch 1,,8",
        f"build-engine --profile 1,2,{LONG}",
        "build-engine --profile 0,1,2",
        "build-engine --profile 1,8,1000000000",
        "build-engine --profile []",
        "calibrate --data images --shard 1/0",
        f"calibrate --data images --shard 1/{LONG}",
        f"verify --data images --shard {LONG}/{LONG}",
        "verify --data images --shard 1/1000000000000",
        "verify --data images --baseline nan",
        "verify --data images --baseline 1e400",
        f"verify --data images --ray host:{LONG}",
        "verify merge --baseline 80,101",
    ],
)
def test_numbers_inside_a_text(text: str, cwd: Path) -> None:
    result = run(*text.split(), "--model", "demo")
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(line) < 250
    assert list(cwd.iterdir()) == []


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e300"])
@pytest.mark.parametrize("name", ["max_drop", "cache_size"])
def test_settings_have_the_same_spans(name: str, value: str, cwd: Path) -> None:
    (cwd / "clipdeploy.toml").write_text(f"{name} = {value}\n")
    assert name in {setting.name for setting in SETTINGS}
    result = run("verify", "--data", "images", "--cache-crops", "--model", "demo")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")


def test_more_threads_than_cores_could_serve_are_refused(cwd: Path) -> None:
    """64 of them took minutes on two cores for what one does in seconds."""
    most = min(512, 8 * (os.cpu_count() or 1))
    assert most in THREADS
    assert most + 1 not in THREADS
    result = run(*words(("verify", "run")), f"--threads={most + 1}")
    assert result.exit_code == 2
    assert f"0 to {most}" in result.stderr
