"""``calibration.json``: the statistics of a model's activations on named images, sealed.

The file holds everything that quantisation needs, and the names and hashes of the images that it
came from.  ``seal`` is the SHA-256 of the rest, so that a table which was cut short or edited by
hand is refused rather than believed.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
from rich.table import Table
from rich.text import Text

from calibration.observers import BINS, ChannelStatistics
from exporters.artifact import Preprocess, from_json, to_json
from exporters.errors import ArtifactError, CalibrationError
from exporters.files import file_errors, write_atomic
from exporters.notebook import Renderable, Shown

__all__ = ["CalibrationImageRecord", "CalibrationTable", "load_table", "merge_tables", "save_table"]


_SCHEMA = 3
# Tables before this schema hold nothing of an image's decoded pixels.
_SCHEMA_WITH_PIXELS = 3


@dataclass(frozen=True)
class CalibrationImageRecord:
    """An image that was used: its path inside the data folder, and the SHA-256 of its bytes.

    ``pixels`` and ``thumbnail`` are the hash in hex and the 8 x 8 grey means of its decoded crop,
    see :mod:`clipdeploy.imaging.fingerprints`; empty if they are unknown.  Records are the same if
    name and bytes are: which images there are is known before they are decoded.
    """

    name: str
    sha256: str
    pixels: str = field(default="", compare=False)
    thumbnail: bytes = field(default=b"", compare=False)

    @property
    def decoded(self) -> bool:
        """Whether the decoded pixels are known."""
        return bool(self.pixels)


@dataclass(frozen=True)
class PackedStatistics:
    """:class:`ChannelStatistics` as JSON can carry it: little-endian arrays, zlib, base64."""

    channels: int
    rows: int
    amax: float
    extremes: bytes
    counts: bytes
    total: bytes


@dataclass(frozen=True)
class CalibrationTable(Shown):
    """Statistics by Linear name (``blocks.7.mlp.fc2``), and what they were collected from.

    ``source_graph`` is the SHA-256 of the FP32 graph; ``weights`` the identity of its checkpoint;
    ``shard`` is (i, n) for the i-th of n parts.
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

    def of(self, name: str) -> ChannelStatistics:
        """The statistics of one Linear's input.

        Raises:
            CalibrationError: the table has no such Linear.
        """
        if name not in self.statistics:
            raise CalibrationError(
                f"the calibration has nothing about {name}", hint="calibrate this model again"
            )
        return unpack(self.statistics[name])

    def __rich__(self) -> Renderable:
        table = Table(box=None, pad_edge=False)
        for title in ("tensor", "channels", "rows", "max |x|"):
            table.add_column(title, justify="left" if title == "tensor" else "right")
        for name, found in self.statistics.items():
            figures = (str(found.channels), f"{found.rows:,}", f"{found.amax:.4g}")
            table.add_row(Text(name), *figures)
        return table


def pack(statistics: ChannelStatistics) -> PackedStatistics:
    """Make statistics fit for JSON; the same statistics give the same bytes."""
    extremes = np.stack([statistics.minimum, statistics.maximum]).astype("<f4")
    return PackedStatistics(
        channels=statistics.channels,
        rows=statistics.rows,
        amax=float(statistics.amax.max()),
        extremes=zlib.compress(extremes.tobytes()),
        counts=zlib.compress(statistics.counts.astype("<i4").tobytes()),
        total=zlib.compress(statistics.total.astype("<i8").tobytes()),
    )


def unpack(packed: PackedStatistics) -> ChannelStatistics:
    """The inverse of :func:`pack`.

    Raises:
        CalibrationError: the bytes are not the arrays they should be.
    """
    channels = packed.channels
    try:
        extremes = np.frombuffer(zlib.decompress(packed.extremes), "<f4").reshape(2, channels)
        counts = np.frombuffer(zlib.decompress(packed.counts), "<i4").reshape(channels, 2, BINS)
        total = np.frombuffer(zlib.decompress(packed.total), "<i8").reshape(channels)
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


def _seal(table: CalibrationTable) -> str:
    content = replace(table, seal="")
    if table.schema >= _SCHEMA_WITH_PIXELS:
        return hashlib.sha256(msgspec.json.encode(content)).hexdigest()
    # As it was sealed, without fields that there were not yet: whatever is in them breaks the seal.
    built = msgspec.to_builtins(content)
    for image in built["images"]:
        for name in ("pixels", "thumbnail"):
            if not image.get(name):
                image.pop(name, None)
    return hashlib.sha256(msgspec.json.encode(built)).hexdigest()


def merge_tables(parts: Sequence[CalibrationTable]) -> CalibrationTable:
    """One table of all shards of a run, equal to that of an unbroken run, bit for bit.

    Raises:
        CalibrationError: a shard is missing, there twice, or of another run.
    """
    if not parts:
        raise CalibrationError("no shard to merge", hint="calibrate with --shard 1/N and so on")
    first = parts[0]
    if first.shard is None:
        raise CalibrationError("this is no shard: it is a whole calibration already")
    count = first.shard[1]
    numbers = sorted(part.shard[0] for part in parts if part.shard is not None)
    if numbers != list(range(1, count + 1)) or len(numbers) != len(parts):
        raise CalibrationError(
            f"shards {numbers} of {count} are here, 1 to {count} are needed, each once"
        )
    merged = {name: unpack(packed) for name, packed in first.statistics.items()}
    for part in parts[1:]:
        if _origin(part) != _origin(first) or part.statistics.keys() != merged.keys():
            raise CalibrationError(
                f"shards {first.shard} and {part.shard} are of different runs",
                hint="calibrate all shards from the same graph",
            )
        merged = {name: found.merge(part.of(name)) for name, found in merged.items()}
    images = sorted((image for part in parts for image in part.images), key=lambda i: i.name)
    if len({image.name for image in images}) != len(images):
        raise CalibrationError(
            "the shards share images", hint="calibrate every shard with one --seed and one --data"
        )
    return replace(
        first,
        images=tuple(images),
        statistics={name: pack(found) for name, found in merged.items()},
        shard=None,
        seal="",
        schema=_SCHEMA,
    )


def _origin(table: CalibrationTable) -> tuple[object, ...]:
    count = table.shard[1] if table.shard else None
    return (table.model, table.weights, table.source_graph, table.preprocess, count)


def save_table(table: CalibrationTable, path: Path) -> CalibrationTable:
    """Seal a table and write it.

    Raises:
        FileError: no permission, no space.
    """
    sealed = replace(table, seal=_seal(table))
    write_atomic(path, to_json(sealed))
    return sealed


def load_table(path: Path) -> CalibrationTable:
    """Read a table and hold it against its seal.

    Raises:
        FileError: it cannot be opened.
        ArtifactError: it was cut short, edited, or written by a newer clipdeploy.
    """
    with file_errors("read", path):
        data = path.read_bytes()
    table = from_json(data, CalibrationTable, str(path), _SCHEMA)
    if table.seal != _seal(table):
        raise ArtifactError(
            f"{path} does not match its own seal: it was edited or damaged",
            hint="calibrate again",
        )
    return table
