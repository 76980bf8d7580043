"""Embeds texts with the text tower of an embedding model, to compare them with images.

    cosine = image . text / (|image| |text|)
    share = softmax over the texts of logit_scale * cosine

Source: openai/CLIP ``model.py``, ``CLIP.forward``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.device import gpus
from clipdeploy.core.errors import ArtifactError, EngineError, UsageError
from clipdeploy.core.passport import LOGIT_SCALE_KEY, TOKENIZER_KEY, Passport, Precision
from clipdeploy.core.printable import printable
from clipdeploy.models.clip.prompts import check_texts
from clipdeploy.models.clip.tokenizer import tokenize, vocabulary_hash
from clipdeploy.runners import open_runner
from clipdeploy.workspace.names import artifact_path
from clipdeploy.workspace.passports import checked_passport
from exporters.providers import cuda_problem
from exporters.samples import TokenIds

__all__ = ["EmbeddedTexts", "check_tokenizer", "embed_texts", "text_tower_beside"]


@dataclass(frozen=True)
class EmbeddedTexts:
    """Texts and their embeddings (T, D) float64, of length 1.

    ``logit_scale`` multiplies the cosines.  ``artifact`` is the file that embedded them, ``runner``
    what ran it.  ``cut`` are the texts that were too long.
    """

    texts: tuple[str, ...]
    vectors: NDArray[np.float64]
    logit_scale: float
    artifact: Path
    runner: str
    cut: tuple[str, ...] = ()

    def cosines(self, embedding: NDArray[np.float32]) -> NDArray[np.float64]:
        """The cosine (T,) of an image's embedding (D,) with each text."""
        image = embedding.astype(np.float64)
        found: NDArray[np.float64] = self.vectors @ (image / np.linalg.norm(image))
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence about the texts that were cut, if there are any."""
        if not self.cut:
            return ()
        return (
            f"{len(self.cut)} of {len(self.texts)} texts are longer than CLIP's 77 tokens and are "
            f"cut, the first: {printable(self.cut[0])}",
        )


def _by_speed(folder: Path, model: str) -> Iterator[Path]:
    """The text towers of a model that may run here, the fastest first."""
    engines: tuple[Precision, ...] = ("fp16", "fp32") if gpus() else ()
    graphs: tuple[Precision, ...] = ("fp32",) if cuda_problem() else ("fp16", "fp32")
    for precision in engines:
        yield artifact_path(folder, model, precision, "engine", "text")
    for precision in graphs:
        yield artifact_path(folder, model, precision, "onnx", "text")


def text_tower_beside(folder: Path, image: Passport) -> tuple[Path, Passport]:
    """The text tower in ``folder`` that runs fastest here, and its passport.

    ``image`` is the passport of the image tower, whose embeddings are compared with the texts'.

    Raises:
        UsageError: there is none.
        ArtifactError, GraphError, FileError: it is of another CLIP, or was made for another
            tokenizer, or does not match its passport.
    """
    path = next((path for path in _by_speed(folder, image.model) if path.exists()), None)
    if path is None:
        raise UsageError(
            f"the text tower of {image.model} has not been exported in {folder}",
            hint=f"clipdeploy export --model {image.model} --text-tower",
        )
    pair = replace(image, tower="text")
    text = checked_passport(path, pair, tower="text").graph
    check_tokenizer(path, text)
    return path, text


def check_tokenizer(path: Path, text: Passport) -> None:
    """Refuse a text tower that was made for another tokenizer than this version's.

    Raises:
        ArtifactError: the hash of the vocabulary differs.
    """
    if text.settings.get(TOKENIZER_KEY) != vocabulary_hash():
        raise ArtifactError(
            f"{path} was made for another tokenizer than the one that is installed",
            hint=f"make it again: clipdeploy export --model {text.model} --text-tower --force",
        )


def embed_texts(folder: Path, image: Passport, texts: Sequence[str]) -> EmbeddedTexts:
    """Embed ``texts`` with the text tower in ``folder``, see :func:`text_tower_beside`.

    Raises:
        UsageError: a text is repeated, or there is no text tower.
        EngineError: the text tower cannot run here, or an embedding is not finite.
        ClipdeployError: see :func:`text_tower_beside`.
    """
    check_texts(texts)
    path, passport = text_tower_beside(folder, image)
    tokens = tokenize(texts)
    runner = open_runner(path)
    try:
        found = runner(TokenIds(tokens.ids).as_input(runner.input)).astype(np.float64)
    finally:
        runner.close()
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    if not np.isfinite(found).all() or not lengths.all():
        raise EngineError(
            f"{path} gives no finite embedding for {printable(texts[_first_broken(found)])!r}",
            hint="it is damaged or overflows: take the text tower of another precision",
        )
    return EmbeddedTexts(
        tuple(texts),
        found / lengths,
        float(passport.settings[LOGIT_SCALE_KEY]),
        path,
        runner.name,
        tuple(texts[row] for row in tokens.cut),
    )


def _first_broken(rows: NDArray[np.float64]) -> int:
    sound = np.isfinite(rows).all(axis=1) & rows.any(axis=1)
    return int(np.argmin(sound))
