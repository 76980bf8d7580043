"""Measures how much of the inputs of 8-bit Linears is clipped on images of a verification.

A scale that is too small, and images that are brighter or otherwise unlike the calibration images,
clip values at the ends of the range. On the images that the calibration stores, only the first one
does. An engine is judged by the graph that it was compiled from. Nothing here changes a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.table import load_table
from clipdeploy.core.errors import ClipdeployError, DatasetError, GraphError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import QUANTISED, Preprocess, TensorSpec
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.engines.passport import read_engine_passport
from clipdeploy.imaging import ImageFolder, Skipped, iter_crops, select
from clipdeploy.verification.result import ClippedLinear, Clipping, Row, Verification
from clipdeploy.verification.results import ArtifactEntry, RunKey
from exporters.headers import read_passport
from exporters.samples import Samples
from exporters.saturation import Saturation, saturation
from exporters.signature import classifier_signature

__all__ = ["with_clipping"]

# The shares of 16 and of 200 digits agree within a factor of two, and 16 cost a tenth of the time.
_IMAGES = 16
# Lost signal from which clipping is named as a cause, 25 dB. On digits a sound graph of the demo
# loses 2e-5; one calibrated at half of the contrast 8e-3, which costs 17 dB of the logits' SQNR.
_LIMIT = 3e-3
_SHOWN = 3


def with_clipping(
    result: Verification,
    run_key: RunKey,
    images: ImageFolder | None,
    calibration: Path,
    progress: Progress = SILENT,
) -> Verification:
    """Return ``result`` with the clipping of every 8-bit artifact.

    Args:
        images: the images that were verified; None if they are not available any more.
        calibration: the table of the model; it is only read by artifacts that were made with it.

    An artifact that cannot be measured, such as one whose graph is missing, has the reason instead.
    """
    if not any(entry.precision in QUANTISED for entry in run_key.artifacts):
        return result
    measured = _Measured(run_key, images, calibration)
    rows = []
    with progress.task("measure clipped inputs", len(result.rows)) as advance:
        for row, entry in zip(result.rows, run_key.artifacts, strict=True):
            rows.append(measured.row(row, entry))
            advance(1)
    return replace(result, rows=tuple(rows))


def _graph_of(entry: ArtifactEntry) -> Path:
    """Return the graph of an 8-bit artifact: itself, or what an engine was compiled from.

    Raises:
        GraphError: that graph is not there.
        ClipdeployError: the engine's passport cannot be read.
    """
    path = Path(entry.artifact)
    graph = path if entry.kind == "graph" else path.with_suffix(".onnx")
    if not graph.exists():
        raise GraphError(f"{graph} is missing")
    if entry.kind == "engine" and sha256_file(graph) != read_engine_passport(path).hashes.graph:
        raise GraphError(f"{graph} is not the graph that the engine was compiled from")
    return graph


class _Measured:
    """Measures each graph once, on the same images."""

    def __init__(self, run_key: RunKey, images: ImageFolder | None, calibration: Path) -> None:
        self._run_key = run_key
        self._calibration = calibration
        self._images = images
        self._samples: Samples | None = None
        self._known: dict[Path, tuple[Clipping, tuple[str, ...]]] = {}

    def row(self, row: Row, entry: ArtifactEntry) -> Row:
        """Return the row with the clipping of its graph, and what its calibration found."""
        if entry.precision not in QUANTISED:
            return replace(row, clipping=None, clipping_unknown="")
        try:
            graph = _graph_of(entry)
            if graph not in self._known:
                self._known[graph] = self._clipping(entry, graph), _findings(entry, graph)
        except ClipdeployError as error:
            return replace(row, clipping=None, clipping_unknown=str(error), calibration_findings=())
        clipping, findings = self._known[graph]
        return replace(row, clipping=clipping, clipping_unknown="", calibration_findings=findings)

    def _crops(self) -> Samples:
        if self._samples is None:
            if not self._run_key.ran:
                raise DatasetError("nothing was run")
            if self._images is None:
                raise DatasetError("the images are not there")
            spec = self._run_key.preprocess
            chosen = select(self._images, min(_IMAGES, len(self._images.entries)), seed=0)
            crops = [crop.pixels for crop in iter_crops(chosen, spec, skipped=Skipped(), workers=0)]
            if not crops:
                raise DatasetError("none of the images can be read")
            self._samples = Samples(np.stack(crops), spec)
        return self._samples

    def _clipping(self, entry: ArtifactEntry, graph: Path) -> Clipping:
        samples = self._crops()
        tensor = _input_of(entry, graph, self._run_key.preprocess, self._run_key.classes)
        found = saturation(graph, samples.as_input(tensor))
        if not found:
            raise GraphError(f"no Linear of {graph} has an 8-bit input")
        own: list[Saturation] = []
        kept = None
        if max(each.lost for each in found) >= _LIMIT:
            kept = self._calibration_images(entry)
            own = [] if kept is None else saturation(graph, kept.as_input(tensor))
        there = {each.name: each for each in own}
        linears = sorted(
            (_linear(each, there.get(each.name)) for each in found),
            key=lambda linear: (-linear.clipped, -linear.lost, linear.name),
        )
        cause = _cause(linears, there, samples.crops, None if kept is None else kept.crops)
        return Clipping(len(samples.crops), tuple(linears), cause)

    def _calibration_images(self, entry: ArtifactEntry) -> Samples | None:
        """The images stored in the calibration that ``entry`` was made with; None if unknown."""
        path = self._calibration
        if not (entry.calibration and path.exists() and sha256_file(path) == entry.calibration):
            return None
        return load_table(path).samples()


def _input_of(
    entry: ArtifactEntry, graph: Path, preprocess: Preprocess, classes: int
) -> TensorSpec:
    if entry.vouched:
        return read_passport(graph).input
    return classifier_signature(graph, preprocess.size, classes)[0]


def _findings(entry: ArtifactEntry, graph: Path) -> tuple[str, ...]:
    return read_passport(graph).calibration_findings if entry.vouched else ()


def _linear(found: Saturation, own: Saturation | None) -> ClippedLinear:
    there = None if own is None else 100 * own.share
    return ClippedLinear(found.name, 100 * found.share, found.lost, there)


def _cause(
    linears: Sequence[ClippedLinear],
    own: dict[str, Saturation],
    crops: NDArray[np.uint8],
    kept: NDArray[np.uint8] | None,
) -> str:
    """Return what clips, and why; empty if nothing that matters."""
    bad = sorted((each for each in linears if each.lost >= _LIMIT), key=lambda each: -each.lost)
    if not bad:
        return ""
    small = [each for each in bad if each.name in own and own[each.name].lost >= _LIMIT]
    if small:
        return (
            f"{_clipped(small)}, and {small[0].calibration:.2g} % on the calibration images: the "
            "scale is too small, whatever the images: quantize again"
        )
    if kept is None:
        return (
            f"{_clipped(bad)}: the scale is too small, or the images are unlike those of the "
            "calibration"
        )
    levels = f"{crops.mean():.0f} and {kept.mean():.0f}, contrast {crops.std():.0f} and "
    return (
        f"{_clipped(bad)}, but {bad[0].calibration:.2g} % on the calibration images: these images "
        f"are unlike those (mean grey level {levels}{kept.std():.0f}): calibrate with images "
        "like these"
    )


def _clipped(bad: Sequence[ClippedLinear]) -> str:
    others = [each.name for each in bad[1:_SHOWN]]
    if len(bad) > _SHOWN:
        others.append(f"{len(bad) - _SHOWN} more")
    likewise = f" ({', '.join(others)} likewise)" if others else ""
    return f"{bad[0].clipped:.2g} % of the 8-bit input of {bad[0].name} is clipped{likewise}"
