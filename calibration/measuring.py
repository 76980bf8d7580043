"""Measures which smoothing and which range of a Linear's input hurt its block's output least.

The statistics say how large each channel of an input is, but neither which token a large value is
in nor how far its error gets.  For each Linear, candidates are therefore tried on a few images in
an FP32 copy of its block, in which only this Linear's input is quantised.  The weight has the share
of its rounding error that remains when it is rounded on data (:mod:`calibration.rounding`).  With
the error e of the block's output, by token t = 0 .. T - 1,

    |e_0| ** 2 + mean_t |e_t| ** 2

is small.  Token 0 is the class token, which alone leaves the last block; the errors of the others
reach it as an average.  A few images show the error of a single Linear with a noise as large as the
differences between candidates.  The strength t of Linear i is therefore the one with the least

    log error_i(t) + mean_k log error_k(t)

with k over the Linears of the same role in all blocks.  It is tried with a range that clips
nothing in the statistics.  Then the range is chosen in the same way: this one, larger ones, or the
one with the least expected error (:mod:`calibration.ranges`), which clips a heavy tail.  All but
the last are larger where only the class token is computed: there the statistics contain one token
of each image, and other images often have larger values.

The images must not be those of the statistics.  These contain their extremes, so that a strength
near 1, with which every channel fills the range, would clip nothing there and too much on others.
They are views of them (:mod:`calibration.views`), some of which are harder, so that larger ranges
than the largest value are tried too.

fc2 is folded into two nodes of its own, or has one shift for all channels, see
:mod:`calibration.gelu`.  Both are tried, the former with the strength of the least expected error
and with all ranges.  The one that is expected to be better is replaced only by one with less than
0.7 times its error: a few images do not show smaller differences, but clipping causes larger ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.blocks import Block, ends_of, find_blocks
from calibration.distribution import Distribution
from calibration.formats import INT8
from calibration.gelu import gelu_folding, squared_rows
from calibration.observers import ChannelStatistics
from calibration.policy import LinearSite, find_linears
from calibration.ranges import choose_range, search_levels
from calibration.smoothing import Folding, find_source, fold, fold_gelu, search_folding
from calibration.weights import ROUNDED_SHARE, quantize_weight, weight_error
from calibration.write import QdqWriter
from exporters.initializers import values_of, write_initializer
from exporters.parts import cut_out, run_part

__all__ = ["Setting", "choose", "measure_settings"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9)
# Ranges to try, divided by the largest value; and by how much more they are multiplied for an input
# of which only the class token is computed.
_PARTS, _MARGIN = (1.0, 1.5, 2.0), 1.15
# An error of fc2 that is this much smaller than that of the setting with the least expected error
# may be so by chance.
_DOUBTFUL = 0.7


@dataclass(frozen=True)
class Setting:
    """``strength`` of a Linear's smoothing, and ``part``: its range divided by max |x'|.

    A ``part`` of None is the range with the least expected error.  A ``strength`` of None is one
    shift for all channels of GELU's output, whose range is that with the least expected error.
    """

    strength: float | None
    part: float | None = 1.0


_SHIFTED = Setting(None, None)


@dataclass(frozen=True)
class _Errors:
    """The errors of one Linear with ``settings``, and with ``_STRENGTHS`` if those were tried."""

    settings: list[Setting]
    ranges: F64
    strengths: F64 | None = None


def measure_settings(
    model: ir.Model,
    statistics: Mapping[str, ChannelStatistics],
    images: NDArray[Any],
    *,
    gelu: bool = True,
) -> dict[str, Setting]:
    """The best :class:`Setting` of each Linear in ``statistics`` with a source to fold into.

    ``model`` is the FP32 graph, before folding; it is not changed.  ``images`` (N, ...) match its
    input and are not in the statistics.  ``gelu``: fc2's too.

    Raises:
        GraphError: a block cannot be cut out of the graph, or cannot run.
    """
    blocks = find_blocks(model)
    with cut_out(model, None, blocks[0].start) as stem:
        starts = ends_of(stem, [image[None] for image in images])
    errors: dict[str, _Errors] = {}
    for block in blocks:
        trial = _Trial(model, block, starts, gelu=gelu)
        for name in block.linears:
            if name in statistics and trial.foldable(name):
                errors[name] = trial.measure(name, statistics[name])
        starts = trial.ends
    parts = choose({name: each.ranges for name, each in errors.items()})
    found = {name: each.settings[parts[name]] for name, each in errors.items()}
    tried = {n: each.strengths for n, each in errors.items() if each.strengths is not None}
    for name, best in choose(tried).items():
        found[name] = replace(found[name], strength=_STRENGTHS[best])
    return found


def choose(errors: Mapping[str, F64]) -> dict[str, int]:
    """The index of the best candidate of each Linear ``blocks.N.ROLE``, from its errors (K,).

    The errors of all Linears of its role count as much as its own.
    """
    logs = {name: np.log(np.maximum(each, np.finfo(float).tiny)) for name, each in errors.items()}
    means = {
        role: np.mean([each for name, each in logs.items() if _role(name) == role], axis=0)
        for role in {_role(name) for name in logs}
    }
    return {name: int((each + means[_role(name)]).argmin()) for name, each in logs.items()}


def _role(name: str) -> str:
    return name.split(".", 2)[2]


class _Trial:
    """Tries settings of the Linears of one block, on its ``starts`` in the FP32 network."""

    def __init__(self, model: ir.Model, block: Block, starts: Sequence[F32], *, gelu: bool) -> None:
        self._model, self._block, self._starts = model, block, starts
        with self._copy() as part:
            self._foldable = {name for name in block.linears if _foldable(part, name, gelu=gelu)}
            inputs = [site.activation for site in find_linears(part)]
            (found,) = run_part(part, inputs, starts[:1])
            self.ends = ends_of(part, starts)
        self._one_token = {n for n, x in zip(block.linears, found, strict=True) if x.shape[1] == 1}

    def _copy(self) -> AbstractContextManager[ir.Model]:
        return cut_out(self._model, self._block.start, self._block.end)

    def foldable(self, name: str) -> bool:
        """Whether a Linear's smoothing has a place to be folded into."""
        return name in self._foldable

    def measure(self, name: str, statistics: ChannelStatistics) -> _Errors:
        """The errors of a Linear with different strengths and ranges."""
        measure = self._measure_fc2 if _is_fc2(name) else self._measure_folded
        margin = _MARGIN if name in self._one_token else 1.0
        return measure(name, statistics, [part * margin for part in _PARTS])

    def _measure_folded(
        self, name: str, statistics: ChannelStatistics, parts: Sequence[float]
    ) -> _Errors:
        """Try all strengths, and all ranges with the best of them."""
        tried = [Setting(strength, parts[0]) for strength in _STRENGTHS]
        strengths = self._errors(name, statistics, tried)
        best = int(strengths.argmin())
        others = [replace(tried[best], part=part) for part in (*parts[1:], None)]
        errors = np.append(strengths[best], self._errors(name, statistics, others))
        return _Errors([tried[best], *others], errors, strengths)

    def _measure_fc2(
        self, name: str, statistics: ChannelStatistics, parts: Sequence[float]
    ) -> _Errors:
        """Try one shift, and a shift and scale for each channel with all ranges."""
        with self._copy() as part:
            site, _ = _site(part, name)
            folding, gains = gelu_folding(statistics, values_of(site.weight))
        scaled = Setting(folding.strength or 0.0, None)
        settings = [_SHIFTED, scaled, *(replace(scaled, part=part) for part in parts)]
        errors = self._errors(name, statistics, settings)
        errors[settings.index(scaled if gains else _SHIFTED)] *= _DOUBTFUL
        return _Errors(settings, errors)

    def _errors(self, name: str, statistics: ChannelStatistics, settings: list[Setting]) -> F64:
        """The error of the block's output for each of the settings, (K,)."""
        return np.asarray([self._error(name, statistics, each) for each in settings])

    def _error(self, name: str, statistics: ChannelStatistics, setting: Setting) -> float:
        with self._copy() as part:
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


def _is_fc2(name: str) -> bool:
    return _role(name) == "mlp.fc2"


def _foldable(part: ir.Model, name: str, *, gelu: bool) -> bool:
    site, sites = _site(part, name)
    return site.bias is not None and (
        gelu if _is_fc2(name) else find_source(site, sites) is not None
    )


def _quantise_input(
    part: ir.Model, name: str, statistics: ChannelStatistics, setting: Setting
) -> None:
    """Smooth one Linear, quantise its input, and add the remaining error of its weight."""
    site, sites = _site(part, name)
    folding = Folding.none(statistics.channels)
    if setting.strength is not None:
        before = Distribution.of(statistics)
        folding = search_folding(before, values_of(site.weight), setting.strength)
        source = find_source(site, sites)
        if source is None:
            fold_gelu(site, folding)
        else:
            fold(site, source, folding)
    weight = values_of(site.weight)
    values = Distribution.of(statistics, folding.shift, folding.scale)
    squares = squared_rows(weight)
    zero = 0
    if setting.strength is None:
        step, zero = search_levels(values, squares)
    elif setting.part is None:
        step = INT8.step(choose_range(values, "auto", squares))
    else:
        step = INT8.step(values.amax * setting.part)
    QdqWriter(part.graph, unsigned=True).activation(site.matmul, 0, name, step, zero)
    error = weight_error(weight, *quantize_weight(weight))
    write_initializer(site.matmul, 1, weight + np.float32(ROUNDED_SHARE**0.5) * error)
