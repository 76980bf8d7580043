"""Builds engines with chosen products in 8 bits, and times them on the GPU of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from calibration.formats import FormatName
from calibration.scheme import SchemeConfig
from clipdeploy.benchmark import BenchmarkConfig, benchmark_artifacts
from clipdeploy.core.errors import EngineError
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.builder import build_engine
from clipdeploy.engines.roofline import Formats, linear_outputs
from clipdeploy.stages.quantize import with_scale_form, write_quantised
from clipdeploy.stages.search_products import product_config

__all__ = ["EngineTimer"]


@dataclass(frozen=True)
class EngineTimer:
    """Makes graph and engine of an FP32 graph with given formats, and times the engine.

    ``order`` are all products.  ``build`` has one batch profile of one size, for which engines are
    built and timed.  ``folder`` is for temporary files: one engine and that of FP16 at a time.
    """

    source: Path
    calibration: Path
    order: tuple[str, ...]
    scheme: SchemeConfig
    build: BuildConfig
    folder: Path

    def engine(self, formats: Formats, folder: Path) -> Path:
        """Build the engine with the products ``formats`` in 8 bits, the others in FP16.

        Raises:
            ClipdeployError: the graph or the engine cannot be made.
            ValueError: only some of the sums of qkv and fc1 are in 8 bits, or the formats differ.
        """
        quantised = [name for name in self.order if name in formats]
        outputs = linear_outputs(quantised) if len(formats) > len(quantised) else ()
        if formats.keys() != {*quantised, *outputs} or len(set(formats.values())) > 1:
            raise ValueError(f"no graph has exactly these formats: {formats}")
        form: FormatName = "fp8" if "fp8" in formats.values() else "int8"
        config = product_config(self.order, quantised, form, self.scheme, outputs=bool(outputs))
        graph = folder / "timed.onnx"
        scaled = with_scale_form(config, self.build.backend)
        write_quantised(self.source, self.calibration, graph, scaled)
        return build_engine(graph, graph.with_suffix(".engine"), self.build).path

    def __call__(self, formats: Formats) -> tuple[float, float]:
        """Microseconds of FP16 and of the engine with ``formats``, in the same rounds.

        Raises:
            EngineError: an engine does not run here.
            ClipdeployError: a graph or an engine cannot be made.
        """
        half = self._half()
        if not formats:
            (alone,) = self._times(half)
            return alone, alone
        with TemporaryDirectory(dir=self.folder) as place:
            before, own = self._times(half, self.engine(formats, Path(place)))
        return before, own

    def _half(self) -> Path:
        """The engine with everything in FP16, which is built once."""
        folder = self.folder / "fp16"
        engine = folder / "timed.engine"
        if not engine.exists():
            folder.mkdir(exist_ok=True)
            self.engine({}, folder)
        return engine

    def _times(self, *engines: Path) -> list[float]:
        """The median GPU time of each engine in microseconds."""
        ((batch, _, _),) = self.build.profiles
        found = benchmark_artifacts(engines, BenchmarkConfig(batches=(batch,)))
        for each in found.not_run:
            raise EngineError("an engine cannot be timed here", hint=each.reason)
        times = [row.device.p50.value for row in found.rows if row.device is not None]
        if len(times) < len(engines):
            raise EngineError("the GPU reports no times of engines", hint="choose --cost roofline")
        return [1e3 * milliseconds for milliseconds in times]
