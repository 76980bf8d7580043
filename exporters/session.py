"""ONNX Runtime sessions, with its failures told as graph errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from exporters.errors import GraphError

__all__ = ["OnnxSession"]

_FATAL_ONLY = 4


class OnnxSession:
    """A graph with one image input, opened once and run many times.

    ``source`` is a file or a serialised model.  ``lean`` skips ONNX Runtime's re-packing of
    weights: half the memory, slower runs; for a graph that is run only a few times.  Without
    ``optimise`` every node is computed as it stands.
    """

    def __init__(
        self,
        source: Path | bytes,
        *,
        name: str = "graph",
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int = 0,
        lean: bool = False,
        optimise: bool = True,
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        options.intra_op_num_threads = threads
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if lean:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        model = str(source) if isinstance(source, Path) else source
        self.name = str(source) if isinstance(source, Path) else name
        try:
            self._session = ort.InferenceSession(model, options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's exception types share no public base class
            raise GraphError(
                f"ONNX Runtime cannot load {self.name}: {_first_line(error)}",
                hint="the file is cut short or no ONNX graph: export it again",
            ) from error
        self.input_name: str = self._session.get_inputs()[0].name
        self.output_names: list[str] = [output.name for output in self._session.get_outputs()]

    def run(
        self, images: NDArray[Any], extra: Mapping[str, NDArray[Any]] | None = None
    ) -> list[NDArray[np.float32]]:
        """All outputs for one batch of input, (B, ...) each; ``extra`` feeds further inputs.

        Raises:
            GraphError: ONNX Runtime refused the input or failed inside.
        """
        try:
            return list(self._session.run(None, {self.input_name: images, **(extra or {})}))
        except Exception as error:  # as above
            raise GraphError(
                f"ONNX Runtime cannot run {self.name}: {_first_line(error)}"
            ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
