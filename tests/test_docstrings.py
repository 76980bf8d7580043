"""Every public function says what it takes, with shapes, and which of our errors it raises."""

from __future__ import annotations

from pathlib import Path

import pytest
from docstrings import Rules, array_names, faults

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path
    for package in ("exporters", "calibration", "clipdeploy")
    for path in (ROOT / package).rglob("*.py")
)
RULES = Rules(array_names(FILES))


@pytest.mark.parametrize("package", ["exporters", "calibration", "clipdeploy"])
def test_docstrings_say_what_they_owe(package: str) -> None:
    found = [
        fault
        for path in FILES
        if path.relative_to(ROOT).parts[0] == package
        for fault in faults(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)), RULES)
    ]
    assert not found, "\n".join(found)


GOOD = '''
def score(logits: NDArray[np.float32]) -> float:
    """The top-1 of ``logits`` (B, classes).

    Raises:
        UsageError: there are none.
    """
    if not len(logits):
        raise UsageError("no logits")
'''


def test_a_docstring_that_says_all() -> None:
    assert faults(GOOD, "good.py") == []
    assert faults(GOOD.replace("def score", "def _score").replace("Raises", ""), "private.py") == []


@pytest.mark.parametrize(
    ("there", "instead", "said"),
    [
        ('"""The top-1', 'x = """The top-1', "score has no docstring"),
        (" (B, classes)", "", "score takes the array logits, whose shape is not documented"),
        ("UsageError: there", "ValueError: there", "score raises UsageError"),
        ("Raises:", "Beware:", "score raises UsageError"),
        ("logits: NDArray[np.float32]) -> float", "size: int) -> Logits", "score returns an array"),
    ],
)
def test_a_docstring_that_owes_something(there: str, instead: str, said: str) -> None:
    bad = GOOD.replace(there, instead)
    if "Logits" in instead:
        bad = bad.replace(" (B, classes)", "")
    (found,) = faults(bad, "bad.py", Rules(frozenset({"NDArray", "Logits"})))
    assert found.startswith(f"bad.py:2 {said}")


def test_methods_owe_the_same_and_init_speaks_through_its_class() -> None:
    source = '''
class Meter:
    """Collects.

    Raises:
        GraphError: it is no graph.
    """
    def __init__(self):
        raise GraphError("x")
    def add(self, images: Tensor):
        """Collect."""
        raise UsageError("x")
'''
    found = faults(source, "meter.py")
    assert [fault.partition(" ")[2] for fault in found] == [
        "Meter.add raises UsageError, which its docstring does not list",
        "Meter.add takes the array images, whose shape is not documented",
    ]
