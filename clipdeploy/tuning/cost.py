"""Estimates or measures the cost of each product in 8 bits and FP16, which the search minimises.

A product is a Linear or, in cost models ``roofline`` and ``gpu``, the attention of a block: both of
its products of activations.

Cost model ``roofline``: microseconds of a whole engine on a GPU, from its data sheet; ``gpu``: the
same, measured on this machine's GPU.  See :mod:`clipdeploy.tuning.engine_costs`.

Cost model ``macs``: multiply-accumulates of the Linears for one image, those in 8 bits counted
half.  This is no time; the choice with the lowest cost has most of its MACs in 8 bits.

Cost model ``cpu``: median time in microseconds of each kind of Linear on ONNX Runtime's CPU
provider, INT8 and FP32 in alternation.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain as joined
from itertools import combinations
from typing import Literal

import numpy as np

from clipdeploy.tuning.chain import Chain, Tensor

__all__ = [
    "CostKind",
    "CostModel",
    "ProductCost",
    "SharedCost",
    "counted_costs",
    "linear_shapes",
    "measured_costs",
]

CostKind = Literal["roofline", "gpu", "macs", "cpu"]
_ROUNDS = 9


@dataclass(frozen=True)
class ProductCost:
    """``macs`` of one image; ``half`` and ``quantised``: costs in the unit of the cost model.

    Cost model ``gpu`` knows only their difference: ``half`` is 0, and ``rest`` the time of FP16.
    """

    macs: int
    half: float
    quantised: float


@dataclass(frozen=True)
class SharedCost:
    """``cost`` to add if all ``products`` are in 8 bits; negative if they share a kernel."""

    products: tuple[str, ...]
    cost: float


@dataclass(frozen=True)
class CostModel:
    """Costs of all products, and the unit and batch size that they apply to.

    ``gpu`` is the GPU that the costs are for, if any, and ``rest`` the cost of everything that is
    no product.  ``outputs`` is what 8-bit sums add to the cost of each qkv and fc1 in 8 bits, less
    than 0 if they save time; it is empty if the cost model does not know.
    """

    kind: CostKind
    unit: str
    batch: int
    products: dict[str, ProductCost]
    gpu: str = ""
    rest: float = 0.0
    shared: tuple[SharedCost, ...] = ()
    outputs: dict[str, float] = field(default_factory=dict)

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the products in network order."""
        return tuple(self.products)

    def total(self, quantised: frozenset[str], *, outputs: bool = False) -> float:
        """The cost with the products ``quantised`` in 8 bits, and their sums if ``outputs``."""
        return self.rest + self._sum(self.products, quantised, outputs)

    def _sum(self, names: Collection[str], quantised: frozenset[str], outputs: bool) -> float:
        """The cost of the products ``names``, which contain ``quantised``."""
        alone = (
            self.products[name].quantised if name in quantised else self.products[name].half
            for name in names
        )
        shared = (each.cost for each in self.shared if quantised.issuperset(each.products))
        rounded = (self.outputs.get(n, 0.0) for n in names if outputs and n in quantised)
        return sum(alone) + sum(shared) + sum(rounded)

    def relative(self, quantised: frozenset[str], *, outputs: bool = False) -> float:
        """:meth:`total` divided by the cost with all products in FP16."""
        return self.total(quantised, outputs=outputs) / self.total(frozenset())

    def fastest(
        self, among: Collection[str] | None = None, *, outputs: bool = False
    ) -> frozenset[str]:
        """The products in 8 bits at the lowest cost, whatever their accuracy; also their sums.

        ``among`` are the products that may be in 8 bits, None for all.  Only products of one block
        share a cost, so each block has its own best set.
        """
        blocks: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.products:
            if among is None or name in among:
                blocks[_block(name)].append(name)
        best = (
            min(_subsets(names), key=lambda chosen, names=names: self._sum(names, chosen, outputs))  # type: ignore[misc]
            for names in blocks.values()
        )
        return frozenset().union(*best)

    def least(self, *, outputs: bool = False) -> float:
        """The lowest cost relative to FP16, whatever the accuracy.

        ``outputs``: sums may be in 8 bits too.
        """
        ways = (False, True) if outputs else (False,)
        return min(self.relative(self.fastest(outputs=way), outputs=way) for way in ways)

    @property
    def rounds_outputs(self) -> bool:
        """Whether the fastest engine of all has 8-bit sums."""
        return self.least(outputs=True) < self.least()

    def gains(self, *, outputs: bool = False) -> dict[str, float]:
        """What each product saves: the cost of :meth:`fastest` without it, less that with it.

        0 for products outside it.  In a ``roofline`` none of them is worth 8 bits, whichever others
        are in FP16, because sharing a kernel makes products in 8 bits cheaper together, not dearer.
        Where two are measured to be dearer together, one of them counts as worth nothing.
        """
        best = self.fastest(outputs=outputs)
        least = self.total(best, outputs=outputs)
        return {
            name: self.total(best - {name}, outputs=outputs) - least if name in best else 0.0
            for name in self.products
        }

    def quantised_macs(self, quantised: frozenset[str]) -> float:
        """Share of the products' MACs that run in 8 bits, from 0 to 1."""
        every = sum(cost.macs for cost in self.products.values())
        return sum(self.products[name].macs for name in quantised) / every


def _block(name: str) -> str:
    """``blocks.3.mlp.fc1`` -> ``blocks.3``."""
    return ".".join(name.split(".")[:2])


def _subsets(names: Collection[str]) -> Iterator[frozenset[str]]:
    """All subsets, smaller ones first."""
    sizes = (combinations(names, size) for size in range(len(names) + 1))
    return map(frozenset, joined.from_iterable(sizes))


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
    products = {name: ProductCost(count, count, count / 2) for name, count in macs.items()}
    return CostModel("macs", "MACs of an image, half for 8 bits", batch, products)


def measured_costs(
    chain: Chain, shapes: Mapping[str, tuple[int, int, int]], batch: int
) -> CostModel:
    """Cost model ``cpu``: time each kind and shape of Linear once on this machine's CPU."""
    known: dict[tuple[str, tuple[int, int, int]], tuple[float, float]] = {}
    products = {}
    for name, shape in shapes.items():
        kind = (name.rpartition(".")[2], shape)
        if kind not in known:
            known[kind] = _time(chain, name, shape, batch)
        half, quantised = known[kind]
        products[name] = ProductCost(shape[0] * shape[1] * shape[2], half, quantised)
    return CostModel("cpu", "microseconds on ONNX Runtime's CPU provider", batch, products)


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
