"""Computes the quantisation of each Linear: folding, input range, 8-bit weight and bias.

Bias correction: the mean output of a quantised Linear is

    sum_c (E[x'_c] + E[error_c]) W_q[c, :]     instead of     sum_c E[x'_c] W'[c, :]

The difference follows from the statistics and is subtracted from the bias (Nagel et al. 2019,
"Data-free quantization through weight equalization and bias correction").

The SQNR of a Linear's output is estimated before it is written.  For independent channels,

    signal  sum_c var(x'[c]) |W'[c, :]| ** 2
    noise   sum_c E[error_c ** 2] |W'[c, :]| ** 2  +  sum_c var(x'[c]) |(W_q - W')[c, :]| ** 2
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.distribution import Distribution
from calibration.formats import INT8, SMALLEST_SCALE, NumberFormat
from calibration.gelu import gelu_folding, squared_rows
from calibration.measuring import Setting
from calibration.observers import ChannelStatistics
from calibration.policy import LinearSite
from calibration.ranges import RANGE_METHODS, RangeMethod, choose_range, search_levels
from calibration.smoothing import Folding, find_source, fold, fold_gelu, search_folding
from calibration.weights import quantize_weight, weight_error
from clipdeploy.core.errors import UsageError
from clipdeploy.core.spans import STRENGTH, check_numbers
from exporters.initializers import values_of, write_initializer
from exporters.metrics import ratio_db

__all__ = [
    "LinearScheme",
    "SchemeConfig",
    "add_to_bias",
    "fold_all",
    "fold_all_gelu",
    "linear_scheme",
    "product_steps",
]


@dataclass(frozen=True)
class SchemeConfig:
    """How to find ranges, and which corrections to apply.

    ``range_method``: see :mod:`calibration.ranges`.  ``smooth``: fold activation outliers into the
    weights.  ``strength``: the smoothing exponent t for all Linears, from 0 (only weights decide)
    to 1 (only activations), None for the t with the least expected error of each Linear.
    ``shift_gelu``: shift fc2's input to use all levels; only with ``auto``, because the other
    methods choose a symmetric range.  ``clip_weights``: search smaller weight scales.
    ``correct_bias``: subtract the mean quantisation error from biases.  FP8 is neither smoothed nor
    shifted: its error is relative to each value.

    Raises:
        UsageError: unknown range method, ``strength`` out of range or without smoothing.
    """

    range_method: RangeMethod = "auto"
    smooth: bool = True
    shift_gelu: bool = True
    clip_weights: bool = True
    correct_bias: bool = True
    strength: float | None = None

    @property
    def label(self) -> str:
        """Name of the scheme in a search: range method and strength."""
        strength = "" if self.strength is None else f", strength {self.strength:g}"
        return f"{self.range_method}{strength}"

    @property
    def searches(self) -> bool:
        """Whether neither the strength of smoothing nor the range method is given."""
        return self.smooth and self.strength is None and self.range_method == "auto"

    @property
    def shifts_gelu(self) -> bool:
        """Whether GELU's output is shifted before it is quantised."""
        return self.shift_gelu and self.range_method == "auto"

    def __post_init__(self) -> None:
        if self.range_method not in RANGE_METHODS:
            raise UsageError(
                f"unknown range method {self.range_method!r}",
                hint=f"choose one of {', '.join(RANGE_METHODS)}",
            )
        check_numbers(self, strength=STRENGTH.or_none)
        if self.strength is not None and not self.smooth:
            raise UsageError(
                f"a smoothing strength of {self.strength} has no effect without smoothing",
                hint="omit the strength, or enable smoothing",
            )


@dataclass(frozen=True)
class LinearScheme:
    """The quantisation of one Linear.

    The input x is quantised as step * (q + zero); ``step`` is a float16 value.  ``numbers``
    (Cin, Cout), int8 or float8, and ``weight_scale`` (Cout,) are the weight.  ``strength``: the
    smoothing exponent, None without smoothing.  ``correction`` (Cout,): to be added to the bias.
    ``sqnr_db``: expected SQNR of the output in dB.  ``cause``: main cause of the noise.
    """

    step: float
    zero: int
    numbers: NDArray[Any]
    weight_scale: NDArray[np.float32]
    strength: float | None
    correction: NDArray[np.float64]
    sqnr_db: float
    cause: str

    @property
    def shift_output(self) -> NDArray[np.float64]:
        """The amount (Cout,) that the output loses if step * zero is subtracted from the input."""
        column = self.numbers.astype(np.float64).sum(axis=0) * self.weight_scale
        return np.asarray(self.step * self.zero * column)


def fold_all(
    sites: Sequence[LinearSite],
    statistics: Mapping[str, ChannelStatistics],
    strength: float | None = None,
    settings: Mapping[str, Setting] = MappingProxyType({}),
) -> dict[str, Folding]:
    """Fold the input outliers of all Linears in ``statistics`` that have a source to fold into.

    The model's outputs stay the same.  ``sites`` are all its Linears: proj is folded into qkv even
    if qkv is not quantised.  ``strength``: see :class:`SchemeConfig`; ``settings`` outrank it.
    """
    by_name = {site.name: site for site in sites}
    foldings = {}
    # proj comes before qkv, because its folding changes the columns of V in qkv's weight.
    for site in sorted(sites, key=lambda site: site.role != "attn.proj"):
        source = find_source(site, by_name) if site.bias is not None else None
        if source is None or site.name not in statistics:
            continue
        values = Distribution.of(statistics[site.name])
        chosen = settings[site.name].strength if site.name in settings else strength
        folding = search_folding(values, values_of(site.weight), chosen)
        fold(site, source, folding)
        foldings[site.name] = folding
    return foldings


def fold_all_gelu(
    sites: Sequence[LinearSite],
    statistics: Mapping[str, ChannelStatistics],
    strength: float | None = None,
    settings: Mapping[str, Setting] = MappingProxyType({}),
) -> dict[str, Folding]:
    """Shift and scale each channel of GELU's output where that lowers fc2's error.

    The alternative is one shift for all channels.  ``settings`` say which is better; without one of
    a Linear, the expected errors do.  The model's outputs stay the same.
    """
    foldings = {}
    for site in sites:
        if site.role != "mlp.fc2" or site.bias is None or site.name not in statistics:
            continue
        setting = settings.get(site.name)
        wanted = strength if setting is None else setting.strength
        folding, gains = gelu_folding(statistics[site.name], values_of(site.weight), wanted)
        scales = gains if setting is None else wanted is not None
        if scales:
            fold_gelu(site, folding)
            foldings[site.name] = folding
    return foldings


def linear_scheme(
    site: LinearSite,
    statistics: ChannelStatistics,
    folding: Folding | None,
    config: SchemeConfig,
    number_format: NumberFormat = INT8,
    *,
    one_scale: bool = False,
    part: float | None = None,
) -> LinearScheme:
    """Compute the quantisation of one Linear whose input was transformed by ``folding``.

    ``one_scale``: the same weight scale for all output channels.  ``part``: the range divided by
    the largest value, None to use the range method.
    """
    weight = values_of(site.weight)
    shifts = config.shifts_gelu and number_format.even and folding is None
    folding = folding or Folding.none(statistics.channels)
    values = seen = Distribution.of(statistics, folding.shift, folding.scale)
    squares = squared_rows(weight)
    zero = 0
    if shifts and site.role == "mlp.fc2" and site.bias is not None:
        step, zero = search_levels(values, squares)
        values = Distribution.of(statistics, step * zero)
    else:
        limit = (
            choose_range(values, config.range_method, squares, number_format)
            if part is None
            else values.amax * part
        )
        step = number_format.step(limit)
    variance = values.variance()
    numbers, scale = quantize_weight(
        weight, variance if config.clip_weights else None, number_format, one_scale=one_scale
    )
    error = weight_error(weight, numbers, scale)
    offset = np.zeros(weight.shape[1])
    if config.correct_bias and site.bias is not None:
        offset += (values.mean + step * zero) @ error
        offset += values.mean_error(step, number_format) @ (numbers.astype(np.float32) * scale)
    signal = float(variance @ squares)
    limits = np.asarray([step * number_format.largest])
    from_input = float(values.density(squares).error(limits, number_format)[0])
    from_weight = float(variance @ np.einsum("ij,ij->i", error, error))
    noise = from_input + from_weight
    # A constant input has no variance, and the bias corrects the error of its mean.
    db = ratio_db(signal, noise) if signal > 0 else None
    db = math.inf if db is None else db
    cause = _cause_in_input(seen) if from_input > from_weight else _cause_in_weight(scale)
    return LinearScheme(step, zero, numbers, scale, folding.strength, -offset, db, cause)


def _cause_in_input(values: Distribution) -> str:
    sizes = np.maximum(np.abs(values.smallest), np.abs(values.largest))
    channel, median = int(sizes.argmax()), max(float(np.median(sizes)), 1e-12)
    return (
        f"channel {channel} of its input reaches {sizes[channel]:.4g}, "
        f"{sizes[channel] / median:.3g} times the median channel"
    )


def _cause_in_weight(scale: NDArray[np.float32]) -> str:
    lost = float((scale <= SMALLEST_SCALE).mean())
    if lost > 0:
        return f"{lost:.0%} of its outputs have weights too small for a float16 scale"
    return "its weights have outliers"


def add_to_bias(site: LinearSite, offset: NDArray[np.float64]) -> None:
    """Add ``offset`` (Cout,) to the bias of a Linear, which must have one."""
    assert site.add is not None
    write_initializer(site.add, 1, (values_of(site.bias) + offset).astype(np.float32))


def product_steps(
    role: str,
    statistics: ChannelStatistics,
    folding: Folding | None,
    number_format: NumberFormat = INT8,
) -> tuple[float, float]:
    """The steps of both operands of attention's product ``role``, each with the least error.

    ``statistics``: of qkv's output.  ``folding``: the one applied to its columns of V.
    """
    width = statistics.channels // 3
    parts = [statistics.channel_slice(at * width, (at + 1) * width) for at in range(3)]
    if role == "attn.scores":
        limits = [_least_error_range(Distribution.of(part), number_format) for part in parts[:2]]
    else:
        known = folding or Folding.none(width)
        # Softmax outputs are from 0 to 1.
        values = Distribution.of(parts[2], known.shift, known.scale)
        limits = [1.0, _least_error_range(values, number_format)]
    return number_format.step(limits[0]), number_format.step(limits[1])


def _least_error_range(values: Distribution, number_format: NumberFormat) -> float:
    return choose_range(values, "mse", number_format=number_format)
