"""Every module has a test file, which a reader finds by its name.

The tests of ``exporters/onnx.py`` are in ``tests/exporters/test_onnx.py``.  A module without such a
file is named in the docstring of the file that tests it, in a paragraph ``Covers: exporters/...``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Set
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    path.relative_to(ROOT / "tests"): path.read_text(encoding="utf-8")
    for path in (ROOT / "tests").rglob("test_*.py")
}


def covered(source: str) -> set[str]:
    """The modules that the docstring of a test file names."""
    docstring = ast.get_docstring(ast.parse(source)) or ""
    _, found, listed = docstring.partition("\nCovers: ")
    return set(re.findall(r"[\w/]+\.py", listed)) if found else set()


def modules() -> Iterator[Path]:
    for package in ("clipdeploy", "exporters", "calibration"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__init__.py":
                yield path.relative_to(ROOT)


def without_test(tests: Set[Path], named: Set[str]) -> list[str]:
    return [
        module.as_posix()
        for module in modules()
        if module.with_name(f"test_{module.name}") not in tests and module.as_posix() not in named
    ]


def test_every_module_has_a_test_file() -> None:
    named = {module for source in TESTS.values() for module in covered(source)}
    assert without_test(TESTS.keys(), named) == []


def test_no_module_is_named_that_has_a_file_or_does_not_exist() -> None:
    own = set(without_test(TESTS.keys(), set()))
    wrong = {path: covered(source) - own for path, source in TESTS.items()}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_a_module_without_a_test_file_is_found() -> None:
    assert without_test(TESTS.keys() - {Path("exporters/test_onnx.py")}, set()) != []
    assert covered(
        '"""Graphs.\n\nCovers: exporters/nested.py, exporters/\n    storage.py.\n"""'
    ) == {
        "exporters/nested.py",
        "storage.py",
    }
    assert covered('"""Tests of exporters/nested.py."""') == set()
