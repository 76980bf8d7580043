"""Run images through the FP32 graph and observe its tensors, one image at a time.

A few tokens of each image are gathered inside the graph, so that no activation is copied out
whole.  One image at a time, because a batch's arithmetic depends on its size: this way a table
depends on the set of images alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.observers import ChannelObserver, ChannelStatistics
from calibration.policy import observed_tensors
from calibration.table import (
    MOST_CROPS,
    CalibrationCrop,
    CalibrationImageRecord,
    CalibrationTable,
    choose_crops,
    load_table,
    pack,
    save_table,
)
from clipdeploy.core.errors import CalibrationError, ClipdeployError, GraphError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.progress import SILENT, Progress
from exporters.graphs import load_graph
from exporters.headers import read_passport
from exporters.session import OnnxSession
from exporters.tapped import add_tap, free_batch, serialised

__all__ = ["ActivationCollector", "CalibrationImage", "CollectConfig", "collect"]

# Tokens of each image that are looked at, and of these the ones that are counted in histograms;
# the class token is always one of both.  Reducing over every token inside the graph would cost a
# quarter of the inference, gathering some costs nothing that could be measured.
SAMPLED_TOKENS = 33
COUNTED_TOKENS = 5
_TOKENS = "tap/tokens"


@dataclass(frozen=True)
class CalibrationImage:
    """One image as the graph takes it, (1, ...), its name and the SHA-256 of its file.

    ``pixels`` and ``thumbnail``: see :class:`CalibrationImageRecord`.  ``crop`` is the image as
    uint8 (S, S, 3), where it may be kept in the table.
    """

    name: str
    sha256: str
    input: NDArray[Any]
    pixels: str = ""
    thumbnail: bytes = b""
    crop: NDArray[np.uint8] | None = None

    @property
    def record(self) -> CalibrationImageRecord:
        """What a table keeps of it."""
        return CalibrationImageRecord(self.name, self.sha256, self.pixels, self.thumbnail)


@dataclass(frozen=True)
class _Tap:
    """A tensor to observe, (batch, tokens, channels), and the names it goes by in the table."""

    tensor: str
    tokens: int
    channels: int
    names: tuple[str, ...]


def _taps(model: ir.Model) -> list[_Tap]:
    taps: dict[str, _Tap] = {}
    for name, value in observed_tensors(model):
        shape = value.shape
        tensor = value.name or ""
        axes = tuple(axis for axis in (shape or ())[1:] if isinstance(axis, int))
        if shape is None or len(axes) != len(shape) - 1 or len(axes) not in (1, 2):
            raise GraphError(
                f"{name} has shape {shape}, not (batch, tokens, channels)",
                hint="quantise an FP32 graph that `clipdeploy export` wrote",
            )
        tokens, channels = axes if len(axes) == 2 else (1, axes[0])
        earlier = taps[tensor].names if tensor in taps else ()
        taps[tensor] = _Tap(tensor, tokens, channels, (*earlier, name))
    return list(taps.values())


def _tapped(model: ir.Model, taps: list[_Tap]) -> bytes:
    """The graph with an output for each tap, and the token indices as a second input.

    A tensor of one token is observed whole, of any other only the sampled tokens.
    """
    # Images are run one by one, also through a graph that was exported for a fixed batch.
    free_batch(model)
    values = {value.name: value for _, value in observed_tensors(model)}
    tokens = ir.Value(
        name=_TOKENS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["sampled"])
    )
    model.graph.inputs.append(tokens)
    for tap in taps:
        value = values[tap.tensor]
        if tap.tokens == 1:
            node = ir.node("Identity", [value])
        else:
            node = ir.node("Gather", [value, tokens], {"axis": 1})
        add_tap(model, f"tap/{tap.tensor}", [node])
    return serialised(model)


def _sampled_tokens(sha256: str, tokens: int) -> NDArray[np.int64]:
    """Which tokens of an image are looked at: its bytes decide, not its place in a run."""
    generator = np.random.default_rng(int(sha256[:16], 16))
    count = min(SAMPLED_TOKENS, tokens) - 1
    others = generator.choice(tokens - 1, size=count, replace=False) + 1
    return np.concatenate([[0], others]).astype(np.int64)


class ActivationCollector:
    """The tapped graph and one observer for each tap."""

    def __init__(self, graph: Path, threads: int = 0) -> None:
        """``threads`` are ONNX Runtime's, 0 for its own choice."""
        model = load_graph(graph)
        self._taps = _taps(model)
        self._tokens = max(tap.tokens for tap in self._taps)
        self._session = OnnxSession(_tapped(model, self._taps), name=str(graph), threads=threads)
        self._observers = [ChannelObserver(tap.tensor, tap.channels) for tap in self._taps]

    def resume(self, table: CalibrationTable) -> None:
        """Go on from the statistics of ``table``.

        Raises:
            CalibrationError: it lacks a tensor, or has another number of channels.
        """
        for tap, observer in zip(self._taps, self._observers, strict=True):
            observer.resume(table.of(tap.names[0]))

    def add(self, image: CalibrationImage) -> None:
        """Observe one image.

        Raises:
            CalibrationError: an activation is NaN or infinite.
        """
        tokens = _sampled_tokens(image.sha256, self._tokens)
        outputs = self._session.run(image.input, {_TOKENS: tokens})[1:]
        for tap, observer in zip(self._taps, self._observers, strict=True):
            rows = outputs.pop(0).reshape(-1, tap.channels)
            counted = rows[:COUNTED_TOKENS]
            observer.collect(rows.min(axis=0), rows.max(axis=0), counted, image.name)

    def statistics(self) -> dict[str, ChannelStatistics]:
        """What was observed so far, by the names of :func:`observed_tensors`."""
        return {
            name: observer.compute()
            for tap, observer in zip(self._taps, self._observers, strict=True)
            for name in tap.names
        }


@dataclass(frozen=True)
class CollectConfig:
    """``partial``: where an unfinished run is kept, ``every``: seconds from one save to the next.

    ``shard``: (i, n) if this is the i-th of n runs over parts of the images.  ``threads``: how many
    compute, 0 for ONNX Runtime's own choice.
    """

    partial: Path | None = None
    every: float = 30.0
    shard: tuple[int, int] | None = None
    threads: int = 0


def collect(
    graph: Path,
    images: Callable[[frozenset[CalibrationImageRecord]], Iterable[CalibrationImage]],
    wanted: Sequence[CalibrationImageRecord],
    config: CollectConfig = CollectConfig(),
    progress: Progress = SILENT,
) -> CalibrationTable:
    """Observe images in the FP32 ``graph``, going on from an unfinished run over the same images.

    ``images`` gives the images without those that it is told are done; ``wanted`` lists all.

    Raises:
        CalibrationError: no image, or an activation that is NaN or infinite.
        GraphError, ArtifactError, FileError: the graph cannot be used.
    """
    passport = read_passport(graph)
    empty = CalibrationTable(
        model=passport.model,
        weights=passport.weights.identity,
        source_graph=sha256_file(graph),
        preprocess=passport.preprocess,
        images=(),
        statistics={},
        shard=config.shard,
    )
    with progress.task("load the graph"):
        collector = ActivationCollector(graph, config.threads)
    records: set[CalibrationImageRecord] = set()
    crops: tuple[CalibrationCrop, ...] = ()
    if (earlier := _unfinished(config.partial, empty, wanted)) is not None:
        collector.resume(earlier)
        records.update(earlier.images)
        crops = earlier.crops

    def table() -> CalibrationTable:
        statistics = {name: pack(found) for name, found in collector.statistics().items()}
        images = tuple(sorted(records, key=lambda record: record.name))
        return replace(empty, images=images, statistics=statistics, crops=crops)

    saved = time.monotonic()
    with progress.task("calibrate", len(wanted)) as advance:
        advance(len(records))
        for image in images(frozenset(records)):
            collector.add(image)
            records.add(image.record)
            crops = _with_crop(crops, image)
            advance(1)
            if config.partial is not None and time.monotonic() - saved > config.every:
                save_table(table(), config.partial)
                saved = time.monotonic()
    if not records:
        raise CalibrationError("no image to calibrate with", hint="give a folder of images")
    return table()


def _with_crop(
    crops: tuple[CalibrationCrop, ...], image: CalibrationImage
) -> tuple[CalibrationCrop, ...]:
    if image.crop is None or (len(crops) >= MOST_CROPS and image.sha256 > crops[-1].sha256):
        return crops
    return choose_crops((*crops, CalibrationCrop.of(image.name, image.sha256, image.crop)))


def _unfinished(
    partial: Path | None, empty: CalibrationTable, wanted: Sequence[CalibrationImageRecord]
) -> CalibrationTable | None:
    """An earlier run's table if it is whole and of this graph and these images, else None."""
    if partial is None or not partial.exists():
        return None
    try:
        earlier = load_table(partial)
    except ClipdeployError:
        return None
    same = replace(earlier, images=(), statistics={}, seal="", crops=()) == empty
    return earlier if same and set(earlier.images) <= set(wanted) else None
