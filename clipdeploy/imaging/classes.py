"""A model's classes: how many logits it has, and what people call them.

Names come from a file that the user gives, from the checkpoint, from the card, from the images'
folders or from a label file.  Each of them says how many there are, and that has to be the number
of logits.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clipdeploy.core.errors import DatasetError
from clipdeploy.core.files import read_regular

__all__ = ["Classes", "NamesError", "names_from", "read_class_names"]

_HINT = 'one name a line, or JSON: ["cat", "dog"], {"0": "cat", "1": "dog"} or {"cat": 0, "dog": 1}'
_SHOWN = 3
# Lists of ImageNet's words differ in a few of them.
_ALIKE = 0.95
# A thousand times those of ImageNet's names.
_MOST_BYTES = 64 << 20


# (name, words) of each class.
Known = Sequence[tuple[str, str]]


class NamesError(ValueError):
    """What is wrong with a list of class names, as a phrase."""


@dataclass(frozen=True)
class Classes:
    """``count`` logits, and their names in order, empty if they are unknown.

    A count of 0: the classes of images are not read.

    Raises:
        DatasetError: as many names as logits, all different, are needed.
    """

    count: int = 0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.names and len(self.names) != self.count:
            raise DatasetError(
                f"there are {len(self.names)} class names for {self.count} classes",
                hint="a name for each logit is needed, in their order: --class-names FILE",
            )

    def __bool__(self) -> bool:
        return self.count > 0

    @cached_property
    def index(self) -> dict[str, int]:
        """The logit of each name."""
        return {name: position for position, name in enumerate(self.names)}

    def examples(self) -> str:
        """The first names, for a message."""
        more = ", ..." if len(self.names) > _SHOWN else ""
        return f"the model's {self.count} classes are {', '.join(self.names[:_SHOWN])}{more}"


def names_from(value: Any, known: Known = ()) -> tuple[str, ...]:
    """The names in a list, or in an object that maps indices to names or names to indices.

    ``known`` are names and words of classes: where the list has the words (``tench, Tinca tinca``),
    in the same order, the names are taken (``n01440764``).

    Raises:
        NamesError: it is something else, or not every index from 0 on has a name of its own.
    """
    if isinstance(value, Mapping):
        return _checked(_of_object(value), known)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return _checked(list(value), known)
    raise NamesError("it is neither a list nor an object of names")


def _of_object(value: Mapping[Any, Any]) -> list[Any]:
    pairs = list(value.items())
    if all(isinstance(index, int) and not isinstance(index, bool) for _, index in pairs):
        pairs = [(index, name) for name, index in pairs]
    try:
        named = {int(index): name for index, name in pairs}
    except (TypeError, ValueError):
        raise NamesError("its keys or its values have to be the numbers of the classes") from None
    if sorted(named) != list(range(len(pairs))):
        raise NamesError(f"its numbers are not 0 to {len(pairs) - 1}, each of them once")
    return [named[index] for index in range(len(pairs))]


def _checked(names: list[Any], known: Known) -> tuple[str, ...]:
    # Keras' imagenet_class_index.json has [wnid, word] for each class.
    firsts = [name[0] if isinstance(name, list | tuple) and name else name for name in names]
    if not firsts:
        raise NamesError("it has no name")
    for number, name in enumerate(firsts):
        if not isinstance(name, str) or not name.strip():
            raise NamesError(f"the name of class {number} is {name!r}")
        if not name.isprintable():
            raise NamesError(f"the name of class {number} has control characters: {name!a}")
    # Two of ImageNet's words are those of two classes each.
    found = _instead_of_words(tuple(name.strip() for name in firsts), known)
    name, often = Counter(found).most_common(1)[0]
    if often > 1:
        raise NamesError(f"{name!r} is the name of {often} classes")
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
    """The names of ``count`` classes from a file, in the order of the logits.

    A text file with one name a line, or JSON, see :func:`names_from`.

    Raises:
        FileError: it cannot be read.
        DatasetError: it holds no such names, or not ``count`` of them.
    """
    data = read_regular(path, _MOST_BYTES)
    try:
        text = data.decode("utf-8-sig")
        if text.lstrip().startswith(("[", "{")):
            names = names_from(json.loads(text), known)
        else:
            names = names_from([line.strip() for line in text.rstrip().splitlines()], known)
    except (NamesError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DatasetError(f"{path} holds no class names: {error}", hint=_HINT) from error
    if len(names) != count:
        raise DatasetError(
            f"{path} names {len(names)} classes, the model has {count}",
            hint=f"a name for each logit is needed, in their order: {_HINT}",
        )
    return names
