from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipdeploy.core.errors import DatasetError, FileError
from clipdeploy.imaging.classes import Classes, NamesError, names_from, read_class_names

PETS = ("cat", "great dog", "emu")
FILES = {
    "lines": "cat\ngreat dog\nemu\n",
    "windows": "\ufeffcat\r\ngreat dog\r\nemu\r\n",
    "list": json.dumps(PETS),
    "indices": json.dumps({"2": "emu", "0": "cat", "1": "great dog"}),
    "names": json.dumps({"emu": 2, "cat": 0, "great dog": 1}),
    "pairs": json.dumps({"0": ["cat", "Felis"], "1": ["great dog", "x"], "2": ["emu", "y"]}),
}


@pytest.mark.parametrize("kind", FILES)
def test_names_are_read_in_the_order_of_the_logits(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "names"
    path.write_text(FILES[kind], encoding="utf-8")
    assert read_class_names(path, 3) == PETS


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("cat\ngreat dog\n", "names 2 classes, but the model has 3"),
        ("cat\ncat\nemu\n", "2 classes are named 'cat'"),
        ("cat\n\nemu\n", "the name of class 1 is ''"),
        ("", "the list is empty"),
        ("[]", "the list is empty"),
        ("[1, 2, 3]", "the name of class 0 is 1"),
        ('{"0": "cat", "2": "emu"}', "the class numbers are not 0 to 1"),
        ('{"cat": "x", "dog": "y"}', "neither the keys nor the values are class numbers"),
        ("[", "has no valid class names"),
        ("[" * 100_000, "has no valid class names"),
        ("c\x1b[31mat\ndog\nemu", "control characters"),
    ],
)
def test_names_that_cannot_be_used_are_refused(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "names"
    path.write_text(text)
    with pytest.raises(DatasetError, match=fault) as caught:
        read_class_names(path, 3)
    assert '["cat", "dog"]' in caught.value.hint


def test_binary_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "names").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="has no valid class names"):
        read_class_names(tmp_path / "names", 3)
    with pytest.raises(FileError, match="nowhere"):
        read_class_names(tmp_path / "nowhere", 3)


def test_names_are_given_for_every_class_or_none() -> None:
    assert Classes(3, PETS).index["emu"] == 2
    assert Classes(3).names == ()
    assert not Classes()
    with pytest.raises(DatasetError, match="3 class names for 4 classes"):
        Classes(4, PETS)


@pytest.mark.parametrize("value", ["cat", 3, None, {0: "cat", 1: "cat"}, {True: "a"}])
def test_other_values_are_not_names(value: object) -> None:
    with pytest.raises(NamesError):
        names_from(value)
