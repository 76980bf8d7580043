"""Detects and escapes control characters in text from files.

File names, class names and passports are untrusted text.  An ESC sequence moves the cursor, a
carriage return overwrites a line, and a bidirectional override reverses the reading direction.
Passports with such text are rejected; output shows it escaped.
"""

from __future__ import annotations

import re

__all__ = ["is_one_line", "printable"]

# C0, DEL and C1; the line and paragraph separators; directional marks, embeddings, overrides and
# isolates (Unicode TR 36, section 3.4).  Joiners and letters of all scripts are allowed.
_LINE_BREAKS = "\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
_CONTROL = re.compile(
    f"[{_LINE_BREAKS}\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def is_one_line(text: str) -> bool:
    """Return whether ``text`` has no control characters, including line breaks."""
    return not _CONTROL.search(text)


def printable(text: str, *, keep: str = "", escape: str = "python") -> str:
    r"""Escape the control characters of ``text``, except those in ``keep``.

    ``python`` escapes are ``\x1b`` and ``\u202e``, ``json`` escapes ``\u001b`` and ``\u202e``.
    """

    def shown(found: re.Match[str]) -> str:
        character = found[0]
        if character in keep:
            return character
        if escape == "json":
            return f"\\u{ord(character):04x}"
        return character.encode("unicode_escape").decode("ascii")

    return _CONTROL.sub(shown, text)
