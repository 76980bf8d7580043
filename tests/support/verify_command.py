"""Runs ``clipdeploy verify`` on the demo's test digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from clipdeploy.cli.main import main
from clipdeploy.models import cards

__all__ = ["FEW", "TEST", "good", "merge", "refused", "run", "verify"]

TEST = cards.demo_file("test.zip")
# With 12 images and no difference a drop below 25 points is proven.
FEW = ("--images", "12", "--max-drop", "30", "--batch", "3", "--workers", "0")


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def verify(artifacts: Path, *words: str | Path, data: Path = TEST) -> Result:
    at = ("--model", "demo", "--workspace", artifacts)
    return run("verify", "--data", data, *at, *words)


def merge(artifacts: Path, *words: str | Path) -> Result:
    return run("verify", "merge", "--model", "demo", "--workspace", artifacts, *words)


def good(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in error
