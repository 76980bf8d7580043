"""Characters that act on a terminal, a line or a reading direction instead of being shown.

File names, class names and passports are text from outside.  An ESC sequence in one of them moves
the cursor, a carriage return overwrites a line, and a bidirectional override shows it backwards.
One definition serves the reader of passports, which refuses such text, and the writers of output,
which show it as an escape.
"""

from __future__ import annotations

import re

__all__ = ["is_one_line", "printable"]

# C0, DEL and C1; the line and paragraph separators; directional marks, embeddings, overrides and
# isolates (Unicode TR 36, section 3.4).  Joiners and letters of any script are no such characters.
_LINE_BREAKS = "\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
_ACTING = re.compile(
    f"[{_LINE_BREAKS}\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def is_one_line(text: str) -> bool:
    """Whether ``text`` has no character that acts instead of being shown, line breaks included."""
    return not _ACTING.search(text)


def printable(text: str, *, keep: str = "", escape: str = "python") -> str:
    r"""``text`` with every acting character as an escape, but those of ``keep``.

    ``python`` escapes are ``\x1b`` and ``\u202e``, ``json`` ones ``\u001b`` and ``\u202e``.
    """

    def shown(found: re.Match[str]) -> str:
        character = found[0]
        if character in keep:
            return character
        if escape == "json":
            return f"\\u{ord(character):04x}"
        return character.encode("unicode_escape").decode("ascii")

    return _ACTING.sub(shown, text)
