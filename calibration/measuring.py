"""Measures which smoothing and which range of a Linear's input hurt the output of its block least.

The statistics say how large each channel of an input is, but neither which token a large value is
in nor how far its error gets.  For each Linear, candidates are therefore tried on a few images in
an FP32 copy of its block, in which only this Linear's input is quantised.  The weight has the share
of its rounding error that remains when it is rounded on data (:mod:`calibration.rounding`).  With
the error e of the block's output, by token t = 0 .. T - 1,

    |e_0| ** 2 + mean_t |e_t| ** 2

is least.  Token 0 is the class token, which alone leaves the last block; the errors of the others
reach it as an average.  First the strength t of smoothing is chosen with a range that clips
nothing, then the range: as a part of the largest value, or by the expected error
(:mod:`calibration.ranges`).

The images must not be those of the statistics.  These contain their extremes, so that a strength
near 1, with which every channel fills the range, would clip nothing there and too much on others.
:func:`other_views` makes new ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.blocks import Block, ends_of, find_blocks
from calibration.distribution import Distribution
from calibration.formats import INT8
from calibration.observers import ChannelStatistics
from calibration.policy import LinearSite, find_linears
from calibration.ranges import choose_range
from calibration.smoothing import find_source, fold, search_folding
from calibration.weights import quantize_weight, weight_error
from calibration.write import QdqWriter
from exporters.initializers import values_of, write_initializer
from exporters.parts import cut_out, run_part

__all__ = ["ROUNDED_SHARE", "Setting", "measure_settings", "other_views"]

F32 = NDArray[np.float32]

# Assumed noise of a weight that is rounded on data, relative to that of the nearest numbers.
ROUNDED_SHARE = 0.2
# None is the strength with the least expected error.
_STRENGTHS = (None, 0.45, 0.6, 0.75, 0.9)
# None is the range with the least expected error.  Other images may have larger values, hence 1.15.
_PARTS = (1.0, None, 0.9, 1.15)
# Number of images that the candidates run on.
_IMAGES = 8
# How much larger than an image its other view shows things.
_MAGNIFIED = 1.2


@dataclass(frozen=True)
class Setting:
    """``strength`` of a Linear's smoothing, and ``part``: its range divided by max |x'|.

    None is the one with the least expected error.
    """

    strength: float | None = None
    part: float | None = None


def other_views(crops: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mirrored and magnified views of uint8 (N, S, S, 3), by the nearest pixels; same shape."""
    middle = (crops.shape[1] - 1) / 2
    at = np.rint((np.arange(crops.shape[1]) - middle) / _MAGNIFIED + middle).astype(np.int64)
    return np.ascontiguousarray(crops[:, at][:, :, at[::-1]])


def measure_settings(
    model: ir.Model, statistics: Mapping[str, ChannelStatistics], images: NDArray[Any]
) -> dict[str, Setting]:
    """The best :class:`Setting` of each Linear in ``statistics`` with a source to fold into.

    ``model`` is the FP32 graph, before folding; it is not changed.  ``images`` (N, ...) match its
    input and are not in the statistics.

    Raises:
        GraphError: a block cannot be cut out of the graph, or cannot run.
    """
    blocks = find_blocks(model)
    inputs = [image[None] for image in images[:_IMAGES]]
    starts = ends_of(cut_out(model, None, blocks[0].start), inputs)
    settings = {}
    for block in blocks:
        trial = _Trial(model, block, starts)
        for name in block.linears:
            if name in statistics and trial.foldable(name):
                settings[name] = trial.choose(name, statistics[name])
        starts = trial.ends
    return settings


class _Trial:
    """Tries settings of the Linears of one block, on its ``starts`` in the FP32 network."""

    def __init__(self, model: ir.Model, block: Block, starts: Sequence[F32]) -> None:
        self._model, self._block, self._starts = model, block, starts
        part = self._copy()
        self._source_names = {name for name in block.linears if _source(part, name)}
        self.ends = ends_of(part, starts)

    def _copy(self) -> ir.Model:
        return cut_out(self._model, self._block.start, self._block.end)

    def foldable(self, name: str) -> bool:
        """Whether a Linear's smoothing has a place to be folded into."""
        return name in self._source_names

    def choose(self, name: str, statistics: ChannelStatistics) -> Setting:
        """The setting of a Linear with the least error."""

        @cache
        def error(setting: Setting) -> float:
            return self._error(name, statistics, setting)

        best = min((Setting(strength, _PARTS[0]) for strength in _STRENGTHS), key=error)
        return min((replace(best, part=part) for part in _PARTS), key=error)

    def _error(self, name: str, statistics: ChannelStatistics, setting: Setting) -> float:
        part = self._copy()
        _quantise_input(part, name, statistics, setting)
        found = run_part(part, list(part.graph.outputs), self._starts)
        pairs = zip(self.ends, found, strict=True)
        return sum(_token_error(output - end) for end, (output,) in pairs)


def _token_error(error: F32) -> float:
    """|e_0| ** 2 + mean |e_t| ** 2 of an error (1, tokens, channels) or (1, classes)."""
    tokens = np.square(error, dtype=np.float64).sum(axis=-1).reshape(-1)
    return float(tokens[0] + tokens.mean())


def _site(part: ir.Model, name: str) -> tuple[LinearSite, dict[str, LinearSite]]:
    sites = {site.name: site for site in find_linears(part)}
    return sites[name], sites


def _source(part: ir.Model, name: str) -> bool:
    site, sites = _site(part, name)
    return site.bias is not None and find_source(site, sites) is not None


def _quantise_input(
    part: ir.Model, name: str, statistics: ChannelStatistics, setting: Setting
) -> None:
    """Smooth one Linear, quantise its input, and add the remaining error of its weight."""
    site, sites = _site(part, name)
    folding = search_folding(Distribution.of(statistics), values_of(site.weight), setting.strength)
    source = find_source(site, sites)
    assert source is not None
    fold(site, source, folding)
    weight = values_of(site.weight)
    values = Distribution.of(statistics, folding.shift, folding.scale)
    if setting.part is None:
        squares = np.einsum("ij,ij->i", weight, weight).astype(np.float64)
        limit = choose_range(values, "auto", squares)
    else:
        limit = values.amax * setting.part
    QdqWriter(part.graph, unsigned=True).activation(site.matmul, 0, name, INT8.step(limit))
    error = weight_error(weight, *quantize_weight(weight))
    write_initializer(site.matmul, 1, weight + np.float32(ROUNDED_SHARE**0.5) * error)
