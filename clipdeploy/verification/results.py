"""The results file: what was asked, then a line a batch of images.

    {"question": ...}                                   what decides the records, and nothing else
    {"batch": 0, "records": [...], "unreadable": [...]}
    {"batch": 1, ...}

A run appends a line as soon as a batch is done, so that a killed one goes on; a last line that was
cut short is no line.  Batches are cut from the whole list of images, and a shard takes every n-th:
an image meets the same neighbours in every run, and its logits are the same to the last bit.
Verdicts are made from the records afterwards: another ``--max-drop`` needs no new run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from clipdeploy.verification.records import ImageRecord
from exporters.artifact import Preprocess, Recipe
from exporters.errors import ArtifactError
from exporters.files import file_errors, write_atomic

__all__ = [
    "Asked",
    "BatchResult",
    "Question",
    "Results",
    "ResultsWriter",
    "merge_results",
    "read_results",
    "resume_results",
    "save_results",
]

RESULTS_SCHEMA = 1


@dataclass(frozen=True)
class Asked:
    """An artifact under judgement.

    ``runner`` computed its logits, empty if nothing could: then ``why_not`` says why.  ``vouched``
    is False for a file without a passport, ``emulated`` True where float16 was computed in float32.
    """

    artifact: str
    kind: str
    precision: str
    sha256: str
    runner: str
    why_not: str = ""
    vouched: bool = True
    emulated: bool = False


@dataclass(frozen=True)
class Question:
    """All that decides the records; only results of the same question can be joined.

    ``entries`` is the SHA-256 of the images' names and classes in their order, ``problems`` what
    listing them showed, ``calibrated`` the SHA-256 of the calibration images' hashes, empty if
    nobody knows them.  ``sequential`` is the largest drop at which the run stops early.
    ``threads`` decides the last bits: sums are cut into as many parts.
    """

    model: str
    weights: str
    random_weights: bool
    recipe: Recipe
    preprocess: Preprocess
    reference: str
    classes: int
    class_names: tuple[str, ...]
    artifacts: tuple[Asked, ...]
    images: int
    labelled: bool
    entries: str
    problems: tuple[str, ...]
    calibrated: str | None
    batch: int
    sequential: float | None
    threads: int
    versions: dict[str, str]
    schema: int = RESULTS_SCHEMA

    @property
    def batches(self) -> int:
        """How many batches all images make."""
        return -(-self.images // self.batch)


@dataclass(frozen=True)
class BatchResult:
    """The records of one batch, in the order of its images, and what could not be read of it."""

    batch: int
    records: tuple[ImageRecord, ...]
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Header:
    """``data`` and ``stamps`` (the state of the files) are this machine's, not the question's."""

    question: Question
    data: str
    stamps: str
    shard: tuple[int, int] | None = None


@dataclass(frozen=True)
class Results:
    """What is known: the question and the batches that are done, in order."""

    question: Question
    data: str
    batches: tuple[BatchResult, ...]
    stamps: str = ""
    shard: tuple[int, int] | None = None

    @property
    def records(self) -> list[ImageRecord]:
        """All records, in the order of the images."""
        return [record for batch in self.batches for record in batch.records]

    @property
    def unreadable(self) -> tuple[str, ...]:
        """The images that could not be read."""
        return tuple(name for batch in self.batches for name in batch.unreadable)

    @property
    def done(self) -> frozenset[int]:
        """The numbers of the batches that are here."""
        return frozenset(batch.batch for batch in self.batches)

    @property
    def header(self) -> _Header:
        """The first line of the file."""
        return _Header(self.question, self.data, self.stamps, self.shard)


def _line(value: object) -> bytes:
    return msgspec.json.encode(value) + b"\n"


class ResultsWriter:
    """Appends batches to a results file; close it after use.

    Raises:
        FileError: no permission, no space.
    """

    def __init__(self, path: Path, known: Results) -> None:
        """The file is written anew with what is ``known``, so that no broken line stays in it."""
        self._path = path
        save_results(path, known)
        with file_errors("write", path):
            self._stream = path.open("ab")

    def append(self, batch: BatchResult) -> None:
        """Add a batch; a reader that comes after sees it."""
        with file_errors("write", self._path):
            self._stream.write(_line(batch))
            self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        with file_errors("write", self._path):
            self._stream.close()


def save_results(path: Path, results: Results) -> None:
    """Write results as a whole.

    Raises:
        FileError: no permission, no space.
    """
    lines = (_line(value) for value in (results.header, *results.batches))
    write_atomic(path, b"".join(lines))


def read_results(path: Path) -> Results:
    """Read a results file; a last line that was cut short is left out.

    Raises:
        FileError: it cannot be opened.
        ArtifactError: it is no results file, is damaged, or of a newer clipdeploy.
    """
    with file_errors("read", path):
        first, *lines = path.read_bytes().split(b"\n")
    try:
        header = msgspec.json.decode(first, type=_Header)
        if header.question.schema > RESULTS_SCHEMA:
            raise ArtifactError(
                f"{path} was written by a newer clipdeploy", hint="upgrade, or verify again"
            )
        # What follows the last line break is nothing, or a line that was cut short.
        decoder = msgspec.json.Decoder(BatchResult)
        batches = [decoder.decode(line) for line in lines[:-1]]
    except msgspec.MsgspecError as error:
        raise ArtifactError(
            f"{path} holds no results that can be read: {error}", hint="verify again"
        ) from error
    batches.sort(key=lambda batch: batch.batch)
    return Results(header.question, header.data, tuple(batches), header.stamps, header.shard)


def resume_results(paths: Iterable[Path], wanted: Results) -> Results:
    """What an earlier run left of the same question on unchanged files, else ``wanted`` itself."""
    for path in paths:
        if not path.exists() or not wanted.stamps:
            continue
        try:
            found = read_results(path)
        except ArtifactError:
            continue
        if found.header == wanted.header:
            return found
    return wanted


def merge_results(parts: Sequence[Results]) -> Results:
    """Join the shards of one run.

    Raises:
        ArtifactError: a shard is missing, there twice, unfinished, or of another run.
    """
    if not parts:
        raise ArtifactError(
            "no shard to merge", hint="clipdeploy verify --data IMAGES --shard 1/4, and so on"
        )
    first = parts[0]
    for part in parts[1:]:
        if part.question != first.question:
            raise ArtifactError(
                f"the shards are not of one run: {_difference(first.question, part.question)}",
                hint="verify every shard with the same artifacts, images, versions and --threads; "
                "if shards of an older run lie beside them, remove those or name the others",
            )
    batches: dict[int, BatchResult] = {}
    for batch in (batch for part in parts for batch in part.batches):
        if batches.setdefault(batch.batch, batch) != batch:
            raise ArtifactError(
                f"two shards differ on batch {batch.batch}", hint="verify these shards again"
            )
    missing = sorted(set(range(first.question.batches)) - set(batches))
    if missing:
        raise ArtifactError(
            f"{len(missing)} of {first.question.batches} batches are missing: a shard is not "
            "there or not finished",
            hint="run the missing shards, or name all of them",
        )
    ordered = tuple(batches[number] for number in sorted(batches))
    # Of files that stood still all the while, the joined results are those of one run.
    stamps = first.stamps if all(part.stamps == first.stamps for part in parts) else ""
    return replace(first, batches=ordered, shard=None, stamps=stamps)


def _difference(one: Question, other: Question) -> str:
    names = [
        name for name in one.__dataclass_fields__ if getattr(one, name) != getattr(other, name)
    ]
    return f"they differ in {', '.join(names)}"
