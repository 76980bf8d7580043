"""The texts that a text tower is judged on, as batches of a verification.

A text takes the place of an image: its name is the text, its file's hash that of the text, and its
pixels are the token ids, so that two texts with the same ids are copies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from clipdeploy.core.passport import BATCH_AXIS, CONTEXT, TOKENS, Preprocess, TensorSpec
from clipdeploy.imaging import Crop, ImageFolder
from clipdeploy.imaging.fingerprints import Fingerprint
from clipdeploy.imaging.images import ImageEntry
from clipdeploy.models.clip.tokenizer import Tokens, tokenize, vocabulary_hash
from clipdeploy.models.load import LoadedText
from clipdeploy.runners.base import Logits
from clipdeploy.runners.torch import TorchRunner
from clipdeploy.verification.batches import DecodedBatch, digest_of_entries, shuffled
from exporters.samples import GraphSamples, TokenIds

__all__ = ["TextBatch", "TextReference", "TextSource"]


class TextBatch(DecodedBatch):
    """A batch of texts; the pixels of their crops are the bytes of token ids."""

    def samples(self, spec: Preprocess) -> GraphSamples:
        """Return the token ids as model input; there must be at least one text."""
        return TokenIds(np.stack([crop.pixels for crop in self.crops]).view(np.int32))


class TextReference:
    """Computes PyTorch's embeddings of a batch of texts, see :class:`.reference.Reference`."""

    def __init__(self, model: LoadedText, threads: int = 0) -> None:
        self._input = TensorSpec(TOKENS, "int32", (BATCH_AXIS, CONTEXT))
        self._runner = TorchRunner(model.module, self._input, threads)
        self.name = self._runner.name

    def __call__(self, hashes: Sequence[str], samples: GraphSamples) -> Logits:
        """Return the embeddings (B, D) of B texts."""
        return self._runner(samples.as_input(self._input))

    def close(self) -> None:
        """Do nothing: nothing is cached."""


@dataclass(frozen=True)
class TextSource:
    """See :class:`clipdeploy.verification.batches.Source`; ``path`` is where the texts are from."""

    path: Path
    texts: tuple[str, ...]

    @cached_property
    def listed(self) -> ImageFolder:
        """The texts in the order of the run."""
        return shuffled(ImageFolder(self.path, tuple(ImageEntry(t, None) for t in self.texts)))

    @property
    def decoder(self) -> str:
        """What turns a text into ids."""
        return f"CLIP's tokenizer, vocabulary {vocabulary_hash()}"

    def contents(self) -> str:
        """The SHA-256 of the texts."""
        return digest_of_entries(self.listed)

    def stamps(self) -> str:
        """The same: no file is read again."""
        return self.contents()

    def problems(self) -> tuple[str, ...]:
        """A sentence about the texts that are cut, if there are any."""
        cut = len(self._tokens.cut)
        count = len(self.texts)
        return (f"{cut} of {count} texts are longer than CLIP's 77 tokens and are cut",) * bool(cut)

    @cached_property
    def _tokens(self) -> Tokens:
        return tokenize([entry.name for entry in self.listed.entries])

    def batches(self, size: int, numbers: Collection[int]) -> Generator[DecodedBatch]:
        """Yield the batches with these ``numbers``, of at most ``size`` texts, in order."""
        ids = self._tokens.ids.astype(np.int32)
        for number in sorted(numbers):
            rows = range(number * size, min((number + 1) * size, len(ids)))
            crops = tuple(_crop(self.listed.entries[row], ids[row]) for row in rows)
            yield TextBatch(number, crops, ())


def _crop(entry: ImageEntry, ids: NDArray[np.int32]) -> Crop:
    data = ids.tobytes()
    pixels = ids.view(np.uint8)
    # 64 bytes as a thumbnail's, of which no two are nearly alike.
    prints = Fingerprint(xxhash.xxh3_128_hexdigest(data), hashlib.sha512(data).digest())
    return Crop(entry, hashlib.sha256(entry.name.encode()).hexdigest(), pixels, prints)
