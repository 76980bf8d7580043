"""Run images through the FP32 graph and observe every Linear's input, one image at a time.

The reductions run inside the graph (ReduceMin and ReduceMax over the tokens, and a Gather of a few
tokens for the histogram), so that no activation is copied out whole.  One image at a time, because
a batch's arithmetic depends on its size: this way a table depends on the set of images alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from calibration.observers import ChannelObserver, ChannelStatistics
from calibration.policy import LinearSite, find_linears
from calibration.table import CalibrationImageRecord, CalibrationTable, pack
from exporters.artifact import BATCH_AXIS
from exporters.errors import CalibrationError, GraphError
from exporters.files import sha256_file
from exporters.graphs import load_graph, read_passport
from exporters.progress import SILENT, Progress
from exporters.session import OnnxSession

__all__ = ["ActivationCollector", "CalibrationImage", "collect"]

# Tokens of each image that feed the histograms, the class token among them.
SAMPLED_TOKENS = 9


@dataclass(frozen=True)
class CalibrationImage:
    """One image as the graph takes it, (1, ...), its name and the SHA-256 of its file."""

    name: str
    sha256: str
    input: NDArray[Any]


@dataclass(frozen=True)
class _Tap:
    """A tensor to observe, and the Linears that read it."""

    tensor: str
    tokens: int
    channels: int
    sites: tuple[str, ...]


def _taps(sites: list[LinearSite]) -> list[_Tap]:
    taps: dict[str, _Tap] = {}
    for site in sites:
        shape = site.activation.shape
        name = site.activation.name or ""
        tokens, channels = (shape[1], shape[2]) if shape is not None and len(shape) == 3 else (0, 0)
        if not isinstance(tokens, int) or not isinstance(channels, int) or not tokens:
            raise GraphError(
                f"the input of {site.name} has shape {shape}, not (batch, tokens, channels)",
                hint="quantise an FP32 graph that `clipdeploy export` wrote",
            )
        earlier = taps[name].sites if name in taps else ()
        taps[name] = _Tap(name, tokens, channels, (*earlier, site.name))
    return list(taps.values())


def _tapped(path: Path, taps: list[_Tap]) -> bytes:
    """The graph with three more outputs for each tap, and the token indices as a second input."""
    proto = onnx.ModelProto.FromString(path.read_bytes())
    graph = proto.graph
    # One image at a time, also through a graph that was exported for a fixed batch: its nodes hold
    # no batch size, only its declared shapes do.
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = BATCH_AXIS
    graph.output[0].type.tensor_type.shape.dim[0].dim_param = BATCH_AXIS
    del graph.value_info[:]
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "tap/axis"))
    graph.input.append(helper.make_tensor_value_info("tap/tokens", TensorProto.INT64, ["sampled"]))
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "tap/class_token"))
    for tap in taps:
        rows = "tap/tokens" if tap.tokens > 1 else "tap/class_token"
        for op, inputs in (
            ("ReduceMin", [tap.tensor, "tap/axis"]),
            ("ReduceMax", [tap.tensor, "tap/axis"]),
            ("Gather", [tap.tensor, rows]),
        ):
            name = f"tap/{tap.tensor}/{op}"
            attributes: dict[str, Any] = {"axis": 1} if op == "Gather" else {"keepdims": 0}
            graph.node.append(helper.make_node(op, inputs, [name], name=name, **attributes))
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return bytes(proto.SerializeToString())


def _sampled_tokens(sha256: str, tokens: int) -> NDArray[np.int64]:
    """Which tokens of an image feed the histograms: its bytes decide, not its place in a run."""
    generator = np.random.default_rng(int(sha256[:16], 16))
    count = min(SAMPLED_TOKENS - 1, tokens - 1)
    others = generator.choice(tokens - 1, size=count, replace=False) + 1
    return np.sort(np.concatenate([[0], others])).astype(np.int64)


class ActivationCollector:
    """The tapped graph and one observer for each tap."""

    def __init__(self, graph: Path) -> None:
        self._taps = _taps(find_linears(load_graph(graph)))
        self._tokens = max(tap.tokens for tap in self._taps)
        self._session = OnnxSession(_tapped(graph, self._taps), name=str(graph))
        self._observers = [ChannelObserver(tap.tensor, tap.channels) for tap in self._taps]

    def add(self, image: CalibrationImage) -> None:
        """Observe one image.

        Raises:
            CalibrationError: an activation is NaN or infinite.
        """
        tokens = _sampled_tokens(image.sha256, self._tokens)
        outputs = self._session.run(image.input, {"tap/tokens": tokens})[1:]
        for index, observer in enumerate(self._observers):
            minimum, maximum, rows = outputs[3 * index : 3 * index + 3]
            observer.collect(minimum[0], maximum[0], rows[0], image.name)

    def statistics(self) -> dict[str, ChannelStatistics]:
        """What was observed so far, by Linear name."""
        return {
            site: observer.compute()
            for tap, observer in zip(self._taps, self._observers, strict=True)
            for site in tap.sites
        }


def collect(
    graph: Path, images: Iterable[CalibrationImage], total: int, progress: Progress = SILENT
) -> CalibrationTable:
    """Observe ``images`` in the FP32 ``graph``.

    Raises:
        CalibrationError: no image, or an activation that is NaN or infinite.
        GraphError, ArtifactError, FileError: the graph cannot be used.
    """
    passport = read_passport(graph)
    with progress.task("load the graph"):
        collector = ActivationCollector(graph)
    records = []
    with progress.task("calibrate", total) as advance:
        for image in images:
            collector.add(image)
            records.append(CalibrationImageRecord(image.name, image.sha256))
            advance(1)
    if not records:
        raise CalibrationError(
            "no image to calibrate with", hint="pass a folder of images to --data"
        )
    return CalibrationTable(
        model=passport.model,
        weights=passport.weights.identity,
        source_graph=sha256_file(graph),
        preprocess=passport.preprocess,
        images=tuple(sorted(records, key=lambda record: record.name)),
        statistics={name: pack(found) for name, found in collector.statistics().items()},
    )
