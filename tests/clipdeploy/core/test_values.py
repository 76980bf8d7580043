from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from clipdeploy.core.values import (
    Fault,
    first_fault,
    is_hash,
    is_name,
    is_number,
    is_version,
    unless,
    unless_lines,
)


@dataclass(frozen=True)
class Leaf:
    size: int

    def faults(self) -> Iterator[Fault]:
        yield from unless(self.size > 0, "size", self.size, "1 or more")


@dataclass(frozen=True)
class Tree:
    leaf: Leaf
    many: tuple[Leaf, ...] = ()
    named: dict[str, Leaf] | None = None


def test_a_fault_is_found_at_any_depth_and_its_field_is_named() -> None:
    assert first_fault(Tree(Leaf(1), (Leaf(2),), {"a": Leaf(3)})) is None
    assert str(first_fault(Leaf(0))) == "size is 0, not 1 or more"
    assert str(first_fault(Tree(Leaf(-1)))) == "leaf.size is -1, not 1 or more"
    assert str(first_fault(Tree(Leaf(1), (Leaf(1), Leaf(0))))).startswith("many[1].size is 0")
    assert str(first_fault(Tree(Leaf(1), (), {"a": Leaf(0)}))).startswith("named['a'].size is 0")
    assert first_fault([1, "two", None, 3.0]) is None


def test_a_fault_is_one_short_line() -> None:
    text = str(Fault("name", "\x1b[2J\n\u202e" + "x" * 10_000, "a name"))
    assert text.startswith(r"name is '\x1b[2J\n\u202exxx")
    assert len(text) < 100


@pytest.mark.parametrize("name", ["image", "clip-vit-base-p16_in1k-384px", "7", "_a.b"])
def test_names(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "a\\b", "-a", ".a", "a b", "a\n", "é", "a\0", "a" * 201]
)
def test_no_names(name: str) -> None:
    assert not is_name(name)


def test_hashes_versions_and_numbers() -> None:
    assert is_hash("0123456789abcdef" * 4)
    for text in ("", "A" * 64, "a" * 63, "a" * 64 + "\n", "g" * 64):
        assert not is_hash(text)
    assert all(map(is_version, ("10.13.3.9", "8.9", "11.0.0rc1+cuda13")))
    assert not any(map(is_version, ("", "v1", "1 2", "1\n", "1;x", "*")))
    assert is_number(0.5, 0, 1)
    assert not any(is_number(value, 0, 1) for value in (-0.1, 1.1, math.nan, math.inf))


def test_every_text_inside_is_one_line() -> None:
    assert list(unless_lines("a", {"b": [1, None, True, "c", {"d": 2.0}]})) == []
    for value in ("x\n", ["a", "\x1b"], {"k\r": 1}, {"k": {"l": ["\u2028"]}}, "x" * 5000):
        assert list(unless_lines("a", value))
    deep: object = 1
    for _ in range(100):
        deep = [deep]
    assert list(unless_lines("a", deep))
