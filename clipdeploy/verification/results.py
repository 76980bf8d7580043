"""The results file: what was asked, then a line a batch of images, each with its checksum.

    {"sum": ..., "line": {"question": ...}}                       what decides the records
    {"sum": ..., "line": {"batch": 0, "records": [...], ...}}
    {"sum": ..., "line": {"batch": 1, ...}}

``sum`` is a hash of its own line and of the sum before it: a line that was edited, moved, repeated
or left out in the middle is found.  A run appends a line as soon as a batch is done, so that a
killed one goes on; a last line that was cut short is no line.  Batches are cut from the whole list
of images, and a shard takes every n-th: an image meets the same neighbours in every run, and its
logits are the same to the last bit.  Verdicts are made from the records afterwards: another
``--max-drop`` needs no new run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.files import file_errors, read_regular, write_atomic
from clipdeploy.core.passport import Preprocess, Recipe
from clipdeploy.core.values import (
    MOST_BATCH,
    MOST_CLASSES,
    Fault,
    first_fault,
    is_name,
    unless,
    unless_lines,
)
from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.repeats import Repeat

__all__ = [
    "Asked",
    "BatchResult",
    "Question",
    "Results",
    "ResultsWriter",
    "merge_results",
    "read_results",
    "save_results",
]

RESULTS_SCHEMA = 3
_MOST_IMAGES = 1_000_000_000


@dataclass(frozen=True)
class Asked:
    """An artifact under judgement.

    ``runner`` computed its logits, empty if nothing could: then ``why_not`` says why.  ``vouched``
    is False for a file without a passport, ``emulated`` True where half precision was computed in
    float32, of which ``why_not`` says why as well.
    ``calibration`` is the SHA-256 of the table that it was calibrated with, empty if with none,
    None if that is unknown.
    """

    artifact: str
    kind: str
    precision: str
    sha256: str
    runner: str
    why_not: str = ""
    vouched: bool = True
    emulated: bool = False
    calibration: str | None = ""


@dataclass(frozen=True)
class Question:
    """All that decides the records; only results of the same question can be joined.

    ``decoder`` is the key of all that decides pixels, ``entries`` the SHA-256 of the images' names
    and classes in their order, ``contents`` that of all files' sizes and of some files' bytes;
    ``problems`` is what listing them showed, ``calibrated`` the SHA-256 of the calibration images'
    hashes, empty without any.  ``partial_classes`` is the number of classes that the images are of
    where they were drawn from a part of the model's, else 0.  ``sequential`` is the largest drop at
    which the run stops early.
    ``threads`` decides the last bits: sums are cut into as many parts.
    """

    model: str
    weights: str
    random_weights: bool
    recipe: Recipe
    preprocess: Preprocess
    decoder: str
    reference: str
    classes: int
    class_names: tuple[str, ...]
    artifacts: tuple[Asked, ...]
    images: int
    labelled: bool
    entries: str
    contents: str
    problems: tuple[str, ...]
    calibrated: str
    batch: int
    sequential: float | None
    threads: int
    versions: dict[str, str]
    partial_classes: int = 0
    schema: int = RESULTS_SCHEMA

    def faults(self) -> Iterator[Fault]:
        """Values that no question has; see :mod:`clipdeploy.core.values`."""
        yield from unless(is_name(self.model), "model", self.model, "a model's name")
        counts = {"batch": MOST_BATCH, "classes": MOST_CLASSES, "images": _MOST_IMAGES}
        for name, most in counts.items():
            value = getattr(self, name)
            yield from unless(1 <= value <= most, name, value, f"from 1 to {most}")
        yield from unless_lines("class_names", self.class_names)
        yield from unless_lines("versions", self.versions)

    @property
    def batches(self) -> int:
        """How many batches all images make."""
        return -(-self.images // self.batch)

    def size(self, number: int) -> int:
        """How many images batch ``number`` has."""
        return min(self.batch, self.images - number * self.batch)

    @property
    def ran(self) -> tuple[Asked, ...]:
        """The artifacts that something could run, in the order of every record's outcomes."""
        return tuple(asked for asked in self.artifacts if asked.runner)


@dataclass(frozen=True)
class BatchResult:
    """The records of one batch, in the order of its images, and what could not be read of it.

    ``repeats`` are the calls that were made again, of each artifact that ran.
    """

    batch: int
    records: tuple[ImageRecord, ...]
    unreadable: tuple[str, ...] = ()
    repeats: tuple[tuple[Repeat, ...], ...] = ()


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

    def repeats(self, lane: int) -> list[Repeat]:
        """The calls that were made again, of the artifact with this number."""
        return [repeat for batch in self.batches for repeat in batch.repeats[lane]]

    @property
    def header(self) -> _Header:
        """The first line of the file."""
        return _Header(self.question, self.data, self.stamps, self.shard)


class _Line(msgspec.Struct):
    sum: str
    line: msgspec.Raw


class _Chain:
    """Lines with their checksums, each of which covers the lines before it."""

    def __init__(self) -> None:
        self._last = b""

    def _sum(self, line: bytes) -> str:
        found = hashlib.blake2b(line, key=self._last, digest_size=16)
        self._last = found.digest()
        return found.hexdigest()

    def write(self, value: object) -> bytes:
        """The next line, with its line break."""
        line = msgspec.json.encode(value)
        return msgspec.json.encode(_Line(self._sum(line), msgspec.Raw(line))) + b"\n"

    def read(self, data: bytes) -> bytes:
        """The value of the next line, as JSON.

        Raises:
            msgspec.MsgspecError: it is no line, or not what its checksum is of.
        """
        line = msgspec.json.decode(data, type=_Line)
        if self._sum(bytes(line.line)) != line.sum:
            raise msgspec.ValidationError("a line does not match its checksum: it was changed")
        return bytes(line.line)


class ResultsWriter:
    """Appends batches to a results file; close it after use.

    Raises:
        FileError: no permission, no space.
    """

    def __init__(self, path: Path, known: Results) -> None:
        """The file is written anew with what is ``known``, so that no broken line stays in it."""
        self._path = path
        self._chain = save_results(path, known)
        with file_errors("write", path):
            self._stream = path.open("ab")

    def append(self, batch: BatchResult) -> None:
        """Add a batch; a reader that comes after sees it."""
        with file_errors("write", self._path):
            self._stream.write(self._chain.write(batch))
            self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        with file_errors("write", self._path):
            self._stream.close()


def save_results(path: Path, results: Results) -> _Chain:
    """Write results as a whole; the chain that the next line goes on with.

    Raises:
        FileError: no permission, no space.
    """
    chain = _Chain()
    write_atomic(path, b"".join(map(chain.write, (results.header, *results.batches))))
    return chain


def read_results(path: Path) -> Results:
    """Read a results file; a last line that was cut short is left out.

    Raises:
        FileError: it cannot be opened.
        ArtifactError: it is no results file, is damaged or edited, or of another clipdeploy.
    """
    first, *lines = read_regular(path).split(b"\n")
    chain = _Chain()
    try:
        header = msgspec.json.decode(chain.read(first), type=_Header)
        if (schema := header.question.schema) != RESULTS_SCHEMA:
            raise ArtifactError(
                f"{path} was written by {'a newer' if schema > RESULTS_SCHEMA else 'an older'} "
                "clipdeploy",
                hint="upgrade, or verify again" if schema > RESULTS_SCHEMA else "verify again",
            )
        if fault := first_fault(header.question):
            raise ArtifactError(f"{path} is invalid: {fault}", hint="verify again")
        # What follows the last line break is nothing, or a line that was cut short.
        decoder = msgspec.json.Decoder(BatchResult)
        batches = [decoder.decode(chain.read(line)) for line in lines[:-1]]
    except msgspec.MsgspecError as error:
        raise ArtifactError(
            f"{path} holds no results that can be read: {error}", hint="verify again"
        ) from error
    batches.sort(key=lambda batch: batch.batch)
    found = Results(header.question, header.data, tuple(batches), header.stamps, header.shard)
    if problem := _impossible(found):
        raise ArtifactError(f"{path} holds results that cannot be: {problem}", hint="verify again")
    return found


def _impossible(results: Results) -> str:
    """Why these cannot be results of their question; empty if they can."""
    question, lanes = results.question, len(results.question.ran)
    numbers = Counter(batch.batch for batch in results.batches)
    names = Counter(
        name
        for batch in results.batches
        for name in (*(record.name for record in batch.records), *batch.unreadable)
    )
    for number, count in numbers.items():
        if count > 1 or not 0 <= number < question.batches:
            return f"batch {number} is there {count} times, of {question.batches} batches"
    for batch in results.batches:
        images = len(batch.records) + len(batch.unreadable)
        if images != question.size(batch.batch):
            return f"batch {batch.batch} has {images} images, not {question.size(batch.batch)}"
        if any(len(record.outcomes) != lanes for record in batch.records):
            return f"batch {batch.batch} has outcomes of other artifacts than {lanes}"
        if len(batch.repeats) != lanes:
            return f"batch {batch.batch} was not asked again of all {lanes} artifacts"
    if names and (worst := names.most_common(1)[0])[1] > 1:
        return f"{worst[0]} is there {worst[1]} times"
    return ""


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
    merged = replace(first, batches=ordered, shard=None, stamps=stamps)
    if problem := _impossible(merged):
        raise ArtifactError(
            f"the shards are not of one run: {problem}", hint="verify these shards again"
        )
    return merged


def _difference(one: Question, other: Question) -> str:
    names = [
        name for name in one.__dataclass_fields__ if getattr(one, name) != getattr(other, name)
    ]
    return f"they differ in {', '.join(names)}"
