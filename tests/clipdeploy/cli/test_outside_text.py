"""Names and messages from outside on a terminal: they are shown, and do nothing else."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from clipdeploy.cli.main import main
from clipdeploy.cli.stage_display import StageDisplay
from clipdeploy.core.console import PlainConsole
from clipdeploy.core.printable import is_one_line
from clipdeploy.core.progress_bars import ProgressBars
from clipdeploy.models import cards

if sys.platform == "win32":
    pytest.skip("such names are not allowed there", allow_module_level=True)

# Clears the screen, sets the window's title, overwrites the line, reverses it, forges a line.
ODD = "a\x1b[2J\x1b]0;x\x07\rb\u202ec\x9b31m\nPASS"
CLEAN = r"a\x1b[2J\x1b]0;x\x07\rb\u202ec\x9b31m\nPASS"
# The sequences of colours and styles that rich writes itself.
STYLE = re.compile(r"\x1b\[[\d;]*m")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def check(text: str) -> None:
    """Every line is free of what acts on a terminal, and none was forged."""
    lines = text.splitlines()
    assert "\n".join(lines) == text.rstrip("\n")
    for line in lines:
        assert is_one_line(line), line
        assert line.strip() != "PASS"


@pytest.fixture
def odd_image(artifacts: Path, digits: Path, tmp_path: Path) -> Path:
    path = tmp_path / f"{ODD}.png"
    shutil.copy(next(iter(sorted((digits / "3").iterdir()))), path)
    return path


def test_file_names_in_results(artifacts: Path, odd_image: Path) -> None:
    result = run("predict", odd_image, "--workspace", artifacts, "--model", "demo")
    assert result.exit_code == 0, result.output
    check(result.output)
    assert CLEAN in result.stdout


def test_file_names_in_json(artifacts: Path, odd_image: Path) -> None:
    result = run("predict", odd_image, "--workspace", artifacts, "--model", "demo", "--json")
    assert result.exit_code == 0, result.output
    check(result.output)
    assert json.loads(result.stdout)["images"][0]["image"] == str(odd_image)


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", f"{ODD}.onnx"),
        ("predict", f"{ODD}.png", "--model", "demo"),
        ("package", f"{ODD}.onnx", "--triton", "out"),
        ("export", "--model", "demo", "--checkpoint", f"{ODD}.pth"),
        ("zoo", "show", ODD),
        ("zoo", "list", ODD),
        (ODD,),
        ("zoo", f"--{ODD}"),
        ("calibrate", "--model", "demo", "--data", ODD),
        ("verify", "--model", "demo", "--data", ODD),
    ],
)
def test_names_in_errors(words: tuple[str, ...], cwd: Path) -> None:
    result = run(*words)
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.output
    check(result.output)


def test_names_in_settings(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cwd / "clipdeploy.toml").write_text(f"{json.dumps(ODD)} = 1\n")
    result = run("config")
    assert result.exit_code == 2
    check(result.output)
    (cwd / "clipdeploy.toml").write_text(f"calibration = {json.dumps(ODD)}\n")
    result = run("config")
    check(result.stderr)
    monkeypatch.setenv("CLIPDEPLOY_WORKSPACE", ODD)
    check(run("predict", "x.png").output)


def test_the_passport_of_a_graph(artifacts: Path, digits: Path) -> None:
    odd = artifacts.parent / f"{ODD}.onnx"
    shutil.copy(artifacts / cards.DEMO / "fp32.onnx", odd)
    result = run("inspect", odd)
    assert result.exit_code == 0, result.output
    check(STYLE.sub("", result.output))


def on_a_terminal() -> PlainConsole:
    return PlainConsole(file=io.StringIO(), force_terminal=True, width=200, color_system="256")


def test_rich_moves_the_cursor_and_names_do_not() -> None:
    from rich.table import Table
    from rich.text import Text

    console = on_a_terminal()
    table = Table()
    table.add_column(Text(ODD))
    table.add_row(Text(ODD, style="bold red"))
    console.print(table)
    console.print(ODD, markup=False)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert STYLE.search(written)
    for line in STYLE.sub("", written).split("\n"):
        assert is_one_line(line)


def test_the_checklist_shows_odd_names_and_no_markup() -> None:
    console = on_a_terminal()
    display = StageDisplay(console=console)
    display.planned(["export"])
    with display:
        display.started("export")
        with display.task(f"load {ODD} [/nothing] [red]"):
            pass
        display.note(ODD)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    for action in ("\x1b[2J\x1b]0", "\u202e", "\x9b"):
        assert action not in written
    assert r"\x1b]0;x\x07" in written


def test_a_bar_shows_odd_names_and_no_markup() -> None:
    from terminals import terminal

    with terminal(200) as screen:
        device = os.open(screen.path, os.O_RDWR)
        saved = sys.stderr
        sys.stderr = os.fdopen(device, "w")
        try:
            with ProgressBars().task(f"load {ODD} [/nothing]", 3) as advance:
                advance(3)
        finally:
            sys.stderr.close()
            sys.stderr = saved
    assert b"\x1b]0;x" not in screen.raw
    assert rb"\x1b]0;x\x07" in screen.raw
    assert b"[/nothing]" in screen.raw
