"""Writes the Python client of a packaged model.

The client contains the source of clipdeploy's preprocessing functions, so that both prepare images
identically; for CLIP's towers also that of the tokenizer, which needs the vocabulary beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any

from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.passport import CONTEXT, LOGIT_SCALE_KEY, Passport
from clipdeploy.core.values import is_name
from clipdeploy.core.version import __version__
from clipdeploy.imaging.preprocess import crop_image, to_rgb
from clipdeploy.models.clip import tokenizer
from exporters.preprocess_graph import scale_and_offset
from exporters.samples import normalise

__all__ = ["TextModel", "client_source", "template"]

_COPIED = (to_rgb, crop_image, scale_and_offset, normalise)
_COPIED_FOR_TEXTS = (
    *(tokenizer.Tokens, tokenizer._bytes_as_text, tokenizer._tokenizer, tokenizer._words),
    tokenizer.tokenize,
)
_DOES = {
    "classes": "print their five most likely classes",
    "images": "print the cosines between their embeddings",
    "texts": "compare them with texts",
}


@dataclass(frozen=True)
class TextModel:
    """The text tower beside a packaged image tower: its name on the server and its passport."""

    name: str
    passport: Passport


def template(name: str) -> Template:
    """Read a file of ``packaging/templates``."""
    file = resources.files("clipdeploy").joinpath("packaging", "templates", name)
    return Template(file.read_text(encoding="utf-8"))


def client_source(name: str, passport: Passport, texts: TextModel | None = None) -> str:
    """Return the text of ``client.py`` for the Triton model ``name``.

    With ``texts``, the client compares images with texts.

    Raises:
        ArtifactError: a name is invalid; it could break the text that contains it.
    """
    for each in (name, *((texts.name,) if texts else ())):
        if not is_name(each):
            raise ArtifactError(
                f"{each!r} is not a valid model name", hint="use letters, digits, - and _"
            )
    kind = "texts" if texts else "images" if passport.embeds else "classes"
    return template("client.py.txt").substitute(
        name=name,
        does=_DOES[kind],
        needs=" ftfy regex tokenizers" if texts else "",
        extras="triton,clip" if texts else "triton",
        options=" --text TEXT" if texts else "",
        version=__version__,
        modules="import gzip\nimport html\n" if texts else "",
        cache="from functools import cache\n" if texts else "",
        spec=repr(passport.preprocess),
        images=repr(_served(name, passport)),
        functions=_sources(_COPIED),
        main=_texts_main(texts) if texts else template(f"client_{kind}.py.txt").template.rstrip(),
    )


def _served(name: str, passport: Passport) -> tuple[str, str, str, str, int]:
    batch = passport.input.shape[0]
    fixed = batch if isinstance(batch, int) else 0
    return name, passport.input.name, passport.output.name, passport.input.dtype, fixed


def _sources(copied: Sequence[Callable[..., Any]]) -> str:
    return "\n\n".join(inspect.getsource(each) for each in copied).rstrip()


def _texts_main(texts: TextModel) -> str:
    made = template("client_texts.py.txt").substitute(
        texts=repr(_served(texts.name, texts.passport)),
        logit_scale=repr(float(texts.passport.settings[LOGIT_SCALE_KEY])),
        context=CONTEXT,
        vocabulary=tokenizer.VOCABULARY,
        start=tokenizer._START,
        end=tokenizer.END,
        last_merge=tokenizer._LAST_MERGE,
        words=repr(tokenizer._WORDS),
        word_end=repr(tokenizer._WORD_END),
        special=repr(tokenizer._SPECIAL),
        file=repr(tokenizer.VOCABULARY_FILE),
        functions=_sources(_COPIED_FOR_TEXTS),
    )
    return made.rstrip()
