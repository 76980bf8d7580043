"""What float16 storage does to a graph, judged on real images without a GPU.

ONNX Runtime's CPU provider computes float16 nodes in float32 and so hides overflow: a graph that is
ruined on a GPU scores perfectly there.  Two instruments see through it:

* :func:`largest_values` runs the float32 graph and gives max |x| of every floating-point tensor;
  those near float16's largest, 65504, must stay float32.
* :func:`check_storage` rewrites a float16 graph so that every node computes in float32 and every
  result really passes through float16 storage, x -> Cast(float16) -> Cast(float32), and refuses a
  graph in which a tensor overflows there.  That is what TensorRT's kernels do at worst: they
  accumulate in float32 and store halves.  :func:`stored_session` runs the same rewritten graph on
  as many images as one likes.

All of them look into local functions.  :func:`stored_session` also rewrites the graphs inside If,
Loop, Scan and SequenceMap, see :mod:`exporters.storage`; the other two, whose graphs come from
clipdeploy and have none, refuse them.
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
    "sqnr_db",
    "stored_logits",
    "stored_session",
]

# Images that were not looked at may go further than those that were: leave a factor of two.
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
    # Through a file, so that the graph is not in memory beside ONNX Runtime's copy of it.
    with scratch_folder() as folder:
        path = folder / "instrumented.onnx"
        with file_errors("write", path):
            write_model(instrument(), path)
        # Not optimised: ONNX Runtime removes pairs of casts, and the rounding with them.
        return OnnxSession(path, lean=lean, optimise=False, threads=threads)


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
            # maximum, unlike max, keeps a NaN.
            largest[name] = float(np.maximum(largest.get(name, -math.inf), peak))
    return np.concatenate(logits), largest


def largest_values(
    source: Path, images: NDArray[np.generic]
) -> tuple[NDArray[np.float32], dict[str, float]]:
    """Logits (B, classes) of a float32 graph, and max |x| of each of its tensors by name.

    Raises:
        GraphError, FileError: the graph cannot be read or run, or has others inside.
    """

    def tapped() -> ir.Model:
        model = load_graph(source, flat)
        refuse_nested(model, "the search for overflow")
        _tap(model, [v for node in list(model.graph) for v in node.outputs if v.dtype == _WIDE])
        return model

    return _run(tapped, images)


def near_limit(peaks: dict[str, float]) -> tuple[str, ...]:
    """Names of tensors that come within a factor of two of float16's largest, in graph order."""
    return tuple(name for name, peak in peaks.items() if not peak < NEAR_LIMIT)


def stored_session(path: Path, *, threads: int = 0) -> OnnxSession:
    """A float16 graph with every tensor stored as float16; its floating-point input is float32.

    Raises:
        GraphError, FileError: the graph cannot be read or loaded, or a tensor of it cannot be
            stored as float16: its type is unknown, or its operator cannot be rewritten.
    """

    def stored() -> ir.Model:
        model = load_graph(path, flat)
        store_float16(model)
        return model

    return _open(stored, lean=False, threads=threads)


def check_storage(
    path: Path, images: NDArray[np.generic], reference: NDArray[np.float32]
) -> float | None:
    """Run a float16 graph with every tensor stored as float16; its logits' SQNR in dB.

    ``reference`` (B, classes) are the float32 graph's logits of ``images``; ``None`` is returned
    where the two are equal.

    Raises:
        GraphError: see :func:`stored_logits`.
    """
    return sqnr_db(reference, stored_logits(path, images))


def stored_logits(path: Path, images: NDArray[np.generic]) -> NDArray[np.float32]:
    """Logits (B, classes) of a float16 graph with every tensor stored as float16.

    ``images`` (B, ...) are as the graph takes them.

    Raises:
        GraphError: a tensor overflows; its name and the largest tensor before it are named.  Or
            the graph has others inside.
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
                f"(float16 ends at {FP16_MAX:.0f})",
                hint="keep it in float32, or build --fp32",
            )
    if not np.isfinite(logits).all():
        raise GraphError("stored as float16, the logits are NaN", hint="build --fp32")
    return logits


def sqnr_db(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float | None:
    """Signal over noise in dB of ``found`` against ``reference`` of any shape; None if equal."""
    noise = float(((found - reference).astype(np.float64) ** 2).sum())
    signal = float((reference.astype(np.float64) ** 2).sum())
    if noise == 0:
        return None
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
