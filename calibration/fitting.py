"""Fits the weights and biases of the Linears to images, one block of the network after the other.

Two copies of each block run on the fitting images: one in FP32 on the FP32 network's input of the
block, one on its input in the network that is quantised so far.  For each Linear in turn,

    x  its input in the second copy, quantised
    y  its output in the first copy

give the covariance of x, with which the weight is rounded (:mod:`calibration.rounding`), and the
bias

    b' = E[y] - E[x] W'

so that each output channel has the FP32 network's mean again, whatever the Linears before it have
added.  The class token counts as several tokens, because it alone leaves the last block.  The
images run one by one in the order of their hashes, so the result does not depend on the order in
which they were calibrated.  Only one block's weights are in memory twice, and the two inputs of the
next block for each image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.blocks import ends_of, find_blocks
from calibration.formats import INT8, NumberFormat
from calibration.policy import LinearSite, find_linears
from calibration.rounding import Moments, output_error, round_weight
from calibration.scheme import LinearScheme, add_to_bias
from calibration.weights import weight_error
from calibration.write import QdqWriter
from clipdeploy.core.errors import CalibrationError
from exporters.initializers import values_of, write_initializer
from exporters.parts import cut_out, run_part

__all__ = ["FEWEST_IMAGES", "Fit", "check_gains", "fit_linears"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

# In the last block only the class token is computed: one row of its covariances for each image.
FEWEST_IMAGES = 8
# As how many tokens the class token counts: more than one, fewer than all others together.
_CLASS_TOKEN = 16


@dataclass(frozen=True)
class Fit:
    """The fitted schemes, and the Linears whose ``nearest`` numbers were better on other images."""

    schemes: dict[str, LinearScheme]
    nearest: tuple[str, ...]


def fit_linears(
    model: ir.Model,
    schemes: Mapping[str, LinearScheme],
    images: NDArray[Any],
    checks: NDArray[Any],
    number_format: NumberFormat = INT8,
    *,
    correct_bias: bool = True,
    weights_only: bool = False,
) -> Fit:
    """Fit the numbers and bias corrections of ``schemes`` to ``images`` (N, ...).

    ``model`` is the FP32 graph after folding; it is not changed.  Linears without a scheme stay in
    FP32.  ``checks`` (M, ...) are other images, on which the numbers of each Linear must be better
    than the nearest ones.  ``weights_only``: the inputs of the Linears are not quantised.

    Raises:
        CalibrationError: the numbers of most Linears are not.
        GraphError: a block cannot be cut out of the graph, or cannot run.
    """
    blocks = find_blocks(model)
    with cut_out(model, None, blocks[0].start) as stem:
        exact = ends_of(stem, [image[None] for image in (*images, *checks)])
    coarse = list(exact)
    fitted: dict[str, LinearScheme] = {}
    gains: dict[str, float] = {}
    for block in blocks:
        with cut_out(model, block.start, block.end) as copy:
            part = _Part(copy, len(images), number_format, weights_only)
            with cut_out(model, block.start, block.end) as whole:
                exact = part.run_exact(whole, exact)
            for name in block.linears:
                if name in schemes:
                    fitted[name], gains[name] = part.fit(name, schemes[name], coarse, correct_bias)
            if block is not blocks[-1]:
                coarse = ends_of(copy, coarse)
    return Fit(fitted, check_gains(gains))


def check_gains(gains: Mapping[str, float]) -> tuple[str, ...]:
    """The names of the Linears whose error on other images has not fallen.

    ``gains``: by how many times it has fallen.

    Raises:
        CalibrationError: these are most of the Linears.
    """
    failed = tuple(name for name, gain in gains.items() if gain <= 1)
    if 2 * len(failed) > len(gains):
        worst = min(failed, key=lambda name: gains[name])
        raise CalibrationError(
            f"rounding on the calibration images raises the error on other images in {len(failed)} "
            f"of {len(gains)} Linears, in {worst} {1 / max(gains[worst], 1e-9):.1f} times: the "
            "second moments are of unlike images, or their channels have another order",
            hint="calibrate with images like those in production, or give --effort fast",
        )
    return failed


class _Part:
    """The copy ``coarse`` of a block, which is quantised, and the means of its outputs in FP32.

    The first ``count`` of the inputs are of the images to fit to, the others of the checks.
    """

    def __init__(
        self, coarse: ir.Model, count: int, number_format: NumberFormat, weights_only: bool
    ) -> None:
        self._format, self._count, self._weights_only = number_format, count, weights_only
        self._coarse = coarse
        self._means: dict[str, F64] = {}
        self._sites = {site.name: site for site in find_linears(coarse)}
        self._writer = QdqWriter(
            coarse.graph, unsigned=number_format is INT8, number_format=number_format
        )

    def run_exact(self, exact: ir.Model, inputs: Sequence[NDArray[Any]]) -> list[F32]:
        """The outputs of the block in FP32 for each of ``inputs`` (B, ...)."""
        sites = find_linears(exact)
        outputs = [*exact.graph.outputs, *(site.output for site in sites)]
        ends: list[F32] = []
        for end, *found in run_part(exact, outputs, inputs):
            if len(ends) < self._count:
                for site, output in zip(sites, found, strict=True):
                    share = _mean(output.reshape(-1, output.shape[-1])) / self._count
                    self._means[site.name] = self._means.get(site.name, 0.0) + share
            ends.append(end)
        return ends

    def fit(
        self, name: str, scheme: LinearScheme, inputs: Sequence[F32], correct_bias: bool
    ) -> tuple[LinearScheme, float]:
        """Fit one Linear, and quantise it in the second copy.

        The second result is by how many times the error on the checks has fallen.
        """
        site = self._sites[name]
        if not self._weights_only:
            self._writer.activation(site.matmul, 0, name, scheme.step, scheme.zero)
        weight = values_of(site.weight)
        moments, checks = self._moments(site, inputs)
        numbers = round_weight(weight, scheme.weight_scale, moments.covariance, self._format)
        nearest, ours = (
            output_error(weight_error(weight, each, scheme.weight_scale), checks.covariance)
            for each in (scheme.numbers, numbers)
        )
        gain = nearest / ours if ours else 1.0
        if gain > 1:
            scheme = replace(scheme, numbers=numbers)
        rounded = scheme.numbers.astype(np.float32) * scheme.weight_scale
        if site.bias is not None:
            if correct_bias:
                bias = self._means[name] - moments.mean @ rounded
                scheme = replace(scheme, correction=bias - values_of(site.bias))
            add_to_bias(site, scheme.correction)
        write_initializer(site.matmul, 1, rounded)
        return scheme, gain

    def _moments(self, site: LinearSite, inputs: Sequence[F32]) -> tuple[Moments, Moments]:
        """The moments of a Linear's quantised input, on the images and on the checks."""
        value = site.matmul.inputs[0]
        assert value is not None
        channels = values_of(site.weight).shape[0]
        moments, checks = Moments(channels), Moments(channels)
        for index, (x,) in enumerate(run_part(self._coarse, [value], inputs)):
            (moments if index < self._count else checks).add(x.reshape(-1, channels), _CLASS_TOKEN)
        return moments, checks


def _mean(rows: F32) -> F64:
    """The mean of the tokens ``rows`` (T, C) of an image; the first is the class token."""
    weights = np.ones(len(rows))
    weights[0] = _CLASS_TOKEN
    return np.average(rows, axis=0, weights=weights)
