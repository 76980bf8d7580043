"""``--help`` of every command and group: what it says, what it imports, and what it costs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

import click
import pytest
from click.testing import CliRunner
from command_cases import every_command

from clipdeploy.cli.main import main

COMMANDS = dict(every_command(main))
HEAVY = {"torch", "tensorrt", "tensorrt_rtx", "onnx", "onnxruntime", "numpy"}
SCRIPT = f"""
import sys
from clipdeploy.cli.main import main
try:
    main(sys.argv[1:], prog_name="clipdeploy")
finally:
    print("HEAVY", sorted({HEAVY!r} & sys.modules.keys()))
"""
# Seconds of CPU time: what a person takes for "at once".
LIMIT = 0.5

every_path = pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "main")


@every_path
def test_help_imports_neither_torch_nor_tensorrt(path: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *path, "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Usage: clipdeploy")
    assert done.stdout.endswith("HEAVY []\n")


@every_path
def test_everything_has_a_word_of_help(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def cpu_seconds(words: Sequence[str]) -> float:
    """CPU time, user's and system's, of a process and all that it waited for.

    Not the time on the clock: a busy machine stretches that.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        pid = os.posix_spawn(
            words[0], words, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, 1)]
        )
    finally:
        os.close(null)
    _, status, used = os.wait4(pid, 0)
    assert status == 0
    return used.ru_utime + used.ru_stime


def least_cpu_seconds(words: Sequence[str], tries: int = 3) -> float:
    """The best of a few tries, or the first that is good enough: others disturb caches as well."""
    best = float("inf")
    for _ in range(tries):
        best = min(best, cpu_seconds(words))
        if best < LIMIT:
            break
    return best


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="POSIX resource usage")
@every_path
def test_help_costs_little(path: tuple[str, ...]) -> None:
    words = [sys.executable, "-m", "clipdeploy", *path, "--help"]
    assert least_cpu_seconds(words) < LIMIT


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="POSIX resource usage")
def test_what_costs_much_is_noticed() -> None:
    busy = f"import time\nwhile time.process_time() < {LIMIT}: pass"
    started = time.perf_counter()
    assert least_cpu_seconds([sys.executable, "-c", busy], tries=2) >= LIMIT
    assert time.perf_counter() - started >= LIMIT
    # Waiting costs nothing.
    assert least_cpu_seconds([sys.executable, "-c", f"import time; time.sleep({LIMIT})"]) < LIMIT


@pytest.mark.parametrize("columns", [80, 120])
def test_the_main_help_lists_all_commands_in_whole_lines(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = CliRunner().invoke(main, ["--help"], terminal_width=columns).output.splitlines()
    listed = lines[lines.index("Prepare:") :]
    assert not any("..." in line for line in listed)
    assert max(map(len, lines)) <= columns
    commands = [line.split()[0] for line in listed if line.startswith("  ")]
    # No summary is continued on a second line.
    assert commands == list(main.commands)
    headings = [line for line in listed if line and not line.startswith(" ")]
    assert headings == ["Prepare:", "Judge:", "Deploy:", "Set up:"]


@pytest.mark.parametrize("words", [["--help"], ["merge", "--help"], ["run", "--help"], []])
def test_the_usage_of_verify_names_verify(words: list[str]) -> None:
    program = [sys.executable, "-m", "clipdeploy", "verify"]
    done = subprocess.run([*program, *words], capture_output=True, text=True, check=False)
    below = " merge" if "merge" in words else ""
    assert (done.stdout or done.stderr).startswith(f"Usage: clipdeploy verify{below} [OPTIONS] [")
