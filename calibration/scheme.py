"""What becomes of each Linear: foldings first, then its range, its int8 weight and its bias.

Bias correction: quantised, a Linear gives on average

    sum_c (E[x'_c] + E[error_c]) W_q[c, :]     instead of     sum_c E[x'_c] W'[c, :]

and the difference, known from the statistics, is taken off the bias (Nagel et al. 2019, "Data-free
quantization through weight equalization and bias correction").

What INT8 costs a Linear is known before it is written.  With independent channels its output has

    signal  sum_c var(x'[c]) |W'[c, :]| ** 2
    noise   sum_c E[error_c ** 2] |W'[c, :]| ** 2  +  sum_c var(x'[c]) |(W_q - W')[c, :]| ** 2
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.distribution import LEVELS, Distribution
from calibration.observers import ChannelStatistics
from calibration.policy import LinearSite
from calibration.ranges import RANGE_METHODS, RangeMethod, choose_range, search_levels
from calibration.smoothing import Folding, find_source, fold, search_folding
from calibration.weights import SMALLEST_SCALE, float16_step, quantize_weight, weight_error
from clipdeploy.core.errors import UsageError
from clipdeploy.core.spans import STRENGTH, check_numbers
from exporters.initializers import write_initializer

__all__ = [
    "LinearScheme",
    "SchemeConfig",
    "add_to_bias",
    "fold_all",
    "linear_scheme",
    "product_steps",
]


@dataclass(frozen=True)
class SchemeConfig:
    """How ranges are found, and which corrections are made; each can be switched off.

    ``strength``: the smoothing's t for all Linears, from 0 (weights alone decide) to 1 (activations
    alone), None for each Linear's own with the least expected error.
    ``shift_gelu`` belongs to the ``auto`` range: it searches fc2's levels to both sides at once,
    where the other methods name one range and mean it.

    Raises:
        UsageError: there is no such range method.
    """

    range_method: RangeMethod = "auto"
    smooth: bool = True
    shift_gelu: bool = True
    clip_weights: bool = True
    correct_bias: bool = True
    strength: float | None = None

    @property
    def label(self) -> str:
        """What sets the schemes that a search tries apart."""
        strength = "" if self.strength is None else f", strength {self.strength:g}"
        return f"{self.range_method}{strength}"

    @property
    def shifts_gelu(self) -> bool:
        """Whether GELU's output is shifted before it is quantised."""
        return self.shift_gelu and self.range_method == "auto"

    def __post_init__(self) -> None:
        if self.range_method not in RANGE_METHODS:
            raise UsageError(
                f"no range method {self.range_method!r}",
                hint=f"one of {', '.join(RANGE_METHODS)}",
            )
        check_numbers(self, strength=STRENGTH.or_none)
        if self.strength is not None and not self.smooth:
            raise UsageError(
                f"a smoothing strength of {self.strength} without smoothing",
                hint="leave one of the two out",
            )


@dataclass(frozen=True)
class LinearScheme:
    """One quantised Linear.

    Its input x is quantised as step * (q + zero), q in int8; ``step`` is a float16 value.
    ``integers`` (Cin, Cout) int8 and ``weight_scale`` (Cout,) are the weight; ``strength`` is the
    smoothing's t, None without.  ``correction`` (Cout,) is to be added to the bias.  ``sqnr_db`` is
    the expected signal over noise of the output in dB, ``cause`` what makes most of the noise.
    """

    step: float
    zero: int
    integers: NDArray[np.int8]
    weight_scale: NDArray[np.float32]
    strength: float | None
    correction: NDArray[np.float64]
    sqnr_db: float
    cause: str

    @property
    def shift_output(self) -> NDArray[np.float64]:
        """What the Linear's output loses if step * zero is subtracted from its input, (Cout,)."""
        column = self.integers.sum(axis=0, dtype=np.int64) * self.weight_scale.astype(np.float64)
        return np.asarray(self.step * self.zero * column)


def _weight(site: LinearSite) -> NDArray[np.float32]:
    tensor = site.weight.const_value
    assert tensor is not None
    weight: NDArray[np.float32] = tensor.numpy()
    return weight


def fold_all(
    sites: Sequence[LinearSite],
    statistics: Mapping[str, ChannelStatistics],
    strength: float | None = None,
) -> dict[str, Folding]:
    """Search and write the folding of every Linear in ``statistics`` that can have one.

    The model stays the same.  ``sites`` are all its Linears: proj is folded into qkv also where
    qkv itself is left alone.  ``strength`` is :class:`SchemeConfig`'s.

    proj before qkv, because its folding changes the columns of V in qkv's weight.
    """
    by_name = {site.name: site for site in sites}
    foldings = {}
    for site in sorted(sites, key=lambda site: site.role != "attn.proj"):
        source = find_source(site, by_name) if site.bias is not None else None
        if source is None or site.name not in statistics:
            continue
        values = Distribution.of(statistics[site.name])
        folding = search_folding(values, _weight(site), strength)
        fold(site, source, folding)
        foldings[site.name] = folding
    return foldings


def linear_scheme(
    site: LinearSite, statistics: ChannelStatistics, folding: Folding | None, config: SchemeConfig
) -> LinearScheme:
    """One Linear's numbers; ``folding`` is what was folded into its source, if anything."""
    weight = _weight(site)
    folding = folding or Folding.none(statistics.channels)
    values = seen = Distribution.of(statistics, folding.shift, folding.scale)
    squares = np.einsum("ij,ij->i", weight, weight).astype(np.float64)
    zero = 0
    if config.shifts_gelu and site.role == "mlp.fc2" and site.bias is not None:
        step, zero = search_levels(values, squares)
        values = Distribution.of(statistics, step * zero)
    else:
        limit = choose_range(values, config.range_method, squares)
        step = float16_step(limit)
    variance = np.maximum(values.second_moment() - values.mean**2, 0.0)
    integers, scale = quantize_weight(weight, variance if config.clip_weights else None)
    error = weight_error(weight, integers, scale)
    offset = np.zeros(weight.shape[1])
    if config.correct_bias and site.bias is not None:
        offset += (values.mean + step * zero) @ error
        offset += values.mean_error(step) @ (integers.astype(np.float32) * scale)
    signal = float(variance @ squares)
    from_input = float(values.density(squares).error(np.asarray([step * LEVELS]))[0])
    from_weight = float(variance @ np.einsum("ij,ij->i", error, error))
    noise = from_input + from_weight
    db = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf
    cause = _cause_in_input(seen) if from_input > from_weight else _cause_in_weight(scale)
    return LinearScheme(step, zero, integers, scale, folding.strength, -offset, db, cause)


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
    """Add ``offset`` (Cout,) to the bias of a Linear that has one."""
    assert site.add is not None
    assert site.bias is not None
    assert site.bias.const_value is not None
    bias = (site.bias.const_value.numpy() + offset).astype(np.float32)
    write_initializer(site.add, 1, bias)


def product_steps(
    role: str, statistics: ChannelStatistics, folding: Folding | None
) -> tuple[float, float]:
    """The steps of both operands of attention's product ``role``, by least error of each.

    ``statistics`` are those of qkv's output; ``folding`` is what was moved into its columns of V.
    """
    width = statistics.channels // 3
    parts = [statistics.channel_slice(at * width, (at + 1) * width) for at in range(3)]
    if role == "attn.scores":
        limits = [choose_range(Distribution.of(part), "mse") for part in parts[:2]]
    else:
        known = folding or Folding.none(width)
        # Softmax gives values from 0 to 1.
        values = Distribution.of(parts[2], known.shift, known.scale)
        limits = [1.0, choose_range(values, "mse")]
    return float16_step(limits[0]), float16_step(limits[1])
