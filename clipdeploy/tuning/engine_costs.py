"""Costs of products from the times of whole engines, which are estimated or measured.

With T(S) the time of an engine with the products S in 8 bits and the others in FP16,

    T(S) = T({}) + sum of a(p) over p in S + sum of s(p, q) over pairs in S
    a(p) = T({p}) - T({}),   s(p, q) = T({p, q}) - T({}) - a(p) - a(q)

Products of a block share kernels: fc1 in 8 bits or fc2 in INT8 separates GELU from the product of
fc1, and attention is one kernel in INT8 only if proj is in INT8 too.  No three share one, so of a
roofline this is exact.  So is what 8-bit sums add for each qkv and fc1 in S, because they only
change the bytes of two kernels:

    o(p) = T({p} with 8-bit sums) - T({p})

A roofline gives T for single products.  A measurement would lose one of them in its noise, so it
puts all products that are alike in 8 bits at once, and divides the difference by their number.
Alike are products of one kind with as many rows: in the last block all but qkv have one row an
image.  Only the pairs above are measured; the engine with everything in 8 bits shows whether its
parts add up to its time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain as joined
from itertools import combinations

from clipdeploy.core.errors import EngineError
from clipdeploy.engines.gpus import Format, GpuSpec
from clipdeploy.engines.roofline import (
    Formats,
    Geometry,
    Kernel,
    block_products,
    check_formats,
    engine_seconds,
    kernel_seconds,
    kernels,
    linear_outputs,
)
from clipdeploy.tuning.cost import CostModel, ProductCost, SharedCost

__all__ = ["TimedCosts", "Timer", "estimated_costs", "timed_costs", "timed_variants"]

# The time in microseconds of an engine with these formats.
Timer = Callable[[Formats], float]
# Products of different blocks that take the same time.
_Group = tuple[str, ...]
# In microseconds: below it a difference of sums is rounding.
_NOTHING = 1e-6
# Pairs that share a kernel.
_SHARING = (("attn", "attn.proj"), ("mlp.fc1", "mlp.fc2"))
# What the parts may differ from the whole, relative to FP16: latencies of one engine repeat within
# 1 or 2 %, and all of INT8 saves about a fifth (docs/numbers.md).
_DOUBTFUL, _USELESS = 0.03, 0.2


@dataclass(frozen=True)
class _Terms:
    """T({}), and by product a(p), s(p, q) and o(p); in microseconds."""

    none: float
    alone: dict[str, float]
    shared: tuple[SharedCost, ...]
    outputs: dict[str, float]


def _terms(
    time: Timer, groups: Sequence[_Group], pairs: Sequence[tuple[_Group, _Group]], form: Format
) -> _Terms:
    """Time engines with whole groups in ``form``; a product's share is that of its group's size.

    The first products of a pair of groups are of one block, and so are the second ones.
    """

    def total(*chosen: _Group, outputs: bool = False) -> float:
        names = tuple(joined.from_iterable(chosen))
        rounded = linear_outputs(names) if outputs else ()
        return time(dict.fromkeys((*names, *rounded), form))

    none = total()
    alone = {group: (total(group) - none) / len(group) for group in groups}
    shared: list[SharedCost] = []
    for left, right in pairs:
        cost = (total(left, right) - none) / len(left) - alone[left] - alone[right]
        if abs(cost) > _NOTHING:
            shared += (SharedCost(names, cost) for names in zip(left, right, strict=True))
    outputs = {
        group: (total(group, outputs=True) - none) / len(group) - alone[group]
        for group in groups
        if linear_outputs(group)
    }
    return _Terms(none, _of_each(alone), tuple(shared), _of_each(outputs))


def _of_each(costs: dict[_Group, float]) -> dict[str, float]:
    return {name: cost for group, cost in costs.items() for name in group}


@dataclass(frozen=True)
class TimedCosts:
    """Measured costs, and the time of the engine with everything in 8 bits.

    ``whole`` was measured, ``parts`` is the sum that the costs predict for it, ``none`` the time of
    FP16; all in microseconds.
    """

    costs: CostModel
    none: float
    whole: float
    parts: float

    @property
    def doubt(self) -> str:
        """A sentence if the parts differ from the whole; else empty."""
        if abs(self.parts - self.whole) <= _DOUBTFUL * self.none:
            return ""
        return (
            f"the measured times contradict each other: the engine with everything in 8 bits takes "
            f"{self.whole:.0f} µs, its parts add up to {self.parts:.0f} µs, FP16 takes "
            f"{self.none:.0f} µs"
        )

    def check(self) -> None:
        """Refuse times that no engine can have, or whose parts have little to do with the whole.

        Raises:
            EngineError: it names the times.
        """
        hint = "run it again when no other program uses the GPU, or choose --cost roofline"
        least = self.costs.total(self.costs.fastest(outputs=True), outputs=True)
        if not all(0 < each < math.inf for each in (self.none, self.whole, self.parts, least)):
            raise EngineError(
                f"the measured times cannot be right: {self.none:.0f} µs in FP16, "
                f"{self.whole:.0f} µs in 8 bits, and {least:.0f} µs for the fastest engine",
                hint=hint,
            )
        if abs(self.parts - self.whole) > _USELESS * self.none:
            raise EngineError(self.doubt, hint=hint)


def _alike(geometry: Geometry) -> dict[tuple[str, bool], _Group]:
    """The products by kind, and whether they have one row an image."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for number in range(geometry.depth):
        for name in block_products(geometry, number):
            kind = name.removeprefix(f"blocks.{number}.")
            one_row = number == geometry.depth - 1 and kind != "attn.qkv"
            groups.setdefault((kind, one_row), []).append(name)
    return {alike: tuple(names) for alike, names in groups.items()}


def _measured_terms(geometry: Geometry, time: Timer, form: Format) -> _Terms:
    groups = _alike(geometry)
    pairs = [
        (groups[left, one_row], groups[right, one_row])
        for left, right in _SHARING
        for one_row in (False, True)
        if (left, one_row) in groups
    ]
    return _terms(time, list(groups.values()), pairs, form)


def timed_costs(geometry: Geometry, time: Timer, batch: int, form: Format, gpu: str) -> TimedCosts:
    """Cost model ``gpu``: the costs that engines with products in ``form`` have on the GPU ``gpu``.

    ``time`` is called for each of :func:`timed_variants`.
    """
    terms = _measured_terms(geometry, time, form)
    plain = {f"{kernel.block}.{kernel.name}": kernel for kernel in kernels(geometry, {}, batch)}
    order = [n for number in range(geometry.depth) for n in block_products(geometry, number)]
    costs = CostModel(
        "gpu",
        f"microseconds measured on {gpu}",
        batch,
        {name: ProductCost(_macs(plain[name], batch), 0.0, terms.alone[name]) for name in order},
        gpu=gpu,
        rest=terms.none,
        shared=terms.shared,
        outputs=terms.outputs,
    )
    return TimedCosts(
        costs,
        terms.none,
        time(dict.fromkeys((*order, *linear_outputs(order)), form)),
        costs.total(frozenset(order), outputs=True),
    )


def timed_variants(geometry: Geometry, form: Format) -> tuple[Formats, ...]:
    """The engines that :func:`timed_costs` times, in this order."""
    asked: list[Formats] = []

    def record(formats: Formats) -> float:
        asked.append(formats)
        return 1.0

    timed_costs(geometry, record, 1, form, "")
    return tuple(asked)


def _macs(kernel: Kernel, batch: int) -> int:
    """The multiply-accumulates of a product for one image."""
    return round(kernel.operations / 2 / batch)


def estimated_costs(
    geometry: Geometry, gpu: GpuSpec, batch: int, form: Format = "int8"
) -> CostModel:
    """Cost model ``roofline``: estimate the time on ``gpu`` of products in FP16 and in ``form``.

    Raises:
        UsageError: ``gpu`` has no products of ``form``.
    """
    check_formats(gpu, {"quantised": form})
    blocks = [block_products(geometry, number) for number in range(geometry.depth)]
    terms = _terms(
        lambda formats: 1e6 * engine_seconds(kernels(geometry, formats, batch), gpu),
        [(name,) for names in blocks for name in names],
        [((left,), (right,)) for names in blocks for left, right in combinations(names, 2)],
        form,
    )
    plain = {f"{kernel.block}.{kernel.name}": kernel for kernel in kernels(geometry, {}, batch)}
    half = {name: 1e6 * kernel_seconds(plain[name], gpu) for name in terms.alone}
    return CostModel(
        "roofline",
        f"microseconds on {gpu.name}, estimated from its data sheet",
        batch,
        {
            name: ProductCost(_macs(plain[name], batch), half[name], half[name] + alone)
            for name, alone in terms.alone.items()
        },
        gpu=gpu.name,
        rest=terms.none - sum(half.values()),
        shared=terms.shared,
        outputs=terms.outputs,
    )
