"""Measures the error that quantisation adds to the logits, and refuses graphs with too much of it.

    SQNR = 10 log10(sum l^2 / sum (l' - l)^2)  dB

with the logits l of the FP32 and l' of the quantised graph, on calibration images.  Ranges found on
blank or dim images fit only those: the SQNR on clipdeploy's sample images and the grey levels of
the calibration images detect that.

At 0 dB the error is as large as the logits and answers are random.  On the demo model with the
outliers of real ViTs, plain min-max costs 6.2 points of top-1 at 5.5 dB and 3.0 points at 7.2 dB;
36 dB cost none (``scripts/bench/outliers.py``).
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

# The noise power is a tenth of the signal power.
MIN_SQNR_DB = 10.0
# A graph less than this above the minimum is written with a warning.
_MARGIN_DB = 10.0


@dataclass(frozen=True)
class Weakest:
    """The Linear with the lowest expected SQNR of its output, and the main cause of its noise."""

    name: str
    sqnr_db: float
    cause: str

    def __str__(self) -> str:
        return f"the weakest Linear is {self.name} with {self.sqnr_db:.1f} dB: {self.cause}"


@dataclass(frozen=True)
class Quality:
    """The SQNR of a quantised graph's logits in dB, None without error.

    ``sqnr_db``: on ``images`` calibration images, or on the sample images if the table stores no
    images (``images`` is 0).  ``sample_sqnr_db``: on the sample images.  ``warnings``: sentences
    for the user.
    """

    sqnr_db: float | None
    sample_sqnr_db: float | None
    images: int
    weakest: Weakest | None = None
    warnings: tuple[str, ...] = ()


class Judge:
    """Compares quantised graphs with the FP32 logits of calibration images and sample images.

    ``kept``: the images stored in the calibration.  ``half``: whether the quantised graph stores
    float16; then ``peaks`` is max |x| of each tensor of the FP32 graph.
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

    def peaks_of(self, model: ir.Model) -> dict[str, float]:
        """Max |x| of each float32 tensor of ``model``, by name."""
        with scratch_folder() as folder:
            path = folder / "quantised.onnx"
            with file_errors("write", path):
                write_model(model, path)
            return largest_values(path, self._inputs)[1]

    def measure(self, model: ir.Model) -> Quality:
        """Run a quantised graph and compare its logits.

        Raises:
            GraphError: a tensor overflows.
        """
        with scratch_folder() as folder:
            path = folder / "quantised.onnx"
            with file_errors("write", path):
                write_model(model, path)
            found = stored_logits(path, self._inputs) if self.half else self._logits(path)
        ours, other = slice(0, self._images), slice(self._images, None)
        of_samples = sqnr_db(self._reference[other], found[other])
        if not self._images:
            return Quality(of_samples, of_samples, 0)
        return Quality(sqnr_db(self._reference[ours], found[ours]), of_samples, self._images)


def check_quality(
    quality: Quality, table: CalibrationTable, minimum: float, label: str = "INT8"
) -> tuple[str, ...]:
    """Check a quantised graph's quality, and return warnings for the user.

    ``label`` names its number format.

    Raises:
        CalibrationError: the SQNR is below ``minimum`` dB on the calibration images, or on the
            sample images if the calibration images are flat or not stored.
    """
    weakest = "" if quality.weakest is None else f"; {quality.weakest}"
    hint = "exclude that Linear with --exclude, or accept the graph with a lower --min-sqnr"
    if _below(quality.sqnr_db, minimum):
        raise CalibrationError(
            f"the {label} logits have an SQNR of {quality.sqnr_db:.1f} dB on the "
            f"{'calibration' if quality.images else 'sample'} images, "
            f"below {minimum:g} dB{weakest}",
            hint=hint,
        )
    warnings = []
    if _below(quality.sample_sqnr_db, minimum):
        found = f"{quality.sample_sqnr_db:.1f} dB on clipdeploy's sample images"
        if is_flat(table):
            spread = f"{flatness(table):.0f}"
            raise CalibrationError(
                f"the {label} logits have an SQNR of {found}, below {minimum:g} dB: the "
                f"calibration images are dim or flat, their grey levels spread by {spread} of 255",
                hint="calibrate with images like those in production, or give a lower --min-sqnr",
            )
        warnings.append(
            f"the {label} logits have only {found}: the ranges fit only the calibration images; "
            "calibrate with more kinds of images if production has others"
        )
    if _below(quality.sqnr_db, minimum + _MARGIN_DB):
        warnings.append(
            f"the {label} logits have an SQNR of {quality.sqnr_db:.1f} dB, little above the "
            f"minimum of {minimum:g} dB{weakest}"
        )
    return tuple(warnings)


def _below(db: float | None, minimum: float) -> bool:
    return db is not None and db < minimum
