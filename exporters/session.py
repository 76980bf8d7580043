"""Runs ONNX graphs with ONNX Runtime and reports its failures as clipdeploy errors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from clipdeploy.core.errors import EngineError, GraphError, first_line
from exporters.providers import CPU, FATAL_ONLY, open_session

__all__ = ["OnnxSession"]

# Images per run of a graph with a symbolic batch.
_BATCH = 8


def _omp_threads() -> int:
    """Return the first number of ``OMP_NUM_THREADS``, 0 if there is none.

    ONNX Runtime is built without OpenMP and does not read it.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


class OnnxSession:
    """An ONNX Runtime session of a graph with one image input.

    ``source`` is a file or a serialised model.  ``lean`` skips ONNX Runtime's prepacking of
    weights, which halves the memory and slows down each run.  ``optimise=False`` disables graph
    optimisation.  ``exact_int8`` is for graphs with uint8 activations: on processors without VNNI
    the fast kernels add pairs of uint8 x int8 products in int16, which saturates (13 dB on the
    demo model), and this option selects slower exact kernels.  With VNNI it has no effect.
    ``fp8`` is for graphs with FP8 tensors: ONNX Runtime (1.31) would move their Q/DQ pairs past
    operators that take no FP8, and then refuse the graph.  ``in_order`` runs the nodes in the
    graph's order.  By default ONNX Runtime computes one output after the other, and keeps every
    tensor that a later output needs.  ``threads``: CPU threads of an operator; 0 takes
    ``OMP_NUM_THREADS``, as PyTorch does, or without it one for each core.

    Raises:
        GraphError: ONNX Runtime cannot load the graph.
        EngineError: ``provider`` is CUDA, whose libraries do not load.
    """

    def __init__(
        self,
        source: Path | bytes,
        *,
        name: str = "graph",
        provider: str = CPU,
        threads: int = 0,
        lean: bool = False,
        optimise: bool = True,
        exact_int8: bool = False,
        fp8: bool = False,
        in_order: bool = False,
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = FATAL_ONLY
        options.intra_op_num_threads = threads or _omp_threads()
        # Threads that spin after a run take CPU time from the next program.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if exact_int8:
            options.add_session_config_entry("session.x64quantprecision", "1")
        if fp8:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if in_order:
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        if lean:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        model = str(source) if isinstance(source, Path) else source
        self.name = str(source) if isinstance(source, Path) else name
        try:
            self._session = open_session(model, options, provider)
        except EngineError as error:
            raise EngineError(
                f"ONNX Runtime cannot use CUDA: {error.message}",
                hint="install the CUDA and cuDNN versions that this onnxruntime-gpu was built for",
            ) from error
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise GraphError(
                f"ONNX Runtime cannot load {self.name}: {first_line(error)}",
                hint="the file is truncated or not an ONNX graph: export it again",
            ) from error
        image = self._session.get_inputs()[0]
        self.input_name: str = image.name
        first = image.shape[0] if image.shape else None
        self.batch: int | None = first if isinstance(first, int) else None
        self.output_names: list[str] = [output.name for output in self._session.get_outputs()]

    def run_all(self, images: NDArray[Any]) -> Iterator[list[NDArray[np.float32]]]:
        """Run any number of images (N, ...) in batches.

        Yields:
            The outputs (B, ...) of the next B images.

        Raises:
            GraphError: see :meth:`run`.
        """
        count = self.batch or _BATCH
        for start in range(0, len(images), count):
            part = images[start : start + count]
            if self.batch is None or len(part) == count:
                yield self.run(part)
                continue
            outputs = self.run(part[np.arange(count) % len(part)])
            yield [value[: len(part)] if value.ndim else value for value in outputs]

    def run(
        self,
        images: NDArray[Any],
        extra: Mapping[str, NDArray[Any]] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Run one batch; return the outputs (B, ...) named in ``outputs``, by default all.

        ``extra`` holds further inputs by name.

        Raises:
            GraphError: ONNX Runtime rejected the input or failed.
        """
        try:
            return list(self._session.run(outputs, {self.input_name: images, **(extra or {})}))
        except Exception as error:  # as above
            raise GraphError(f"ONNX Runtime cannot run {self.name}: {first_line(error)}") from error
