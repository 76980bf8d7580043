"""Reads, writes and merges results files: a header, then a line per batch, each with a checksum.

    {"sum": ..., "line": {"question": ...}}                       what determines the records
    {"sum": ..., "line": {"batch": 0, "records": [...], ...}}
    {"sum": ..., "line": {"batch": 1, ...}}

``sum`` is a hash of its own line and of the previous sum: it detects a line that was edited, moved,
repeated or removed. A run appends a line as soon as a batch is done, so that a killed run can
resume; an incomplete last line is ignored. Batches are cut from the whole list of images, and a
shard takes every n-th batch: an image has the same neighbours in every run, and its logits are the
same to the last bit. Verdicts are derived from the records afterwards: another ``--max-drop`` needs
no new run.
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
from clipdeploy.core.passport import Preprocess, Recipe, Task, Tower
from clipdeploy.core.values import (
    MOST_BATCH,
    MOST_CLASSES,
    Fault,
    first_fault,
    is_hash,
    is_name,
    unless,
    unless_lines,
)
from clipdeploy.verification.records import GALLERY, ImageRecord
from clipdeploy.verification.repeats import Repeat

__all__ = [
    "ArtifactEntry",
    "BatchResult",
    "Results",
    "ResultsWriter",
    "RunKey",
    "merge_results",
    "read_results",
    "save_results",
]

RESULTS_SCHEMA = 3
_MOST_IMAGES = 1_000_000_000


@dataclass(frozen=True)
class ArtifactEntry:
    """An artifact to be judged.

    ``runner`` computed its logits; it is empty if none could, and ``why_not`` gives the reason.
    ``vouched`` is False for a file without a passport. ``emulated`` is True if half precision was
    computed in float32; ``why_not`` gives the reason as well. ``calibration`` is the SHA-256 of its
    calibration table, empty without calibration, None if unknown.
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
class RunKey:
    """Everything that determines the records; only results with equal keys can be merged.

    ``decoder`` is the key of everything that determines pixels, ``entries`` the SHA-256 of the
    image names and classes in order, ``contents`` that of all file sizes and of the bytes of some
    files; ``problems`` were found while listing the images, ``calibrated`` is the SHA-256 of the
    calibration images' hashes, empty without calibration. ``partial_classes`` is the number of
    classes that the images cover if they were drawn from a part of the model's classes, else 0.
    ``sequential`` is the largest drop of a run that may stop early, else None. ``threads`` affects
    the last bits: a sum is split into as many parts. ``clip`` is the published CLIP that a
    zero-shot classifier was made from, empty for another CLIP, None for other classifiers;
    ``prompts`` is the SHA-256 of its class texts and templates. An embedding model has no classes;
    ``classes`` is then the width of the embedding.  The images of a text ``tower`` are texts.
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
    artifacts: tuple[ArtifactEntry, ...]
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
    clip: str | None = None
    prompts: str = ""
    task: Task = "classification"
    tower: Tower = "image"
    schema: int = RESULTS_SCHEMA

    def faults(self) -> Iterator[Fault]:
        """Yield impossible values; see :mod:`clipdeploy.core.values`."""
        yield from unless(is_name(self.model), "model", self.model, "a model's name")
        counts = {"batch": MOST_BATCH, "classes": MOST_CLASSES, "images": _MOST_IMAGES}
        for name, most in counts.items():
            value = getattr(self, name)
            yield from unless(1 <= value <= most, name, value, f"from 1 to {most}")
        yield from unless_lines("class_names", self.class_names)
        yield from unless_lines("versions", self.versions)
        yield from unless_lines("clip", self.clip or "")
        hashed = not self.prompts or is_hash(self.prompts)
        yield from unless(hashed, "prompts", self.prompts, "a SHA-256 in hex")

    @property
    def batches(self) -> int:
        """The number of batches of all images."""
        return -(-self.images // self.batch)

    def size(self, number: int) -> int:
        """Return the number of images in batch ``number``."""
        return min(self.batch, self.images - number * self.batch)

    def keeps_embeddings(self, number: int) -> bool:
        """Whether the records of batch ``number`` have the embeddings."""
        return self.task == "embedding" and number * self.batch < GALLERY

    @property
    def ran(self) -> tuple[ArtifactEntry, ...]:
        """The artifacts that had a runner, in the order of every record's outcomes."""
        return tuple(entry for entry in self.artifacts if entry.runner)


@dataclass(frozen=True)
class BatchResult:
    """The records of one batch, in the order of its images, and the names of unreadable images.

    ``repeats`` are the repeated calls, of each artifact that ran.
    """

    batch: int
    records: tuple[ImageRecord, ...]
    unreadable: tuple[str, ...] = ()
    repeats: tuple[tuple[Repeat, ...], ...] = ()


class _Header(msgspec.Struct, frozen=True):
    """The first line. ``data`` and ``stamps`` (state of the files) are specific to this machine."""

    run_key: RunKey = msgspec.field(name="question")
    data: str
    stamps: str
    shard: tuple[int, int] | None = None


@dataclass(frozen=True)
class Results:
    """A run key and the batches that are done, in order."""

    run_key: RunKey
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
        """The numbers of the batches that are done."""
        return frozenset(batch.batch for batch in self.batches)

    def repeats(self, lane: int) -> list[Repeat]:
        """Return the repeated calls of the artifact with index ``lane``."""
        return [repeat for batch in self.batches for repeat in batch.repeats[lane]]

    @property
    def header(self) -> _Header:
        """The first line of the file."""
        return _Header(self.run_key, self.data, self.stamps, self.shard)


class _Line(msgspec.Struct):
    sum: str
    line: msgspec.Raw


class _Chain:
    """Encodes and decodes lines; each checksum covers the previous lines."""

    def __init__(self) -> None:
        self._last = b""

    def _sum(self, line: bytes) -> str:
        found = hashlib.blake2b(line, key=self._last, digest_size=16)
        self._last = found.digest()
        return found.hexdigest()

    def write(self, value: object) -> bytes:
        """Encode the next line, with its line break."""
        line = msgspec.json.encode(value)
        return msgspec.json.encode(_Line(self._sum(line), msgspec.Raw(line))) + b"\n"

    def read(self, data: bytes) -> bytes:
        """Decode the next line and return its value as JSON.

        Raises:
            msgspec.MsgspecError: it is not a line, or its checksum does not match.
        """
        line = msgspec.json.decode(data, type=_Line)
        if self._sum(bytes(line.line)) != line.sum:
            raise msgspec.ValidationError("a line was changed: its checksum does not match")
        return bytes(line.line)


class ResultsWriter:
    """Appends batches to a results file; close it after use.

    Raises:
        FileError: no permission, no space.
    """

    def __init__(self, path: Path, known: Results) -> None:
        """Write the file again with ``known``, which removes an incomplete last line."""
        self._path = path
        self._chain = save_results(path, known)
        with file_errors("write", path):
            self._stream = path.open("ab")

    def append(self, batch: BatchResult) -> None:
        """Append a batch and flush it."""
        with file_errors("write", self._path):
            self._stream.write(self._chain.write(batch))
            self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        with file_errors("write", self._path):
            self._stream.close()


def save_results(path: Path, results: Results) -> _Chain:
    """Write all results; return the checksum chain to continue with.

    Raises:
        FileError: no permission, no space.
    """
    chain = _Chain()
    write_atomic(path, b"".join(map(chain.write, (results.header, *results.batches))))
    return chain


def read_results(path: Path) -> Results:
    """Read a results file; ignore an incomplete last line.

    Raises:
        FileError: it cannot be opened.
        ArtifactError: it is not a results file, is damaged or edited, or was written by an
            incompatible version.
    """
    first, *lines = read_regular(path).split(b"\n")
    chain = _Chain()
    try:
        header = msgspec.json.decode(chain.read(first), type=_Header)
        if (schema := header.run_key.schema) != RESULTS_SCHEMA:
            raise ArtifactError(
                f"{path} was written by {'a newer' if schema > RESULTS_SCHEMA else 'an older'} "
                "clipdeploy",
                hint="upgrade, or verify again" if schema > RESULTS_SCHEMA else "verify again",
            )
        if fault := first_fault(header.run_key):
            raise ArtifactError(f"{path} has an invalid value: {fault}", hint="verify again")
        # After the last line break there is nothing, or an incomplete line.
        decoder = msgspec.json.Decoder(BatchResult)
        batches = [decoder.decode(chain.read(line)) for line in lines[:-1]]
    except msgspec.MsgspecError as error:
        raise ArtifactError(
            f"{path} is not a readable results file: {error}", hint="verify again"
        ) from error
    batches.sort(key=lambda batch: batch.batch)
    found = Results(header.run_key, header.data, tuple(batches), header.stamps, header.shard)
    if problem := _impossible(found):
        raise ArtifactError(f"{path} has impossible results: {problem}", hint="verify again")
    return found


def _impossible(results: Results) -> str:
    """Return why these results do not fit their run key; empty if they do."""
    run_key, lanes = results.run_key, len(results.run_key.ran)
    numbers = Counter(batch.batch for batch in results.batches)
    names = Counter(
        name
        for batch in results.batches
        for name in (*(record.name for record in batch.records), *batch.unreadable)
    )
    for number, count in numbers.items():
        if count > 1 or not 0 <= number < run_key.batches:
            return f"batch {number} occurs {count} times, of {run_key.batches} batches"
    for batch in results.batches:
        images = len(batch.records) + len(batch.unreadable)
        if images != run_key.size(batch.batch):
            return f"batch {batch.batch} has {images} images, not {run_key.size(batch.batch)}"
        if any(len(record.outcomes) != lanes for record in batch.records):
            return f"batch {batch.batch} does not have the outcomes of {lanes} artifacts"
        width = 4 * run_key.classes if run_key.keeps_embeddings(batch.batch) else 0
        if _embedding_sizes(batch) - {width}:
            return f"batch {batch.batch} has embeddings of another size than {width} bytes"
        if len(batch.repeats) != lanes:
            return f"batch {batch.batch} does not have the repeated calls of {lanes} artifacts"
    if names and (worst := names.most_common(1)[0])[1] > 1:
        return f"{worst[0]} occurs {worst[1]} times"
    return ""


def _embedding_sizes(batch: BatchResult) -> set[int]:
    references = {len(record.embedding) for record in batch.records}
    return references | {len(o.embedding) for record in batch.records for o in record.outcomes}


def merge_results(parts: Sequence[Results]) -> Results:
    """Merge the shards of one run.

    Raises:
        ArtifactError: a shard is missing, duplicated, unfinished, or of another run.
    """
    if not parts:
        raise ArtifactError(
            "no shard to merge", hint="run clipdeploy verify --data IMAGES --shard 1/4, and so on"
        )
    first = parts[0]
    for part in parts[1:]:
        if part.run_key != first.run_key:
            raise ArtifactError(
                f"the shards are not of one run: {_difference(first.run_key, part.run_key)}",
                hint="verify every shard with the same artifacts, images, versions and --threads; "
                "remove shards of older runs, or name the shards to merge",
            )
    batches: dict[int, BatchResult] = {}
    for batch in (batch for part in parts for batch in part.batches):
        if batches.setdefault(batch.batch, batch) != batch:
            raise ArtifactError(
                f"two shards differ on batch {batch.batch}", hint="verify these shards again"
            )
    missing = sorted(set(range(first.run_key.batches)) - set(batches))
    if missing:
        raise ArtifactError(
            f"{len(missing)} of {first.run_key.batches} batches are missing: a shard is "
            "missing or unfinished",
            hint="run the missing shards, or name all of them",
        )
    ordered = tuple(batches[number] for number in sorted(batches))
    # If no file has changed between the shards, the merged results equal those of one run.

    stamps = first.stamps if all(part.stamps == first.stamps for part in parts) else ""
    merged = replace(first, batches=ordered, shard=None, stamps=stamps)
    if problem := _impossible(merged):
        raise ArtifactError(
            f"the shards are not of one run: {problem}", hint="verify these shards again"
        )
    return merged


def _difference(one: RunKey, other: RunKey) -> str:
    names = [
        name for name in one.__dataclass_fields__ if getattr(one, name) != getattr(other, name)
    ]
    return f"they differ in {', '.join(names)}"
