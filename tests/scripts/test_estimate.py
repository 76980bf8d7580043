"""The tables of estimated speeds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from script_module import load_script

NUMBERS = Path(__file__).resolve().parents[2] / "docs" / "numbers.md"


def test_the_tables_in_the_documentation_are_what_the_script_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    load_script("bench/estimate").main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(printed) == 11 + 4 * 11 + 10 + 8
    page = NUMBERS.read_text(encoding="utf-8")
    missing = [line for line in printed if f"    {line}\n" not in page]
    assert missing == []
    # Any other number would be missed.
    changed = re.sub(r"\d(?=\d*$)", "x", printed[3])
    assert f"    {changed}\n" not in page
