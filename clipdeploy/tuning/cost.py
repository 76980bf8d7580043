"""Estimates or measures the cost of each Linear in INT8 and FP16, which the search minimises.

Cost model ``macs``, in FP16 MACs:

    cost = MACs / rate + bytes * balance

with batch size B, N tokens and a weight of Cin x Cout,

    MACs  = B N Cin Cout                    rate    = 1 for FP16, 2 for INT8
    bytes = Cin Cout w + B N (Cin w + 2 Cout)       w = 2 for FP16, 1 for INT8
    balance = 76 MACs a byte

INT8 tensor cores perform twice the operations of FP16 ones and read half the bytes.  The balance is
that of an A100 80GB (NVIDIA's data sheet: 312 TFLOPS dense FP16, which is 156 TMAC/s, and
2.04 TB/s).  The terms are added: compute and memory traffic are assumed not to overlap.

Cost model ``cpu``: median time in microseconds of each kind of Linear on ONNX Runtime's CPU
provider, INT8 and FP32 in alternation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clipdeploy.tuning.chain import Chain, Tensor

__all__ = ["CostModel", "LinearCost", "counted_costs", "linear_shapes", "measured_costs"]

CostKind = Literal["macs", "cpu"]
_BALANCE = 76.0
_ROUNDS = 9


@dataclass(frozen=True)
class LinearCost:
    """``macs`` of one image; ``half`` and ``int8``: costs in the unit of the cost model."""

    macs: int
    half: float
    int8: float

    @property
    def gain(self) -> float:
        """Cost that INT8 saves."""
        return self.half - self.int8


@dataclass(frozen=True)
class CostModel:
    """Costs of all Linears, and the unit and batch size that they apply to."""

    kind: CostKind
    unit: str
    batch: int
    linears: dict[str, LinearCost]

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the Linears in network order."""
        return tuple(self.linears)

    def total(self, int8: frozenset[str]) -> float:
        """The cost of all Linears if those in ``int8`` are quantised."""
        return sum(c.int8 if name in int8 else c.half for name, c in self.linears.items())

    def relative(self, int8: frozenset[str]) -> float:
        """:meth:`total` divided by the cost of all Linears in FP16."""
        return self.total(int8) / self.total(frozenset())

    def int8_macs(self, int8: frozenset[str]) -> float:
        """Share of the Linears' MACs that run in INT8, from 0 to 1."""
        every = sum(cost.macs for cost in self.linears.values())
        return sum(self.linears[name].macs for name in int8) / every


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


def _counted(tokens: int, cin: int, cout: int, batch: int) -> LinearCost:
    macs = tokens * cin * cout

    def cost(rate: float, width: int) -> float:
        moved = cin * cout * width + batch * tokens * (cin * width + 2 * cout)
        return batch * macs / rate + moved * _BALANCE

    return LinearCost(macs, cost(1.0, 2), cost(2.0, 1))


def counted_costs(shapes: Mapping[str, tuple[int, int, int]], batch: int) -> CostModel:
    """Cost model ``macs``: count the MACs and bytes of each Linear."""
    linears = {name: _counted(*shape, batch) for name, shape in shapes.items()}
    return CostModel("macs", "FP16 MACs", batch, linears)


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
        half, int8 = known[kind]
        linears[name] = LinearCost(shape[0] * shape[1] * shape[2], half, int8)
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
    half, int8 = (1e6 * statistics.median(seconds[on][1:]) for on in (False, True))
    return half, int8
