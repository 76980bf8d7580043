from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from script_module import load_script

ROOT = Path(__file__).resolve().parents[2]
script = load_script("support_table")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def documented() -> list[list[str]]:
    """The rows of the table in the documentation."""
    page = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    _, found, rest = page.partition("\n".join(script.header()) + "\n")
    assert found
    return [cells(line) for line in rest.partition("\n\n")[0].splitlines()]


def setup() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def test_every_row_of_the_page_is_whole_and_a_success() -> None:
    assert documented()
    for python, *versions, result in documented():
        assert re.fullmatch(r"3\.\d+\.\d+", python)
        assert len(versions) == len(script.COLUMNS)
        assert result == "exit code 0"


def test_classifiers_name_the_pythons_that_were_run() -> None:
    classifiers = setup()["metadata"]["classifiers"]
    declared = re.findall(r"Python :: (3\.\d+)", classifiers)
    assert sorted(declared) == sorted({row[0].rpartition(".")[0] for row in documented()})


def test_the_versions_are_such_as_setup_cfg_asks_for() -> None:
    lines = setup()["options"]["install_requires"].splitlines()
    wanted = {one.name.replace("_", "-"): one for one in map(Requirement, filter(None, lines))}
    for row in documented():
        for name, version in zip(script.COLUMNS.values(), row[1:-1], strict=True):
            assert wanted[name].specifier.contains(version)


def test_a_program_does_not_see_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = "import os; print(os.getcwd(), 'PYTHONPATH' in os.environ)"
    done = script.run([sys.executable, "-c", code], tmp_path)
    assert done.stdout.split() == [str(tmp_path.resolve()), "False"]


def test_a_failed_installation_is_an_error(tmp_path: Path) -> None:
    wheel = tmp_path / "clipdeploy-0-py3-none-any.whl"
    wheel.write_bytes(b"no wheel")
    words = [sys.executable, str(ROOT / "scripts" / "support_table.py"), str(wheel), "false"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines() == script.header()
    assert "false" in done.stderr
