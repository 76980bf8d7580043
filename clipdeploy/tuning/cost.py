"""Estimates or measures the cost of each Linear in INT8 and FP16, which the search minimises.

Cost model ``roofline``: microseconds of a whole engine on a GPU, from its data sheet and from the
kernels that TensorRT-RTX compiles, see :mod:`clipdeploy.engines.roofline`.  With T(S) the time with
the Linears S in INT8 and the others in FP16,

    T(S) = T({}) + sum over L in S of (T({L}) - T({})) + sum over pairs in S of what they share

fc1 and fc2 of a block share a kernel: either of them in INT8 separates GELU from the product of
fc1.  No other Linears share one, so this is exact (``tests/clipdeploy/tuning/test_cost.py``).

Cost model ``macs``: multiply-accumulates of one image, those in INT8 counted half.  This is no
time; the choice with the lowest cost has most of its MACs in INT8.

Cost model ``cpu``: median time in microseconds of each kind of Linear on ONNX Runtime's CPU
provider, INT8 and FP32 in alternation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from clipdeploy.engines.gpus import Format, GpuSpec
from clipdeploy.engines.roofline import (
    Geometry,
    block_linears,
    check_formats,
    engine_seconds,
    kernel_seconds,
    kernels,
)
from clipdeploy.tuning.chain import Chain, Tensor

__all__ = [
    "CostKind",
    "CostModel",
    "LinearCost",
    "SharedCost",
    "counted_costs",
    "estimated_costs",
    "linear_shapes",
    "measured_costs",
]

CostKind = Literal["roofline", "macs", "cpu"]
_ROUNDS = 9
# In microseconds: below it a difference of sums is rounding.
_NOTHING = 1e-6


@dataclass(frozen=True)
class LinearCost:
    """``macs`` of one image; ``half`` and ``quantised``: costs in the unit of the cost model."""

    macs: int
    half: float
    quantised: float


@dataclass(frozen=True)
class SharedCost:
    """``cost`` to add if all of ``linears`` are in INT8; negative if they share a kernel."""

    linears: tuple[str, ...]
    cost: float


@dataclass(frozen=True)
class CostModel:
    """Costs of all Linears, and the unit and batch size that they apply to.

    ``gpu`` is the GPU of a ``roofline``, and ``rest`` the cost of everything that is no Linear.
    """

    kind: CostKind
    unit: str
    batch: int
    linears: dict[str, LinearCost]
    gpu: str = ""
    rest: float = 0.0
    shared: tuple[SharedCost, ...] = ()

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the Linears in network order."""
        return tuple(self.linears)

    def total(self, quantised: frozenset[str]) -> float:
        """The cost with the Linears in ``quantised`` quantised."""
        linears = sum(
            cost.quantised if name in quantised else cost.half
            for name, cost in self.linears.items()
        )
        shared = sum(each.cost for each in self.shared if quantised.issuperset(each.linears))
        return self.rest + linears + shared

    def relative(self, quantised: frozenset[str]) -> float:
        """:meth:`total` divided by the cost with all Linears in FP16."""
        return self.total(quantised) / self.total(frozenset())

    def gains(self) -> dict[str, float]:
        """What each Linear saves in INT8: the mean of being the first and the last to change."""
        every = frozenset(self.linears)
        none, everything = self.total(frozenset()), self.total(every)
        return {
            name: (none - self.total(frozenset((name,))) + self.total(every - {name}) - everything)
            / 2
            for name in self.linears
        }

    def quantised_macs(self, quantised: frozenset[str]) -> float:
        """Share of the Linears' MACs that run in INT8, from 0 to 1."""
        every = sum(cost.macs for cost in self.linears.values())
        return sum(self.linears[name].macs for name in quantised) / every


def linear_shapes(chain: Chain, image: Tensor) -> dict[str, tuple[int, int, int]]:
    """Tokens, Cin and Cout of each Linear, found by running one image (1, ...)."""
    shapes = {}
    x = image
    for index, segment in enumerate(chain.segments):
        outputs = list(segment.outputs)
        found = chain.parts(index, x, (), outputs)
        for part, tensor in zip(segment.parts, found, strict=True):
            if part.switch in chain.linears:
                weight = chain.weight_shape(part.switch)
                shapes[part.switch] = (int(tensor.shape[1]), *weight)
        x = found[-1]
    return shapes


def counted_costs(shapes: Mapping[str, tuple[int, int, int]], batch: int) -> CostModel:
    """Cost model ``macs``: count the MACs of each Linear."""
    macs = {name: tokens * cin * cout for name, (tokens, cin, cout) in shapes.items()}
    linears = {name: LinearCost(count, count, count / 2) for name, count in macs.items()}
    return CostModel("macs", "MACs of an image, half for 8 bits", batch, linears)


def estimated_costs(
    shapes: Mapping[str, tuple[int, int, int]],
    geometry: Geometry,
    gpu: GpuSpec,
    batch: int,
    form: Format = "int8",
) -> CostModel:
    """Cost model ``roofline``: estimate the time on ``gpu`` of Linears in FP16 and in ``form``.

    Raises:
        UsageError: ``gpu`` has no products of ``form``.
    """
    check_formats(gpu, {"quantised": form})

    def time(*quantised: str) -> float:
        formats: dict[str, Format] = dict.fromkeys(quantised, form)
        return 1e6 * engine_seconds(kernels(geometry, formats, batch), gpu)

    plain = {
        f"{kernel.block}.{kernel.name}": 1e6 * kernel_seconds(kernel, gpu)
        for kernel in kernels(geometry, {}, batch)
    }
    alone = {name: time(name) - time() for name in shapes}
    linears = {
        name: LinearCost(tokens * cin * cout, plain[name], plain[name] + alone[name])
        for name, (tokens, cin, cout) in shapes.items()
    }
    pairs = [
        SharedCost(pair, time(*pair) - time() - sum(alone[name] for name in pair))
        for block in range(geometry.depth)
        for pair in combinations([n for n in block_linears(block) if n in shapes], 2)
    ]
    return CostModel(
        "roofline",
        f"microseconds on {gpu.name}, estimated from its data sheet",
        batch,
        linears,
        gpu=gpu.name,
        rest=time() - sum(plain[name] for name in shapes),
        shared=tuple(pair for pair in pairs if abs(pair.cost) > _NOTHING),
    )


def measured_costs(
    chain: Chain, shapes: Mapping[str, tuple[int, int, int]], batch: int
) -> CostModel:
    """Cost model ``cpu``: time each kind and shape of Linear once on this machine's CPU."""
    known: dict[tuple[str, tuple[int, int, int]], tuple[float, float]] = {}
    linears = {}
    for name, shape in shapes.items():
        kind = (name.rpartition(".")[2], shape)
        if kind not in known:
            known[kind] = _time(chain, name, shape, batch)
        half, quantised = known[kind]
        linears[name] = LinearCost(shape[0] * shape[1] * shape[2], half, quantised)
    return CostModel("cpu", "microseconds on ONNX Runtime's CPU provider", batch, linears)


def _time(chain: Chain, name: str, shape: tuple[int, int, int], batch: int) -> tuple[float, float]:
    session, inputs = chain.single(name)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((batch, shape[0], shape[1]), dtype=np.float32)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(_ROUNDS):
        for on in (False, True):
            started = time.perf_counter()
            session.run(x, {inputs: np.asarray(on)})
            seconds[on].append(time.perf_counter() - started)
    half, quantised = (1e6 * statistics.median(seconds[on][1:]) for on in (False, True))
    return half, quantised
