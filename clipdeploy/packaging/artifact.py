"""Reads a graph or an engine, with its passport, for packaging."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import Passport, Tower, to_json
from clipdeploy.core.printable import printable
from clipdeploy.engines.passport import EnginePassport
from clipdeploy.models import cards
from clipdeploy.workspace.passports import checked_passport
from exporters.headers import check_weights, graph_sha256, weight_files

__all__ = ["Packable", "copy_artifact", "is_copy", "labels", "labels_text", "open_packable"]


@dataclass(frozen=True)
class Packable:
    """A file to package; ``engine`` is None for a graph."""

    path: Path
    sha256: str
    graph: Passport
    engine: EnginePassport | None

    @property
    def passport_json(self) -> bytes:
        """The passport as JSON, to be written next to the file."""
        return to_json(self.engine or self.graph)

    @property
    def runtime(self) -> str:
        """The library that runs the file: ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``."""
        return self.engine.backend if self.engine else "onnxruntime"

    @property
    def fixed_batch(self) -> int | None:
        """The fixed batch size; None if the batch is dynamic."""
        batch = self.graph.input.shape[0]
        return batch if isinstance(batch, int) else None


def open_packable(
    path: Path, reference: Passport | None = None, tower: Tower = "image"
) -> Packable:
    """Read a file's passport and compare it with the file and its card, and ``reference`` if given.

    Raises:
        FileError, GraphError, ArtifactError: the file cannot be read, or does not match its
            passport, see :mod:`clipdeploy.workspace.passports`; or it is an engine without weights,
            or a graph in FP8.
        UsageError: the file is neither a graph nor an engine.
    """
    found = checked_passport(path, reference, tower=tower)
    if found.engine and not found.engine.has_weights:
        raise ArtifactError(
            f"{path} has no weights, and no package can refit them",
            hint="build it without --strip-weights",
        )
    if found.engine is None and found.graph.precision == "fp8":
        raise ArtifactError(
            f"{path} is a graph in FP8, which ONNX Runtime runs only for judging",
            hint="package an engine that TensorRT built from it, or a graph in another precision",
        )
    sha256 = found.engine.hashes.plan if found.engine else graph_sha256(path)
    return Packable(path, sha256, found.graph, found.engine)


def copy_artifact(source: Packable, target: Path) -> None:
    """Copy the file to ``target``, and the weights of a large graph beside it.

    Raises:
        OSError: a file cannot be read or written.
    """
    for file in weight_files(source.path) if source.engine is None else ():
        shutil.copyfile(file, target.with_name(file.name))
    shutil.copyfile(source.path, target)


def is_copy(source: Packable, path: Path) -> bool:
    """Whether ``path`` is a copy of the file, with its weights."""
    if not path.is_file() or sha256_file(path) != source.sha256:
        return False
    try:
        if source.engine is None:
            check_weights(path)
    except ArtifactError:
        return False
    return True


def labels(passport: Passport) -> tuple[str, ...]:
    """One line per logit: ``n01440764 tench, Tinca tinca``, a folder's name, or ``class 7``.

    A line break in a name is escaped, so that all programs read the same number of lines.
    """
    names = passport.class_names
    if not names:
        return tuple(f"class {index}" for index in range(passport.classes))
    card = cards.full_card(passport.model)
    known = dict(cards.class_names(card)) if card else {}
    return tuple(_label(name, known.get(name, name)) for name in names)


def labels_text(passport: Passport) -> bytes:
    """The contents of ``labels.txt``, in UTF-8."""
    return "".join(f"{label}\n" for label in labels(passport)).encode()


def _label(name: str, label: str) -> str:
    return printable(name if label == name else f"{name} {label}")
