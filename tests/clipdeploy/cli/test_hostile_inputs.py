"""Two hundred hostile inputs: an error in one line, in time, and nothing written elsewhere.

They are made in ``tests/support/hostile_inputs.py``, by kind and number; a new kind is a row there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from click.testing import CliRunner, Result

if sys.platform == "win32":
    pytest.skip("pipes and devices of POSIX", allow_module_level=True)

from hostile_inputs import Case, Hostile, hostile_inputs

from clipdeploy.cli.main import main
from clipdeploy.core.printable import is_one_line
from clipdeploy.workspace.folder import Workspace

# Seconds: what takes longer counts as hanging.
LIMIT = 15
INPUTS = hostile_inputs()
# A few of each kind run as programs of their own, where nothing is caught by a runner.
AS_PROGRAMS = [each for each in INPUTS if each.name.endswith(("-pipe", "-name-0"))][:4]


class TooSlow(BaseException):
    """Not caught by anything that catches errors."""


@pytest.fixture
def clock() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def case(demo_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    root = tmp_path / "a" / "b" / "case"
    root.mkdir(parents=True)
    monkeypatch.chdir(root)
    monkeypatch.delenv("CLIPDEPLOY_CONFIG")
    return Case(root, demo_workspace)


def everything(folder: Path) -> set[str]:
    found = set()
    for parent, folders, files in os.walk(folder):
        found |= {os.path.join(parent, name) for name in (*folders, *files)}
    return found


def words_of(hostile: Hostile, case: Case) -> list[str]:
    return [str(word).replace("{out}", str(case.root / "out")) for word in hostile.make(case)]


def check_output(text: str) -> None:
    assert "Traceback" not in text
    assert "weights_only" not in text
    # It got as far as the input.
    assert "No such option '--" not in text
    assert "s3cret" not in text
    for line in text.split("\n"):
        assert is_one_line(line), line


def check(hostile: Hostile, result: Result) -> None:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in hostile.codes, result.output
    check_output(result.output)
    if result.exit_code == 1:
        [error] = [line for line in result.stderr.split("\n") if line.startswith("error: ")]
        assert len(error) < 2000


def test_there_are_two_hundred() -> None:
    assert len(INPUTS) >= 200
    assert len({each.name for each in INPUTS}) == len(INPUTS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hostile", INPUTS, ids=lambda hostile: hostile.name)
def test_a_hostile_input(hostile: Hostile, case: Case, clock: None) -> None:
    words = words_of(hostile, case)
    outside = case.root.parent.parent.parent
    before = everything(outside)
    result = CliRunner().invoke(main, words)
    check(hostile, result)
    made = {path for path in everything(outside) - before if "/home" not in path}
    # A workspace's folder and its lock may be made before the input is read; no result is.
    results = {path for path in made if path.endswith((".onnx", ".engine", ".py", ".pbtxt"))}
    assert not results
    allowed = (str(case.artifacts.root), str(case.root / "out"))
    assert not {path for path in made if not path.startswith(allowed)}


@pytest.mark.parametrize("hostile", AS_PROGRAMS, ids=lambda hostile: hostile.name)
def test_a_hostile_input_of_a_program(hostile: Hostile, case: Case) -> None:
    words = [sys.executable, "-m", "clipdeploy", *words_of(hostile, case)]
    done = subprocess.run(words, capture_output=True, timeout=LIMIT + 15)
    assert done.returncode in hostile.codes
    check_output(done.stderr.decode())
