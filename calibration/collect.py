"""Collects activation statistics by running images through the FP32 graph, one at a time.

A few tokens of each image are gathered inside the graph, so that no whole activation is copied out.
Images are not batched, because the rounding of a batch depends on its size: the table depends only
on the set of images.
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
from clipdeploy.core.progress import SILENT, Progress
from exporters.graphs import load_graph
from exporters.headers import graph_sha256, read_passport
from exporters.tapped import add_tap, free_batch, open_model

__all__ = [
    "ActivationCollector",
    "CalibrationImage",
    "CollectConfig",
    "Tap",
    "TappedGraph",
    "collect",
]

# Tokens sampled from each image for minimum and maximum, and how many of these are counted in
# histograms; both include the class token.  Reducing over all tokens inside the graph would add a
# quarter to the inference time, gathering some adds nothing measurable.
SAMPLED_TOKENS = 33
COUNTED_TOKENS = 5
_TOKENS = "tap/tokens"


@dataclass(frozen=True)
class CalibrationImage:
    """One image to calibrate with.

    ``sha256``: of its file.  ``input`` (1, ...): in the graph's input format.  ``pixels``,
    ``thumbnail`` and ``edge``: see :class:`CalibrationImageRecord`.  ``crop``: the image as uint8
    (S, S, 3) if the table may store it.
    """

    name: str
    sha256: str
    input: NDArray[Any]
    pixels: str = ""
    thumbnail: bytes = b""
    crop: NDArray[np.uint8] | None = None
    edge: int = 0

    @property
    def record(self) -> CalibrationImageRecord:
        """The image's entry in a table."""
        return CalibrationImageRecord(
            self.name, self.sha256, self.pixels, self.thumbnail, self.edge
        )


@dataclass(frozen=True)
class Tap:
    """A tensor to observe, (batch, tokens, channels), and its names in the table."""

    tensor: str
    tokens: int
    channels: int
    names: tuple[str, ...]


def _taps(model: ir.Model) -> list[Tap]:
    taps: dict[str, Tap] = {}
    for name, value in observed_tensors(model):
        shape = value.shape
        tensor = value.name or ""
        axes = tuple(axis for axis in (shape or ())[1:] if isinstance(axis, int))
        if shape is None or len(axes) != len(shape) - 1 or len(axes) not in (1, 2):
            raise GraphError(
                f"{name} has shape {shape}, not (batch, tokens, channels)",
                hint="use an FP32 graph that `clipdeploy export` wrote",
            )
        tokens, channels = axes if len(axes) == 2 else (1, axes[0])
        earlier = taps[tensor].names if tensor in taps else ()
        taps[tensor] = Tap(tensor, tokens, channels, (*earlier, name))
    return list(taps.values())


def _tapped(model: ir.Model, taps: list[Tap]) -> ir.Model:
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
    return model


def _sampled_tokens(sha256: str, tokens: int) -> NDArray[np.int64]:
    """Choose tokens by the image's hash, independent of its position in a run."""
    generator = np.random.default_rng(int(sha256[:16], 16))
    count = min(SAMPLED_TOKENS, tokens) - 1
    others = generator.choice(tokens - 1, size=count, replace=False) + 1
    return np.concatenate([[0], others]).astype(np.int64)


class TappedGraph:
    """An FP32 graph that also returns some tokens of each tensor that calibration observes.

    ``taps`` are these tensors; ``tokens`` is the largest number of tokens of one of them.
    """

    def __init__(self, graph: Path, threads: int = 0) -> None:
        """``threads``: number of ONNX Runtime threads, 0 for its default."""
        model = load_graph(graph)
        self.taps = _taps(model)
        self.tokens = max(tap.tokens for tap in self.taps)
        self._session = open_model(_tapped(model, self.taps), name=str(graph), threads=threads)

    def run(
        self, image: NDArray[Any], tokens: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """The logits (1, classes) of ``image`` (1, ...), and of each tap ``tokens``, (K, C)."""
        logits, *found = self._session.run(image, {_TOKENS: tokens})
        pairs = zip(self.taps, found, strict=True)
        return logits, [rows.reshape(-1, tap.channels) for tap, rows in pairs]


class ActivationCollector:
    """Runs the graph with taps and observes their tensors."""

    def __init__(self, graph: Path, threads: int = 0) -> None:
        """``threads``: number of ONNX Runtime threads, 0 for its default."""
        self._graph = TappedGraph(graph, threads)
        self._taps = self._graph.taps
        self._observers = [ChannelObserver(tap.tensor, tap.channels) for tap in self._taps]

    def resume(self, table: CalibrationTable) -> None:
        """Continue from the statistics of ``table``.

        Raises:
            CalibrationError: the table lacks a tensor, or its number of channels differs.
        """
        for tap, observer in zip(self._taps, self._observers, strict=True):
            observer.resume(table.of(tap.names[0]))

    def add(self, image: CalibrationImage) -> None:
        """Observe one image.

        Raises:
            CalibrationError: an activation is NaN or infinite.
        """
        tokens = _sampled_tokens(image.sha256, self._graph.tokens)
        _, tensors = self._graph.run(image.input, tokens)
        for observer, rows in zip(self._observers, tensors, strict=True):
            counted = rows[:COUNTED_TOKENS]
            observer.collect(rows.min(axis=0), rows.max(axis=0), counted, image.name)

    def statistics(self) -> dict[str, ChannelStatistics]:
        """The statistics so far, by the names of :func:`observed_tensors`."""
        return {
            name: observer.compute()
            for tap, observer in zip(self._taps, self._observers, strict=True)
            for name in tap.names
        }


@dataclass(frozen=True)
class CollectConfig:
    """How to collect.

    ``partial``: file that saves an unfinished run, None not to save it.  ``every``: seconds between
    saves.  ``shard``: (i, n) for the i-th of n runs over parts of the images.  ``threads``: number
    of ONNX Runtime threads, 0 for its default.
    """

    partial: Path | None = None
    every: float = 30.0
    shard: tuple[int, int] | None = None
    threads: int = 0


def collect(
    graph: Path,
    images: Callable[[frozenset[CalibrationImageRecord]], Iterable[CalibrationImage]],
    records: Sequence[CalibrationImageRecord],
    config: CollectConfig = CollectConfig(),
    progress: Progress = SILENT,
) -> CalibrationTable:
    """Collect the statistics of ``records`` in the FP32 ``graph``, resuming an unfinished run.

    ``images`` is called with the records that an earlier run finished, and returns the other
    images.

    Raises:
        CalibrationError: no images, or an activation is NaN or infinite.
        GraphError, ArtifactError, FileError: the graph cannot be read or run.
    """
    passport = read_passport(graph)
    empty = CalibrationTable(
        model=passport.model,
        weights=passport.weights.identity,
        source_graph=graph_sha256(graph),
        preprocess=passport.preprocess,
        images=(),
        statistics={},
        shard=config.shard,
    )
    with progress.task("load the graph"):
        collector = ActivationCollector(graph, config.threads)
    done: set[CalibrationImageRecord] = set()
    crops: tuple[CalibrationCrop, ...] = ()
    if (earlier := _unfinished(config.partial, empty, records)) is not None:
        collector.resume(earlier)
        done.update(earlier.images)
        crops = earlier.crops

    def table() -> CalibrationTable:
        statistics = {name: pack(found) for name, found in collector.statistics().items()}
        images = tuple(sorted(done, key=lambda record: record.name))
        return replace(empty, images=images, statistics=statistics, crops=crops)

    saved = time.monotonic()
    with progress.task("calibrate", len(records)) as advance:
        advance(len(done))
        for image in images(frozenset(done)):
            collector.add(image)
            done.add(image.record)
            crops = _with_crop(crops, image)
            advance(1)
            if config.partial is not None and time.monotonic() - saved > config.every:
                save_table(table(), config.partial)
                saved = time.monotonic()
    if not done:
        raise CalibrationError("no images to calibrate with", hint="give a folder of images")
    return table()


def _with_crop(
    crops: tuple[CalibrationCrop, ...], image: CalibrationImage
) -> tuple[CalibrationCrop, ...]:
    if image.crop is None or (len(crops) >= MOST_CROPS and image.sha256 > crops[-1].sha256):
        return crops
    return choose_crops((*crops, CalibrationCrop.of(image.name, image.sha256, image.crop)))


def _unfinished(
    partial: Path | None, empty: CalibrationTable, records: Sequence[CalibrationImageRecord]
) -> CalibrationTable | None:
    """The saved table of an unfinished run; None if it is damaged or of other inputs."""
    if partial is None or not partial.exists():
        return None
    try:
        earlier = load_table(partial)
    except ClipdeployError:
        return None
    same = replace(earlier, images=(), statistics={}, seal="", crops=()) == empty
    return earlier if same and set(earlier.images) <= set(records) else None
