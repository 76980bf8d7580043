"""What INT8 costs the logits, and when that is too much.

    SQNR = 10 log10(sum l^2 / sum (l' - l)^2)  dB

over the logits l of the FP32 and l' of the INT8 graph, on images that were calibrated with.  Ranges
of blank or dim images fit those images only: the same figure on clipdeploy's own sample images, and
the grey levels of the calibration images, show that.

At 0 dB the error is as large as the logits and the answer is chance.  On the demo model with the
outliers of real ViTs plain min-max costs 7.2 points of top-1 at 5.4 dB and 3.6 points at 7.1 dB,
and nothing at 36 dB (``scripts/bench/outliers.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.images import flatness, is_flat
from calibration.table import CalibrationTable
from clipdeploy.core.errors import CalibrationError
from clipdeploy.core.files import file_errors
from clipdeploy.core.leftovers import scratch_folder
from clipdeploy.core.passport import TensorSpec
from exporters.graphs import write_model
from exporters.metrics import sqnr_db
from exporters.overflow import largest_values, stored_logits
from exporters.samples import Samples
from exporters.session import OnnxSession

__all__ = ["MIN_SQNR_DB", "Judge", "Quality", "Weakest", "check_quality"]

# Noise of a tenth of the signal; see above.
MIN_SQNR_DB = 10.0
# Up to this much above the minimum a graph is made with a warning.
_MARGIN_DB = 10.0


@dataclass(frozen=True)
class Weakest:
    """The Linear with the lowest expected SQNR of its output, and what its noise is from."""

    name: str
    sqnr_db: float
    cause: str

    def __str__(self) -> str:
        return f"the weakest Linear is {self.name} with {self.sqnr_db:.1f} dB: {self.cause}"


@dataclass(frozen=True)
class Quality:
    """``sqnr_db`` of the logits on ``images`` calibration images, None where there is no error.

    ``images`` is 0 where the table holds none of them: then both figures are those of the sample
    images.  ``warnings`` are sentences for the user.
    """

    sqnr_db: float | None
    sample_sqnr_db: float | None
    images: int
    weakest: Weakest | None = None
    warnings: tuple[str, ...] = ()


class Judge:
    """The FP32 logits of calibration images and of samples, to hold INT8 logits against.

    ``kept`` are those that the calibration holds.  ``half``: whether the INT8 graph stores halves;
    then ``peaks`` has max |x| of each tensor of the FP32 graph.
    """

    def __init__(
        self,
        source: Path,
        tensor: TensorSpec,
        kept: Samples | None,
        samples: Samples,
        *,
        half: bool,
    ) -> None:
        self._images = 0 if kept is None else len(kept.crops)
        judged = samples if kept is None else kept.concat(samples)
        self._inputs = judged.as_input(tensor)
        self.half = half
        self.peaks: dict[str, float] = {}
        if half:
            self._reference, self.peaks = largest_values(source, self._inputs)
        else:
            self._reference = self._logits(source)

    def _logits(self, graph: Path) -> NDArray[np.float32]:
        session = OnnxSession(graph, exact_int8=True)
        return np.concatenate([found for (found,) in session.run_all(self._inputs)])

    def measure(self, model: ir.Model) -> Quality:
        """The quality of an INT8 graph.

        Raises:
            GraphError: a tensor overflows.
        """
        with scratch_folder() as folder:
            path = folder / "int8.onnx"
            with file_errors("write", path):
                write_model(model, path)
            found = stored_logits(path, self._inputs) if self.half else self._logits(path)
        ours, other = slice(0, self._images), slice(self._images, None)
        of_samples = sqnr_db(self._reference[other], found[other])
        if not self._images:
            return Quality(of_samples, of_samples, 0)
        return Quality(sqnr_db(self._reference[ours], found[ours]), of_samples, self._images)


def check_quality(quality: Quality, table: CalibrationTable, minimum: float) -> tuple[str, ...]:
    """What the user should know of a graph that is good enough.

    Raises:
        CalibrationError: it is not: its SQNR is below ``minimum`` dB on the calibration images, or
            on the sample images where the calibration images are flat or unknown.
    """
    weakest = "" if quality.weakest is None else f"; {quality.weakest}"
    hint = "leave that Linear out with --exclude, or accept it with a lower --min-sqnr"
    if _below(quality.sqnr_db, minimum):
        raise CalibrationError(
            f"the INT8 logits have an SQNR of {quality.sqnr_db:.1f} dB on the "
            f"{'calibration' if quality.images else 'sample'} images, "
            f"below {minimum:g} dB{weakest}",
            hint=hint,
        )
    warnings = []
    if _below(quality.sample_sqnr_db, minimum):
        found = f"{quality.sample_sqnr_db:.1f} dB on clipdeploy's sample images"
        if is_flat(table):
            raise CalibrationError(
                f"the INT8 logits have an SQNR of {found}, below {minimum:g} dB: the calibration "
                f"images are dim or flat, their grey levels spread by {flatness(table):.0f} of 255",
                hint="calibrate with images as they will be served, or give a lower --min-sqnr",
            )
        warnings.append(
            f"the INT8 logits have only {found}: the ranges fit the calibration images alone; "
            "calibrate with more kinds of images if others will be served"
        )
    if _below(quality.sqnr_db, minimum + _MARGIN_DB):
        warnings.append(
            f"the INT8 logits have an SQNR of {quality.sqnr_db:.1f} dB, little above the minimum "
            f"of {minimum:g} dB{weakest}"
        )
    return tuple(warnings)


def _below(db: float | None, minimum: float) -> bool:
    return db is not None and db < minimum
