"""Finds float16 overflow by running a graph on real images, without a GPU.

ONNX Runtime's CPU provider computes float16 nodes in float32, which hides overflow: a graph that
overflows on a GPU gives correct logits there.  Two functions detect it:

* :func:`largest_values` runs the float32 graph and returns max |x| of every floating-point tensor;
  those near float16's maximum, 65504, must stay float32.
* :func:`check_storage` rewrites a float16 graph so that every node computes in float32 and rounds
  its result to float16, x -> Cast(float16) -> Cast(float32), and raises an error if a tensor
  overflows.  TensorRT's kernels are at least as precise: they accumulate in float32 and store
  float16.  :func:`stored_session` runs the same rewritten graph on any number of images.

Local functions are inlined.  :func:`stored_session` also rewrites the graphs inside If, Loop, Scan
and SequenceMap, see :mod:`exporters.storage`.  The other two raise an error for those; graphs
exported by clipdeploy have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from clipdeploy.core.errors import GraphError
from clipdeploy.core.files import file_errors
from clipdeploy.core.leftovers import scratch_folder
from exporters.graphs import load_graph, write_model
from exporters.metrics import sqnr_db
from exporters.passes.fp16 import FP16_MAX
from exporters.session import OnnxSession
from exporters.storage import refuse_nested, store_float16
from exporters.tapped import add_tap
from exporters.typed_graphs import flat

__all__ = [
    "NEAR_LIMIT",
    "check_storage",
    "largest_values",
    "near_limit",
    "stored_logits",
    "stored_session",
]

# Other images may reach larger values than the samples: leave a factor of two.
NEAR_LIMIT = FP16_MAX / 2

_WIDE = ir.DataType.FLOAT
_TAP = "largest/"


def _tap(model: ir.Model, values: Iterable[ir.Value]) -> None:
    """Add max |x| of each value as a graph output named ``largest/NAME``."""
    for value in values:
        size = ir.node("Abs", [value])
        peak = ir.node("ReduceMax", [size.outputs[0]], {"keepdims": 0})
        add_tap(model, f"{_TAP}{value.name}", [size, peak])


def _open(
    instrument: Callable[[], ir.Model], *, lean: bool = True, threads: int = 0
) -> OnnxSession:
    # Written to a file, so that the graph is not in memory twice.
    with scratch_folder() as folder:
        path = folder / "instrumented.onnx"
        with file_errors("write", path):
            write_model(instrument(), path)
        # Without optimisation, which would remove pairs of casts and so the rounding.
        return OnnxSession(path, lean=lean, optimise=False, threads=threads, in_order=True)


def _run(
    instrument: Callable[[], ir.Model], images: NDArray[np.generic]
) -> tuple[NDArray[np.float32], dict[str, float]]:
    session = _open(instrument)
    logits: list[NDArray[np.float32]] = []
    largest: dict[str, float] = {}
    names = [output.removeprefix(_TAP) for output in session.output_names[1:]]
    for found, *peaks in session.run_all(images):
        logits.append(found)
        for name, peak in zip(names, peaks, strict=True):
            # Unlike max, np.maximum propagates NaN.
            largest[name] = float(np.maximum(largest.get(name, -math.inf), peak))
    return np.concatenate(logits), largest


def largest_values(
    source: Path, images: NDArray[np.generic]
) -> tuple[NDArray[np.float32], dict[str, float]]:
    """Return the logits (B, classes) of a float32 graph, and max |x| of each tensor by name.

    Raises:
        GraphError, FileError: the graph cannot be read or run, or contains other graphs.
    """

    def tapped() -> ir.Model:
        model = load_graph(source, flat)
        refuse_nested(model, "the search for overflow")
        _tap(model, [v for node in list(model.graph) for v in node.outputs if v.dtype == _WIDE])
        return model

    return _run(tapped, images)


def near_limit(peaks: dict[str, float]) -> tuple[str, ...]:
    """Return the names of tensors that exceed half of float16's maximum, in graph order."""
    return tuple(name for name, peak in peaks.items() if not peak < NEAR_LIMIT)


def stored_session(path: Path, *, threads: int = 0) -> OnnxSession:
    """Open a float16 graph in which every tensor is rounded to float16; float inputs are float32.

    Raises:
        GraphError, FileError: the graph cannot be read or loaded, the type of a tensor is unknown,
            or an operator cannot be rewritten.
    """

    def stored() -> ir.Model:
        model = load_graph(path, flat)
        store_float16(model)
        return model

    return _open(stored, lean=False, threads=threads)


def check_storage(
    path: Path, images: NDArray[np.generic], reference: NDArray[np.float32]
) -> float | None:
    """Return the SQNR in dB of a float16 graph's logits, every tensor rounded to float16.

    ``reference`` (B, classes) are the float32 graph's logits of ``images``.  Returns None if the
    logits are equal, see :func:`exporters.metrics.sqnr_db`.

    Raises:
        GraphError: see :func:`stored_logits`.
    """
    return sqnr_db(reference, stored_logits(path, images))


def stored_logits(path: Path, images: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return the logits (B, classes) of a float16 graph, every tensor rounded to float16.

    ``images`` (B, ...) match the graph's input.

    Raises:
        GraphError: a tensor overflows, or the graph contains other graphs.
    """

    def tapped() -> ir.Model:
        model = load_graph(path, flat)
        refuse_nested(model, "the search for overflow")
        _tap(model, store_float16(model))
        return model

    wide = images.astype(np.float32) if images.dtype == np.float16 else images
    logits, peaks = _run(tapped, wide)
    for name, peak in peaks.items():
        if not math.isfinite(peak):
            raise GraphError(
                f"stored as float16, {name.removesuffix('/stored')} overflows "
                f"(float16's maximum is {FP16_MAX:.0f})",
                hint="keep this tensor in float32, or build with --fp32",
            )
    if not np.isfinite(logits).all():
        raise GraphError("stored as float16, the logits are NaN", hint="build with --fp32")
    return logits
