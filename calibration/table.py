"""Reads, writes and merges ``calibration.json``, the activation statistics of a model.

The file holds everything that quantisation needs, and the names and hashes of the calibration
images.  ``seal`` is the SHA-256 of the other fields: a table that was truncated or edited is
refused.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from calibration.observers import BINS, ChannelStatistics
from clipdeploy.core.display import Renderable, Shown, columns
from clipdeploy.core.errors import ArtifactError, CalibrationError
from clipdeploy.core.files import write_atomic
from clipdeploy.core.passport import Preprocess, read_json, to_json
from clipdeploy.core.values import Fault, is_hash, is_name, is_number, unless, unless_lines
from exporters.samples import Samples

__all__ = [
    "JUDGED_CROPS",
    "MOST_CROPS",
    "CalibrationCrop",
    "CalibrationImageRecord",
    "CalibrationTable",
    "Finding",
    "choose_crops",
    "load_table",
    "merge_tables",
    "save_table",
]


_SCHEMA = 5
# First schema with a hash and a thumbnail of each image's decoded pixels.
_SCHEMA_WITH_PIXELS = 3
# First schema with crops.
_SCHEMA_WITH_CROPS = 4
# First schema with findings, and the size of each image's file.
_SCHEMA_WITH_FINDINGS = 5
# Number of crops stored in a table: the first are for judging a graph, the others for fitting it.
MOST_CROPS = 40
JUDGED_CROPS = 8
# Of zlib. Statistics are packed after every few images, for which the default, 6, is slow.
_LEVEL = 4
# Upper limits for values read from a file.
_MOST_CHANNELS = 1_000_000
_MOST_SHARDS = 1_000_000


@dataclass(frozen=True)
class CalibrationImageRecord:
    """A calibration image: its path inside the data folder, and the SHA-256 of its bytes.

    ``pixels`` and ``thumbnail``: hash in hex and 8 x 8 grey means of the decoded crop, see
    :mod:`clipdeploy.imaging.fingerprints`; empty if unknown.  ``edge``: the short edge in pixels of
    the image in the file, 0 if unknown.  Records compare by name and bytes only, because images
    are listed before they are decoded.
    """

    name: str
    sha256: str
    pixels: str = field(default="", compare=False)
    thumbnail: bytes = field(default=b"", compare=False)
    edge: int = field(default=0, compare=False)

    def faults(self) -> Iterator[Fault]:
        """Invalid values; see :mod:`clipdeploy.core.values`."""
        yield from unless(self.edge >= 0, "edge", self.edge, "0 or more")

    @property
    def decoded(self) -> bool:
        """Whether the decoded pixels are known."""
        return bool(self.pixels)


@dataclass(frozen=True)
class CalibrationCrop:
    """An image to fit or judge a quantised graph on; ``pixels`` are uint8 (S, S, 3), zlib."""

    name: str
    sha256: str
    pixels: bytes

    @classmethod
    def of(cls, name: str, sha256: str, pixels: NDArray[np.uint8]) -> CalibrationCrop:
        """Compress a crop, uint8 (S, S, 3)."""
        return cls(name, sha256, zlib.compress(np.ascontiguousarray(pixels).tobytes()))


def choose_crops(crops: Iterable[CalibrationCrop]) -> tuple[CalibrationCrop, ...]:
    """The crops with the lowest SHA-256, without copies; independent of order and sharding."""
    known = {crop.sha256: crop for crop in sorted(crops, key=lambda crop: crop.name, reverse=True)}
    return tuple(known[sha256] for sha256 in sorted(known)[:MOST_CROPS])


@dataclass(frozen=True)
class Finding:
    """What is wrong with the calibration: a ``kind`` such as ``copies``, and a sentence."""

    kind: str
    sentence: str

    def faults(self) -> Iterator[Fault]:
        """Invalid values; see :mod:`clipdeploy.core.values`."""
        yield from unless_lines("kind", self.kind)
        yield from unless_lines("sentence", self.sentence)


@dataclass(frozen=True)
class PackedStatistics:
    """:class:`ChannelStatistics` for JSON: little-endian arrays, zlib, base64."""

    channels: int
    rows: int
    amax: float
    extremes: bytes
    counts: bytes
    total: bytes

    def faults(self) -> Iterator[Fault]:
        """Invalid values; see :mod:`clipdeploy.core.values`."""
        held = 1 <= self.channels <= _MOST_CHANNELS
        yield from unless(held, "channels", self.channels, f"from 1 to {_MOST_CHANNELS}")
        yield from unless(self.rows >= 0, "rows", self.rows, "0 or more")
        finite = is_number(self.amax, 0, math.inf)
        yield from unless(finite, "amax", self.amax, "0 or more")


@dataclass(frozen=True)
class CalibrationTable(Shown):
    """Statistics by Linear name (``blocks.7.mlp.fc2``), and their origin.

    ``source_graph``: SHA-256 of the FP32 graph.  ``weights``: identity of its checkpoint.
    ``shard``: (i, n) for the i-th of n parts, which has no ``findings`` yet.  ``crops``: a few of
    the images.
    """

    model: str
    weights: str
    source_graph: str
    preprocess: Preprocess
    images: tuple[CalibrationImageRecord, ...]
    statistics: dict[str, PackedStatistics]
    shard: tuple[int, int] | None = None
    seal: str = ""
    schema: int = _SCHEMA
    crops: tuple[CalibrationCrop, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def monitored(self) -> bool:
        """Whether the images were checked; False in a table of an older clipdeploy."""
        return self.schema >= _SCHEMA_WITH_FINDINGS

    def stored(self) -> Samples | None:
        """All stored images; None in a table of an older clipdeploy.

        Raises:
            CalibrationError: see :meth:`samples`.
        """
        return self._decoded(self.crops)

    def samples(self) -> Samples | None:
        """The stored images to judge a graph on; None in a table of an older clipdeploy.

        Raises:
            CalibrationError: an image does not have the size of ``preprocess``.
        """
        return self._decoded(self.crops[:JUDGED_CROPS])

    def fitted(self) -> Samples | None:
        """The stored images to fit a graph to, none of them in :meth:`samples`; None without any.

        Raises:
            CalibrationError: see :meth:`samples`.
        """
        return self._decoded(self.crops[JUDGED_CROPS:])

    def _decoded(self, crops: Sequence[CalibrationCrop]) -> Samples | None:
        size = self.preprocess.size
        try:
            arrays = [_array(crop.pixels, "uint8", size, size, 3) for crop in crops]
        except (zlib.error, ValueError) as error:
            raise CalibrationError(
                f"the calibration's images are damaged: {error}", hint="calibrate again"
            ) from error
        return Samples(np.stack(arrays), self.preprocess) if arrays else None

    def faults(self) -> Iterator[Fault]:
        """Invalid values; see :mod:`clipdeploy.core.values`."""
        yield from unless(is_name(self.model), "model", self.model, "a model's name")
        yield from unless_lines("weights", self.weights)
        digest = self.source_graph
        yield from unless(is_hash(digest), "source_graph", digest, "a SHA-256 in hex")
        if self.shard is not None:
            number, count = self.shard
            held = 1 <= number <= count <= _MOST_SHARDS
            yield from unless(held, "shard", self.shard, f"i of n, n up to {_MOST_SHARDS}")
        for name in self.statistics:
            yield from unless_lines("statistics", name)

    def of(self, name: str) -> ChannelStatistics:
        """The statistics of one Linear's input.

        Raises:
            CalibrationError: the table has no such Linear.
        """
        if name not in self.statistics:
            raise CalibrationError(
                f"the calibration has no statistics of {name}", hint="calibrate this model again"
            )
        return unpack(self.statistics[name])

    def __rich__(self) -> Renderable:
        rows = [
            (name, str(found.channels), f"{found.rows:,}", f"{found.amax:.4g}")
            for name, found in self.statistics.items()
        ]
        return columns(("tensor", "channels", "rows", "max |x|"), rows, left=("tensor",))


def pack(statistics: ChannelStatistics) -> PackedStatistics:
    """Compress statistics for JSON; the same statistics give the same bytes."""
    extremes = np.stack([statistics.minimum, statistics.maximum]).astype("<f4")
    return PackedStatistics(
        channels=statistics.channels,
        rows=statistics.rows,
        amax=float(statistics.amax.max()),
        extremes=zlib.compress(extremes.tobytes(), _LEVEL),
        counts=zlib.compress(statistics.counts.astype("<i4").tobytes(), _LEVEL),
        total=zlib.compress(statistics.total.astype("<i8").tobytes(), _LEVEL),
    )


def unpack(packed: PackedStatistics) -> ChannelStatistics:
    """The inverse of :func:`pack`.

    Raises:
        CalibrationError: the bytes are damaged.
    """
    channels = packed.channels
    try:
        extremes = _array(packed.extremes, "<f4", 2, channels)
        counts = _array(packed.counts, "<i4", channels, 2, BINS)
        total = _array(packed.total, "<i8", channels)
    except (zlib.error, ValueError) as error:
        raise CalibrationError(
            f"the calibration's statistics are damaged: {error}", hint="calibrate again"
        ) from error
    return ChannelStatistics(
        extremes[0].astype(np.float32),
        extremes[1].astype(np.float32),
        counts.astype(np.int32),
        total.astype(np.int64),
        packed.rows,
    )


def _array(data: bytes, dtype: str, *shape: int) -> NDArray[np.generic]:
    """The packed array of ``shape``; decompresses no more bytes than it needs."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = zlib.decompressobj().decompress(data, size + 1)
    if len(raw) != size:
        raise ValueError(f"the data do not have shape {shape}")
    return np.frombuffer(raw, dtype).reshape(shape)


def _seal(table: CalibrationTable) -> str:
    content = replace(table, seal="")
    if table.schema >= _SCHEMA_WITH_FINDINGS:
        return hashlib.sha256(msgspec.json.encode(content)).hexdigest()
    # Sealed without the fields that its schema lacks; a value in one of them breaks the seal.
    built = msgspec.to_builtins(content)
    crops = ("crops",) if table.schema < _SCHEMA_WITH_CROPS else ()
    pixels = ("pixels", "thumbnail") if table.schema < _SCHEMA_WITH_PIXELS else ()
    _drop_empty(built, ("findings", *crops))
    for image in built["images"]:
        _drop_empty(image, ("edge", *pixels))
    return hashlib.sha256(msgspec.json.encode(built)).hexdigest()


def _drop_empty(record: dict[str, object], names: Iterable[str]) -> None:
    for name in names:
        if not record.get(name):
            record.pop(name, None)


def merge_tables(parts: Sequence[CalibrationTable]) -> CalibrationTable:
    """Merge all shards of a run into a table that equals that of an unsharded run, bit for bit.

    Raises:
        CalibrationError: a shard is missing, repeated, or of another run.
    """
    if not parts:
        raise CalibrationError("no shard to merge", hint="calibrate with --shard 1/N to N/N")
    first = parts[0]
    if first.shard is None:
        raise CalibrationError(
            "the calibration is not a shard", hint="use it as it is, or calibrate with --shard I/N"
        )
    count = first.shard[1]
    numbers = sorted(part.shard[0] for part in parts if part.shard is not None)
    if numbers != list(range(1, count + 1)) or len(numbers) != len(parts):
        raise CalibrationError(
            f"found shards {numbers} of {count}, but 1 to {count} are needed, each once"
        )
    merged = {name: unpack(packed) for name, packed in first.statistics.items()}
    for part in parts[1:]:
        if _origin(part) != _origin(first) or part.statistics.keys() != merged.keys():
            raise CalibrationError(
                f"shards {first.shard} and {part.shard} are from different runs",
                hint="calibrate all shards from the same graph",
            )
        merged = {name: found.merge(part.of(name)) for name, found in merged.items()}
    images = sorted((image for part in parts for image in part.images), key=lambda i: i.name)
    if len({image.name for image in images}) != len(images):
        raise CalibrationError(
            "the shards share images",
            hint="calibrate all shards with the same --seed and --data",
        )
    return replace(
        first,
        images=tuple(images),
        statistics={name: pack(found) for name, found in merged.items()},
        shard=None,
        seal="",
        schema=_SCHEMA,
        crops=choose_crops(crop for part in parts for crop in part.crops),
    )


def _origin(table: CalibrationTable) -> tuple[object, ...]:
    count = table.shard[1] if table.shard else None
    return (table.model, table.weights, table.source_graph, table.preprocess, count)


def save_table(table: CalibrationTable, path: Path) -> CalibrationTable:
    """Seal a table and write it.

    Raises:
        FileError: no permission, or no space.
    """
    sealed = replace(table, seal=_seal(table))
    write_atomic(path, to_json(sealed))
    return sealed


def load_table(path: Path) -> CalibrationTable:
    """Read a table and check its seal.

    Raises:
        FileError: the file cannot be opened.
        ArtifactError: it is truncated, edited, or from a newer clipdeploy.
    """
    table = read_json(path, CalibrationTable, _SCHEMA)
    if table.seal != _seal(table):
        raise ArtifactError(
            f"{path} does not match its seal: it was edited or damaged",
            hint="calibrate again",
        )
    return table
