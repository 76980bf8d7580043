from __future__ import annotations

import json

import pytest

from clipdeploy.core.printable import is_one_line, printable

ACTING = [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), *"\u2028\u2029\u202e\u2066\u200f"]
# Text in any script, joiners and combining marks included, is shown as it is.
SHOWN = ["été", "犬", "می‌خواهم", "👩‍🔬", "क्षि", "a b", "\xa0", "[red]x[/]", "C:\\x1b", "\\n"]


@pytest.mark.parametrize("character", ACTING)
def test_what_acts_becomes_an_escape(character: str) -> None:
    text = f"a{character}b"
    shown = printable(text)
    assert not is_one_line(text)
    assert is_one_line(shown)
    assert shown.isascii()
    assert shown.encode().decode("unicode_escape") == text
    written = printable(f'"{text}"', escape="json")
    assert is_one_line(written)
    assert json.loads(written) == text
    assert printable(text, keep=character) == text


@pytest.mark.parametrize("text", SHOWN)
def test_what_is_shown_stays(text: str) -> None:
    assert is_one_line(text)
    assert printable(text) == printable(text, escape="json") == text
