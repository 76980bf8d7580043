"""CLIP's tokenizer against open_clip's, whose ids for 10,000 texts are stored as hashes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from clip_files import SHAPES
from script_module import load_script

from clipdeploy.core.errors import UsageError
from clipdeploy.models.clip.tokenizer import CONTEXT, END, tokenize, vocabulary_hash

SCRIPT = load_script("write_clip_oracles")


def test_ten_thousand_texts_have_the_ids_of_open_clip() -> None:
    found = tokenize(SCRIPT.strings())
    ids = found.ids.astype(np.int32)
    groups = [
        hashlib.sha256(ids[start : start + SCRIPT.GROUP].tobytes()).hexdigest()
        for start in range(0, SCRIPT.STRINGS, SCRIPT.GROUP)
    ]
    assert groups == SHAPES["tokens"]
    # The hashes see a single other id.
    ids[4321, 3] += 1
    start = 4321 // SCRIPT.GROUP * SCRIPT.GROUP
    changed = ids[start : start + SCRIPT.GROUP].tobytes()
    assert hashlib.sha256(changed).hexdigest() != SHAPES["tokens"][start // SCRIPT.GROUP]


def test_known_ids() -> None:
    """From the documentation of transformers' CLIPTokenizer and openai/CLIP's README."""
    ids = tokenize(["a photo of a cat", "&lt;3", ""]).ids
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, END, 0]
    assert np.array_equal(ids[1], tokenize(["<3"]).ids[0])
    assert ids[2, :3].tolist() == [49406, END, 0]


def test_long_texts_are_cut_and_named() -> None:
    found = tokenize(["cat", "cat " * 75, "cat " * 76])
    assert found.cut == (2,)
    assert found.ids.shape == (3, CONTEXT)
    assert found.ids[1:, -1].tolist() == [END, END]
    assert np.array_equal(found.ids[1], found.ids[2])


def test_clips_own_tokens_are_refused() -> None:
    for token in ("<|endoftext|>", "<start_of_text>", "<END_OF_TEXT>", "&lt;|startoftext|&gt;"):
        with pytest.raises(UsageError, match="token of CLIP's"):
            tokenize(["a cat", f"a {token} cat"])


def test_the_vocabulary_is_openais() -> None:
    """The hash of the file in openai/CLIP, which open_clip ships as well."""
    assert vocabulary_hash().startswith("924691ac288e54409236115652ad4aa2")
