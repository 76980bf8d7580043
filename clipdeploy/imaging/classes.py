"""Count and name a model's classes.

Names come from the user's file, the checkpoint, the card, the image folders or a label file.  Their
number has to equal the number of logits.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from clipdeploy.core.errors import DatasetError
from clipdeploy.core.files import read_regular
from clipdeploy.models.cards import imagenet_classes

__all__ = ["Classes", "NamesError", "names_from", "plain", "read_class_names"]

_HINT = (
    'one name per line, or JSON: ["cat", "dog"], {"0": "cat", "1": "dog"} or {"cat": 0, "dog": 1}'
)
_SHOWN = 3
# Published lists of ImageNet's words differ in a few classes.
_ALIKE = 0.95
# A thousand times the size of ImageNet's names.
_MAX_BYTES = 64 << 20


# (name, words) of each class.
Known = Sequence[tuple[str, str]]


class NamesError(ValueError):
    """A list of class names is invalid; the message is a phrase."""


@dataclass(frozen=True)
class Classes:
    """The number of logits, and the class names in logit order, empty if unknown.

    A count of 0 means that labels are not read.

    Raises:
        DatasetError: the number of names is not ``count``.
    """

    count: int = 0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.names and len(self.names) != self.count:
            raise DatasetError(
                f"there are {len(self.names)} class names for {self.count} classes",
                hint="pass one name per logit, in logit order: --class-names FILE",
            )

    def __bool__(self) -> bool:
        return self.count > 0

    @cached_property
    def index(self) -> dict[str, int]:
        """Class name -> logit index."""
        return {name: position for position, name in enumerate(self.names)}

    def find(self, text: str) -> int | None:
        """The class with this name, in any spelling; None if none or several have it."""
        if (exact := self.index.get(text)) is not None:
            return exact
        found = self.spelled(text)
        return found[0] if len(found) == 1 else None

    def spelled(self, text: str) -> tuple[int, ...]:
        """The classes that ``text`` names if case, spaces and punctuation are ignored.

        ImageNet's classes have their wnid, all words or one of them; the first of these that fits
        counts: ``missile`` is the class of this word alone, not ``projectile, missile``.
        """
        key = plain(text)
        found = (level[key] for level in self._spellings if key in level)
        return next(found, ()) if key else ()

    def nearest(self, text: str) -> str:
        """The name of the class whose spelling is most similar; empty if none is."""
        spellings = {
            key: indices for level in reversed(self._spellings) for key, indices in level.items()
        }
        near = difflib.get_close_matches(plain(text), spellings, n=1)
        return self.names[spellings[near[0]][0]] if near else ""

    @cached_property
    def _spellings(self) -> tuple[dict[str, tuple[int, ...]], ...]:
        """Plain spelling -> classes, for names, all words and wnids, first words, other words."""
        levels: tuple[dict[str, tuple[int, ...]], ...] = ({}, {}, {}, {})
        words, wnids = dict(imagenet_classes()), _wnid_of_words()
        for index, name in enumerate(self.names):
            label = words.get(name, "")
            first, *others = (plain(part) for part in label.split(","))
            wnid = wnids.get(plain(name), "") if not label else ""
            for level, keys in zip(
                levels, ((plain(name),), (plain(label), wnid), (first,), others), strict=True
            ):
                for key in filter(None, dict.fromkeys(keys)):
                    level[key] = (*level.get(key, ()), index)
        return levels

    def examples(self) -> str:
        """A phrase with the first names, for messages."""
        more = ", ..." if len(self.names) > _SHOWN else ""
        return f"the model's {self.count} classes are {', '.join(self.names[:_SHOWN])}{more}"


def plain(text: str) -> str:
    """The text without case and punctuation, its words separated by one space."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


@cache
def _wnid_of_words() -> dict[str, str]:
    """ImageNet's words, all of a class or the first one -> wnid; empty for several classes."""
    found: dict[str, str] = {}
    for wnid, label in imagenet_classes():
        for key in {plain(label), plain(label.partition(",")[0])}:
            found[key] = "" if key in found else wnid
    return found


def names_from(value: Any, known: Known = ()) -> tuple[str, ...]:
    """Class names from a list, or from an object that maps indices to names or names to indices.

    ``known`` has the names and words of known classes: if the list contains their words
    (``tench, Tinca tinca``) in the same order, their names (``n01440764``) are returned.

    Raises:
        NamesError: the value is something else, an index is missing, or a name is not unique.
    """
    if isinstance(value, Mapping):
        return _checked(_of_object(value), known)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return _checked(list(value), known)
    raise NamesError("neither a list nor an object of names")


def _of_object(value: Mapping[Any, Any]) -> list[Any]:
    pairs = list(value.items())
    if all(isinstance(index, int) and not isinstance(index, bool) for _, index in pairs):
        pairs = [(index, name) for name, index in pairs]
    try:
        named = {int(index): name for index, name in pairs}
    except (TypeError, ValueError):
        raise NamesError("neither the keys nor the values are class numbers") from None
    if sorted(named) != list(range(len(pairs))):
        raise NamesError(f"the class numbers are not 0 to {len(pairs) - 1}, each once")
    return [named[index] for index in range(len(pairs))]


def _checked(names: list[Any], known: Known) -> tuple[str, ...]:
    # Keras's imagenet_class_index.json has [wnid, word] for each class.
    firsts = [name[0] if isinstance(name, list | tuple) and name else name for name in names]
    if not firsts:
        raise NamesError("the list is empty")
    for number, name in enumerate(firsts):
        if not isinstance(name, str) or not name.strip():
            raise NamesError(f"the name of class {number} is {name!r}")
        if not name.isprintable():
            raise NamesError(f"the name of class {number} has control characters: {name!a}")
    # Before the check for duplicates: two of ImageNet's words name two classes each.
    found = _instead_of_words(tuple(name.strip() for name in firsts), known)
    name, count = Counter(found).most_common(1)[0]
    if count > 1:
        raise NamesError(f"{count} classes are named {name!r}")
    return found


def _instead_of_words(names: tuple[str, ...], known: Known) -> tuple[str, ...]:
    if len(names) != len(known):
        return names
    pairs = zip(names, known, strict=True)
    alike = sum(_first_word(name) == _first_word(words) for name, (_, words) in pairs)
    return tuple(name for name, _ in known) if alike >= _ALIKE * len(known) else names


def _first_word(words: str) -> str:
    return words.partition(",")[0].strip().casefold().replace("_", " ")


def read_class_names(path: Path, count: int, known: Known = ()) -> tuple[str, ...]:
    """Read the names of ``count`` classes, in logit order.

    The file is text with one name per line, or JSON, see :func:`names_from`.

    Raises:
        FileError: the file cannot be read.
        DatasetError: it contains no valid names, or not ``count`` of them.
    """
    data = read_regular(path, _MAX_BYTES)
    try:
        text = data.decode("utf-8-sig")
        if text.lstrip().startswith(("[", "{")):
            names = names_from(json.loads(text), known)
        else:
            names = names_from([line.strip() for line in text.rstrip().splitlines()], known)
    except (NamesError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DatasetError(f"{path} has no valid class names: {error}", hint=_HINT) from error
    if len(names) != count:
        raise DatasetError(
            f"{path} names {len(names)} classes, but the model has {count}",
            hint=f"write one name per logit, in logit order: {_HINT}",
        )
    return names
