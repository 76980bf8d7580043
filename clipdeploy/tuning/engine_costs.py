"""Costs of products from the times of whole engines, which a roofline estimates.

With T(S) the time of an engine with the products S in 8 bits and the others in FP16,

    T(S) = T({}) + sum of a(p) over p in S + sum of s(p, q) over pairs in S
    a(p) = T({p}) - T({}),   s(p, q) = T({p, q}) - T({}) - a(p) - a(q)

Products of a block share kernels: fc1 or fc2 in 8 bits separates GELU from the product of fc1, and
attention is one kernel in INT8 only if proj is in INT8 too.  No three share one, so of a roofline
this is exact.  So is what 8-bit sums add for each qkv and fc1 in S, because they only change the
bytes of two kernels:

    o(p) = T({p} with 8-bit sums) - T({p})
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain as joined
from itertools import combinations

from clipdeploy.engines.gpus import Format, GpuSpec
from clipdeploy.engines.roofline import (
    Formats,
    Geometry,
    block_products,
    check_formats,
    engine_seconds,
    kernel_seconds,
    kernels,
    linear_outputs,
)
from clipdeploy.tuning.cost import CostModel, ProductCost, SharedCost

__all__ = ["Timer", "estimated_costs"]

# The time in microseconds of an engine with these formats.
Timer = Callable[[Formats], float]
# Products of different blocks that take the same time.
_Group = tuple[str, ...]
# In microseconds: below it a difference of sums is rounding.
_NOTHING = 1e-6


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
            name: ProductCost(
                round(plain[name].operations / 2 / batch), half[name], half[name] + alone
            )
            for name, alone in terms.alone.items()
        },
        gpu=gpu.name,
        rest=terms.none - sum(half.values()),
        shared=terms.shared,
        outputs=terms.outputs,
    )
