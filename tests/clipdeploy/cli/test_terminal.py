"""What every command shows: in terminals of 80 and 160 columns, with and without colour, in a
file, as JSON, and when it is to be quiet.

The commands, and how to add one: ``tests/support/command_cases.py``.

Covers: clipdeploy/cli/stage_display.py, clipdeploy/core/console.py, clipdeploy/core/progress.py,
    clipdeploy/core/progress_bars.py.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("POSIX terminals", allow_module_level=True)

from command_cases import CASES, Case, prepare, runnable_commands
from command_server import Command, CommandServer
from demo_workspaces import TENSORRT
from terminals import COLOUR, CONTROL, screen, terminal

from clipdeploy.cli.main import main
from clipdeploy.workspace.folder import Workspace

# A command to copy into a shell is not cut, however narrow the terminal is, and no path or address.
TO_COPY = re.compile(r".*-> |\s*\S+$")
NUMBER = re.compile(r"[+-]?\d[\d.,:]*(?:e[+-]\d+)?")
NARROW, BROAD = 80, 160
FULL = Path("/dev/full")


@dataclass(frozen=True)
class Shown:
    """What a command wrote, and its exit code."""

    out: bytes
    err: bytes
    status: int


@pytest.fixture(scope="module")
def server(commands: CommandServer, tmp_path_factory: pytest.TempPathFactory) -> CommandServer:
    home = tmp_path_factory.mktemp("home")
    return commands.with_env({"CLIPDEPLOY_OFFLINE": "1", "CLIPDEPLOY_HOME": str(home)})


Show = Callable[..., Shown]


@pytest.fixture(scope="module")
def show(
    complete_demo: Workspace, server: CommandServer, tmp_path_factory: pytest.TempPathFactory
) -> Show:
    """Runs a case once for each way to look at it, in a folder of its own; a long one always in the
    same folder, where it has been run before unless ``first``.
    """

    @functools.cache
    def prepared(words: str) -> Path:
        folder = tmp_path_factory.mktemp("run")
        prepare(complete_demo, folder)
        return folder

    @functools.cache
    def run(
        words: str,
        columns: int | None = None,
        *,
        colour: bool = True,
        first: bool = False,
        full: bool = False,
    ) -> Shown:
        long = next((case.words for case in LONG if words.startswith(case.words)), None)
        if long and not first:
            run(long, NARROW, first=True)
        folder = prepared(long or f"{words} {columns} {colour}")
        env = dict.fromkeys(("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "COLORTERM"))
        env |= {"TERM": "xterm-256color"} | ({} if colour else {"NO_COLOR": "1"})
        if columns is None:
            out, err = (FULL, FULL) if full else (folder / "out", folder / "err")
            for path in (folder / "out", folder / "err"):
                path.unlink(missing_ok=True)
            command = Command(tuple(words.split()), str(folder), str(out), str(err), env)
            status = server.run(command)
            return Shown(*((b"", b"") if full else (out.read_bytes(), err.read_bytes())), status)
        with terminal(columns) as seen, terminal(columns) as errors:
            command = Command(tuple(words.split()), str(folder), seen.path, errors.path, env)
            status = server.run(command)
        if not long:
            shutil.rmtree(folder)
        return Shown(seen.raw, errors.raw, status)

    return run


def _parameters() -> Iterator[object]:
    for cases in CASES.values():
        for case in cases:
            marks = [pytest.mark.slow] if case.slow else []
            if case.engine:
                marks.append(pytest.mark.skipif(not TENSORRT, reason="needs TensorRT-RTX"))
            yield pytest.param(case, id=case.words.replace(" ", "_"), marks=marks)


LONG = [case for cases in CASES.values() for case in cases if case.long]
every_case = pytest.mark.parametrize("case", list(_parameters()))


def words_of(lines: list[str]) -> Counter[str]:
    """The words with # for numbers, which differ from run to run."""
    return Counter(NUMBER.sub("#", word) for line in lines for word in line.split())


def width(line: str) -> int:
    """The columns that a line takes."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in line)
    return len(line) + wide


def too_wide(lines: list[str], columns: int) -> list[str]:
    return [line for line in lines if width(line) > columns and not TO_COPY.match(line)]


def test_every_command_is_shown() -> None:
    assert set(CASES) == runnable_commands(main)


def check_screens(case: Case, shown: Shown, columns: int) -> None:
    for lines in (screen(shown.out), screen(shown.err)):
        assert case.program or too_wide(lines, columns) == []
        # An ellipsis stands for text that was cut off.
        assert "…" not in "".join(lines)
        assert "Traceback" not in "".join(lines)


@pytest.mark.slow
@pytest.mark.skipif(not TENSORRT, reason="needs TensorRT-RTX")
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.words.replace(" ", "_"))
def test_the_first_run_of_a_long_command(case: Case, show: Show) -> None:
    shown = show(case.words, NARROW, first=True)
    assert shown.status == 0, screen(shown.err)
    check_screens(case, shown, NARROW)
    # The other tests look at runs whose work is done, which show the same result.
    again = show(case.words)
    assert words_of(screen(shown.out)) == words_of(again.out.decode().splitlines())
    assert re.search(case.long.encode(), shown.err)
    assert not re.search(case.long.encode(), again.err)


@pytest.mark.slow
@pytest.mark.skipif(not TENSORRT or not FULL.exists(), reason="needs TensorRT-RTX and /dev/full")
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.words.replace(" ", "_"))
def test_a_long_command_keeps_its_code_on_a_full_disk(case: Case, show: Show) -> None:
    assert show(case.words, full=True).status == 0


@every_case
def test_in_a_terminal(case: Case, show: Show) -> None:
    narrow, broad = show(case.words, NARROW), show(case.words, BROAD, colour=False)
    file = show(case.words)
    assert (narrow.status, broad.status, file.status) == (0, 0, 0), screen(narrow.err)
    for shown, columns in ((narrow, NARROW), (broad, BROAD)):
        check_screens(case, shown, columns)
    # Nothing is lost for want of room: no word, and no piece of one.
    assert words_of(screen(narrow.out)) == words_of(screen(broad.out))
    assert words_of(screen(narrow.out)) == words_of(file.out.decode().splitlines())


@every_case
def test_without_colour(case: Case, show: Show) -> None:
    shown = show(case.words, BROAD, colour=False)
    assert not COLOUR.search(shown.out + shown.err)


def test_colour_says_what_the_verdict_is(show: Show) -> None:
    """Beside NO_COLOR: there is something that it takes away."""
    words = CASES["verify merge"][0].words
    assert b"\x1b[32mequivalent" in show(words, NARROW).out
    assert COLOUR.search(show(words, NARROW).out)
    assert b"equivalent" in show(words, BROAD, colour=False).out


@every_case
def test_in_a_file(case: Case, show: Show) -> None:
    shown = show(case.words)
    assert shown.status == 0
    for data in (shown.out, shown.err):
        assert not CONTROL.search(data), CONTROL.findall(data)
        assert all(line == line.rstrip() for line in data.decode().splitlines())
    assert shown.out.endswith(b"\n")


@every_case
def test_as_json(case: Case, show: Show) -> None:
    shown = show(f"{case.words} --json")
    assert shown.status == 0
    assert json.loads(shown.out)
    assert shown.out.count(b"\n") == 1 or shown.out.lstrip().startswith((b"{", b"["))
    assert not CONTROL.search(shown.out + shown.err)


@every_case
def test_quietly(case: Case, show: Show) -> None:
    shown = show(case.words if case.program else f"{case.words} --quiet")
    assert (shown.status, shown.err) == (0, b"")
    assert words_of(shown.out.decode().splitlines()) == words_of(
        show(case.words).out.decode().splitlines()
    )


def test_the_server_shows_what_a_process_of_its_own_does(show: Show) -> None:
    words = "zoo show demo"
    done = subprocess.run(
        [sys.executable, "-m", "clipdeploy", *words.split()], capture_output=True, check=True
    )
    assert (done.stdout, done.stderr) == (show(words).out, show(words).err)


BAD = """
import click
from rich.console import Console
from rich.table import Table

table = Table()
for column in ("a rather long title", "another long title", "verdict"):
    table.add_column(column, no_wrap=True)
table.add_row("clip-vit-base-p16_laion2b-in12k-pre_3rdparty_in1k", "x" * 40, "equivalent")
Console().print(table, style="red")
click.echo("a sentence " * 9)
"""


def test_bad_output_is_found() -> None:
    with terminal(NARROW) as seen, open(seen.path, "wb") as device:
        subprocess.run([sys.executable, "-c", BAD], stdout=device, check=True)
    lines = screen(seen.raw)
    assert too_wide(lines, NARROW) == [("a sentence " * 9).strip()]
    assert "…" in "".join(lines)
    assert COLOUR.search(seen.raw)
    assert CONTROL.search(seen.raw)
    assert words_of(lines) != words_of(["clip-vit-base-p16_laion2b-in12k-pre_3rdparty_in1k"])


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"10 %\r\x1b[2K100 %\r\n", ["100 %"]),
        (b"a\r\nb\x1b[1A\rc", ["c", "b"]),
        (b"\x1b[31mred\x1b[0m\r\n\r\n", ["red"]),
        (b"", []),
    ],
)
def test_what_stands_on_a_screen(raw: bytes, shown: list[str]) -> None:
    assert screen(raw) == shown


@pytest.mark.parametrize(
    ("raw", "coloured"),
    [
        (b"\x1b[31mred", True),
        (b"\x1b[1;32mbold green", True),
        (b"\x1b[38;5;214morange", True),
        (b"\x1b[97mwhite", True),
        (b"\x1b[1mbold", False),
        (b"\x1b[0m", False),
        (b"\x1b[2Kdone 31m", False),
    ],
)
def test_what_is_a_colour(raw: bytes, coloured: bool) -> None:
    assert bool(COLOUR.search(raw)) == coloured
