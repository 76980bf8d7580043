"""The class texts and templates of a zero-shot classifier, and other texts.

A file of classes has one class a line: its name, which is also the name of its image folder, and
behind tabs the texts that replace the name in the templates.  A file of templates has one template
a line, with ``{}`` where the text goes, a file of texts one text a line.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from clipdeploy.core.errors import UsageError
from clipdeploy.core.files import read_regular
from clipdeploy.core.paths import StrPath
from clipdeploy.core.printable import printable
from clipdeploy.models.cards import imagenet_classes

__all__ = ["IMAGENET", "TEMPLATES", "Prompts", "check_texts", "read_prompts", "read_texts"]

# OpenAI's names of ImageNet's classes, and its lists of templates: notebooks/
# Prompt_Engineering_for_ImageNet.ipynb of openai/CLIP, as in open_clip zero_shot_metadata.py.
IMAGENET = "imagenet"
TEMPLATES = ("openai80", "simple")
_PLACE = "{}"
_MAX_BYTES = 16 << 20
_CLASSES = "one class a line: its name, or its name, a tab and the text for the templates"


@dataclass(frozen=True)
class Prompts:
    """Class names, the texts of each class, and templates.

    Raises:
        UsageError: there is no class or no template, a name or text is repeated, or a template has
            not exactly one ``{}``.
    """

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise UsageError("there are no classes", hint=_CLASSES)
        _refuse_repeated(self.names, "class")
        if not self.templates:
            raise UsageError("there are no templates", hint="one template a line, with {}")
        _refuse_repeated(self.templates, "template")
        for template in self.templates:
            if template.count(_PLACE) != 1:
                raise UsageError(
                    f"the template {printable(template)!r} has {template.count(_PLACE)} "
                    f"placeholders {_PLACE}",
                    hint="write each template with one {}, where the class goes: a photo of a {}.",
                )

    @property
    def sha256(self) -> str:
        """The hash of all names, texts and templates."""
        parts = (
            "\t".join((name, *texts)) for name, texts in zip(self.names, self.texts, strict=True)
        )
        lines = (*parts, "", *self.templates)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def of_class(self, index: int) -> list[str]:
        """The prompts of one class: each of its texts in each template."""
        return [
            template.replace(_PLACE, text)
            for text in self.texts[index]
            for template in self.templates
        ]


def _refuse_repeated(values: Sequence[str], what: str) -> None:
    value, count = Counter(values).most_common(1)[0]
    if count > 1:
        raise UsageError(
            f"{count} {what}es are {printable(value)!r}"
            if what == "class"
            else f"{count} {what}s are {printable(value)!r}",
            hint=f"name each {what} once",
        )


def read_prompts(classes: StrPath, templates: StrPath = TEMPLATES[0]) -> Prompts:
    """Read the classes and templates: files, ``imagenet``, and one of ``TEMPLATES``.

    Raises:
        FileError: a file cannot be read.
        UsageError: it does not exist or is not text, or see :class:`Prompts`; or two classes have
            the same text.
    """
    if str(templates) in TEMPLATES:
        lines = tuple(_shipped(f"templates_{templates}.txt"))
    else:
        lines = tuple(line for _, line in _lines(_existing(templates, TEMPLATES)))
    if str(classes) == IMAGENET:
        # Two of OpenAI's texts name two classes each: missile, sunglasses.
        names = tuple(name for name, _ in imagenet_classes())
        return Prompts(names, tuple((text,) for text in _shipped("imagenet_names.txt")), lines)
    path = _existing(classes, (IMAGENET,))
    rows = [_row(path, number, line) for number, line in _lines(path)]
    _refuse_repeated([text for _, texts in rows for text in texts] or ["no class"], "text")
    return Prompts(tuple(name for name, _ in rows), tuple(texts for _, texts in rows), lines)


def read_texts(path: StrPath) -> tuple[str, ...]:
    """Read a file with one text a line.

    Raises:
        FileError: it cannot be read.
        UsageError: it does not exist or is not text, or see :func:`check_texts`.
    """
    texts = tuple(line for _, line in _lines(_existing(path, ())))
    check_texts(texts)
    return texts


def check_texts(texts: Sequence[str]) -> None:
    """Refuse texts that are empty or repeated.

    Raises:
        UsageError: one is, or there is none.
    """
    if not texts or not all(text.strip() for text in texts):
        raise UsageError("there are no texts, or one is empty", hint="write one text a line")
    _refuse_repeated(texts, "text")


def _existing(given: StrPath, names: Sequence[str]) -> Path:
    path = Path(given)
    if not path.exists():
        raise UsageError(f"{printable(str(given))} is {_neither(names)}", hint="check its spelling")
    return path


def _neither(names: Sequence[str]) -> str:
    return f"neither a file nor {' or '.join(names)}" if names else "no file"


def _shipped(name: str) -> list[str]:
    data = resources.files("clipdeploy").joinpath("data", "clip", name)
    return data.read_text(encoding="utf-8").splitlines()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers from 1."""
    try:
        text = read_regular(path, _MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}", hint="save it as UTF-8") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.replace("\t", " ").isprintable():
            raise UsageError(
                f"{path}, line {number}, has control characters: {line!a}", hint="remove them"
            )
        if line.strip():
            yield number, line.strip()


def _row(path: Path, number: int, line: str) -> tuple[str, tuple[str, ...]]:
    name, *texts = (part.strip() for part in line.split("\t"))
    if not name or not all(texts):
        raise UsageError(f"{path}, line {number}, has an empty field", hint=_CLASSES)
    return name, tuple(texts) or (name,)
