"""CLIP's tokenizer: text -> ids of a byte-pair encoding with 49,408 tokens.

The vocabulary is OpenAI's file (``data/clip``, MIT licence).  The ids are those of
``SimpleTokenizer`` in openai/CLIP ``simple_tokenizer.py`` and open_clip ``tokenizer.py``, where the
clean-up and the pattern of words are from.  ``regex`` finds the words, as there: the tables of
letters differ between libraries.  ``tokenizers`` applies the merges.
"""

from __future__ import annotations

import gzip
import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import CONTEXT
from clipdeploy.core.printable import printable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "CONTEXT",
    "END",
    "VOCABULARY",
    "VOCABULARY_FILE",
    "Tokens",
    "tokenize",
    "vocabulary_data",
    "vocabulary_hash",
]

# The number of tokens (openai/CLIP model.py).
VOCABULARY = 49_408
_START, END = VOCABULARY - 2, VOCABULARY - 1
# The merges are the lines 1 to this one of the file: simple_tokenizer.py.
_LAST_MERGE = 49_152 - 256 - 2
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD_END = "</w>"
# The tokens of start and end in OpenAI's and open_clip's spelling.
_SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<end_of_text>")
VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"


@dataclass(frozen=True)
class Tokens:
    """Ids (N, 77) int64, padded with 0, and the indices of texts that were too long and are cut."""

    ids: NDArray[np.int64]
    cut: tuple[int, ...]


def vocabulary_data() -> bytes:
    """OpenAI's file of the vocabulary."""
    return resources.files("clipdeploy").joinpath("data", "clip", VOCABULARY_FILE).read_bytes()


@cache
def vocabulary_hash() -> str:
    """The SHA-256 of the vocabulary's file."""
    return hashlib.sha256(vocabulary_data()).hexdigest()


def _bytes_as_text() -> list[str]:
    """The character that stands for each byte, in the order of the ids (GPT-2, encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


@cache
def _tokenizer() -> Tokenizer:
    try:
        from tokenizers import Tokenizer
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel
    except ImportError as error:
        raise UsageError(
            "CLIP's tokenizer needs tokenizers", hint="pip install 'clipdeploy[clip]'"
        ) from error
    lines = gzip.decompress(vocabulary_data()).decode().split("\n")
    pairs = [line.split() for line in lines[1 : _LAST_MERGE + 1]]
    merges = [(first, second) for first, second in pairs]
    letters = _bytes_as_text()
    tokens = letters + [each + _WORD_END for each in letters] + ["".join(each) for each in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, end_of_word_suffix=_WORD_END))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


def _words(text: str) -> list[str]:
    try:
        import regex
        from ftfy import fix_text
    except ImportError as error:
        raise UsageError(
            "CLIP's tokenizer needs ftfy and regex", hint="pip install 'clipdeploy[clip]'"
        ) from error
    # Twice, as in simple_tokenizer.py: &amp;lt; is a <.
    plain = " ".join(html.unescape(html.unescape(fix_text(text))).split()).lower()
    if any(special in plain for special in _SPECIAL):
        raise UsageError(
            f"{printable(text)!r} contains a token of CLIP's, which would end the text",
            hint=f"leave {', '.join(_SPECIAL)} out of names and templates",
        )
    words: list[str] = regex.findall(_WORDS, plain)
    return words


def tokenize(texts: Sequence[str]) -> Tokens:
    """The ids of each text, with start and end; a text of more than 75 tokens is cut as CLIP does.

    Raises:
        UsageError: a text contains a token of CLIP's own, such as ``<|endoftext|>``.
        UsageError: or the extra ``clip`` is not installed.
    """
    found = _tokenizer().encode_batch([_words(text) for text in texts], is_pretokenized=True)
    ids = np.zeros((len(texts), CONTEXT), np.int64)
    cut = []
    for row, each in enumerate(found):
        words = each.ids
        if len(words) > CONTEXT - 2:
            cut.append(row)
            words = words[: CONTEXT - 2]
        ids[row, : len(words) + 2] = [_START, *words, END]
    return Tokens(ids, tuple(cut))
