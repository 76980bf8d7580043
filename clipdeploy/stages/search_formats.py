"""Searches each 8-bit format for the cheapest feasible combination of products.

A format is searched only if it can be faster than the best choice so far.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.config import QuantizeConfig, Remainder
from calibration.formats import FORMATS, FormatName
from calibration.policy import Scope
from calibration.ranges import RangeMethod
from calibration.scheme import SchemeConfig
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import to_json
from clipdeploy.core.progress import Progress
from clipdeploy.engines.backends import BackendOption
from clipdeploy.runners.onnx import OnnxRunner
from clipdeploy.stages.quantize import write_quantised
from clipdeploy.stages.search_costs import budget_ended, ideal, rank
from clipdeploy.tuning.chain import Chain
from clipdeploy.tuning.cost import (
    CostModel,
    counted_costs,
    linear_shapes,
    measured_costs,
)
from clipdeploy.tuning.evaluate import Evaluator, is_feasible
from clipdeploy.tuning.images import Labelled, labelled_batches
from clipdeploy.tuning.optimiser import Combination, OutOfTimeError, cheapest
from clipdeploy.tuning.pareto import Evaluation
from clipdeploy.tuning.search import SearchConfig
from clipdeploy.tuning.splits import Split
from clipdeploy.tuning.state import load_state, save_state
from clipdeploy.verification.leaks import read_calibrated
from clipdeploy.workspace.folder import Workspace
from exporters.headers import graph_sha256
from exporters.samples import Samples

__all__ = ["Answered", "Best", "Found", "Search", "search_formats"]

# Tried if the configured scheme loses too much accuracy with all Linears quantised: other range
# methods, then SmoothQuant's usual strengths with the best of these.
_OTHER_RANGES: tuple[RangeMethod, ...] = ("auto", "percentile", "mse")
_OTHER_STRENGTHS = (0.5, 0.75)
_EVERYTHING = Scope(attention=True)

# Images, labels (B,), and the FP32 graph's logits (B, classes).
Answered = tuple[Samples, NDArray[np.int64], NDArray[np.float32]]


class Search:
    """One search: its splits, its state on disk, and the schemes that it has tried.

    ``models``: of the costs of engines, in the order in which formats are searched.  ``deadline``:
    of :func:`time.monotonic`.
    """

    def __init__(
        self,
        workspace: Workspace,
        model: str,
        splits: tuple[Split, Split],
        config: SearchConfig,
        models: Mapping[FormatName, CostModel],
        *,
        backend: BackendOption,
        deadline: float | None,
        progress: Progress,
    ) -> None:
        self.workspace, self.model, self.config = workspace, model, config
        self.backend, self.progress = backend, progress
        self.source, self.passport = workspace.source(model)
        self.calibration = workspace.calibration(model)
        self.search, self.confirm = splits
        self.folder = workspace.search(model)
        self.path = self.folder / "state.json"
        self.state = load_state(self.path, self._key())
        self._deadline = deadline
        spec = self.passport.preprocess
        self.calibrated = read_calibrated(self.calibration)
        self.images = list(labelled_batches(self.search, spec, config.batch, self.calibrated))

        self.models = models
        self.formats = tuple(models) or config.formats()

    def _key(self) -> str:
        """A hash of all inputs that the evaluations in the state depend on."""
        config = replace(
            self.config,
            budget=None,
            max_drop=1.0,
            threads=0,
            cost="roofline",
            gpu="",
            format=None,
            outputs=True,
        )
        parts = (
            to_json(config),
            graph_sha256(self.source).encode(),
            sha256_file(self.calibration).encode(),
            self.search.digest.encode(),
        )
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def chain(self, form: FormatName, scheme: SchemeConfig, folder: Path) -> Chain:
        """Reference against all products in 8 bits; INT8 has a flavour that runs fast here."""
        target = folder / f"{form} {scheme.label}.onnx"
        remainder: Remainder = "fp32" if form == "int8" else "fp16"
        config = QuantizeConfig((), remainder, scheme, _EVERYTHING, min_sqnr=None, format=form)
        label = FORMATS[form].label
        with self.progress.task(f"quantise {self.model} to {label}, ranges by {scheme.label}"):
            write_quantised(self.source, self.calibration, target, config)
            return Chain(self.source, target, threads=self.config.threads)

    def evaluator(self, chain: Chain, label: str, advance: Callable[[int], None]) -> Evaluator:
        """Of the combinations of one scheme, which is called ``label`` in the state."""
        return Evaluator(
            chain,
            self.images,
            self.passport.input,
            label,
            self.state,
            self.path,
            self._deadline,
            advance,
        )

    def costs(self, form: FormatName, chain: Chain) -> CostModel:
        """The cost model; if the Linears are timed on this CPU, that is done once."""
        if form in self.models:
            return self.models[form]
        batch = self.config.batch
        if self.config.cost == "cpu" and self.state.costs is not None:
            return self.state.costs
        image = self.images[0][0].as_input(self.passport.input)[:1]
        shapes = linear_shapes(chain, image)
        if self.config.cost == "macs":
            return counted_costs(shapes, batch)
        self.state.costs = measured_costs(chain, shapes, batch)
        save_state(self.state, self.path)
        return self.state.costs

    def answered(self, images: Iterable[Labelled]) -> Iterator[Answered]:
        """``images`` with the FP32 graph's logits on ONNX Runtime."""
        reference = OnnxRunner(self.source, threads=self.config.threads)
        for samples, labels in images:
            yield samples, labels, reference(samples.as_input(reference.input))

    @cached_property
    def answers(self) -> list[Answered]:
        """The search images with the FP32 graph's logits, which are computed once."""
        return list(self.answered(self.images))

    def rounds(self, costs: CostModel) -> bool:
        """Whether products are chosen for an engine with 8-bit sums of qkv and fc1."""
        return self.config.tries_outputs and costs.rounds_outputs

    def feasible(self, found: Evaluation) -> bool:
        """Whether the drop is within the limit, and would be on the confirming images."""
        return is_feasible(found, len(self.confirm.hashes), self.config.max_drop)

    def schemes(self, form: FormatName, best: Best) -> Iterator[SchemeConfig]:
        """The scheme asked for, then others; the ``best`` by then is varied further."""
        asked = self.config.scheme
        yield asked
        if self.config.fixed_scheme:
            return
        for method in _OTHER_RANGES:
            if method != asked.range_method:
                yield replace(asked, range_method=method)
        by_range = best.scheme or asked
        smooths = asked.smooth and FORMATS[form].even
        for strength in _OTHER_STRENGTHS if smooths else ():
            if strength != asked.strength:
                yield replace(by_range, strength=strength)


@dataclass
class Best:
    """The scheme whose graph has the cleanest logits so far, and its chain."""

    db: float = -math.inf
    scheme: SchemeConfig | None = None
    chain: Chain | None = None

    def offer(self, found: Evaluation, scheme: SchemeConfig, chain: Chain) -> None:
        """All Linears in 8 bits under ``scheme``."""
        db = math.inf if found.sqnr_db is None else found.sqnr_db
        if self.chain is None or db > self.db:
            self.db, self.scheme, self.chain = db, scheme, chain


@dataclass(frozen=True)
class Found:
    """The cheapest feasible combination of one format, and the scheme and costs it belongs to.

    ``outputs``: whether the sums of its qkv and fc1 are in 8 bits too, in the cost as well.
    """

    form: FormatName
    scheme: SchemeConfig
    costs: CostModel
    chosen: Combination
    finished: bool
    outputs: bool = False

    @property
    def label(self) -> str:
        """The name of the scheme in the state."""
        return _state_label(self.form, self.scheme)

    @property
    def cost(self) -> float:
        """The cost of the combination."""
        return self.costs.total(self.chosen, outputs=self.outputs)

    @property
    def rank(self) -> tuple[float, int]:
        """The rank of the combination among those of other formats."""
        return rank(self.form, self.costs.relative(self.chosen, outputs=self.outputs))


def _state_label(form: FormatName, scheme: SchemeConfig) -> str:
    return f"{form} {scheme.label}"


def _choose_scheme(
    search: Search, form: FormatName, folder: Path, advance: Callable[[int], None]
) -> tuple[Chain, SchemeConfig]:
    """The first scheme with which all Linears may be quantised, else that with the best logits.

    Raises:
        OutOfTimeError: the budget ended before a combination was evaluated.
    """
    best = Best()
    for scheme in search.schemes(form, best):
        chain = search.chain(form, scheme, folder)
        evaluator = search.evaluator(chain, _state_label(form, scheme), advance)
        try:
            found = evaluator.evaluate(frozenset(chain.linears))
        except OutOfTimeError:
            break
        if search.feasible(found):
            return chain, scheme
        best.offer(found, scheme, chain)
    if best.scheme is None or best.chain is None:
        raise OutOfTimeError
    return best.chain, best.scheme


def _search_format(search: Search, form: FormatName, folder: Path) -> Found:
    """The cheapest feasible combination of one format, whose sums have not been evaluated.

    Raises:
        OutOfTimeError: the budget ended before a combination was evaluated.
    """
    chain, scheme = _choose_scheme(search, form, folder, lambda count: None)
    costs = search.costs(form, chain)
    outputs = search.rounds(costs)
    gain = {name: saved for name, saved in costs.gains(outputs=outputs).items() if saved > 0}
    with search.progress.task(f"search {FORMATS[form].label}", _guess(len(gain))) as advance:
        evaluator = search.evaluator(chain, _state_label(form, scheme), advance)
        fastest = frozenset(gain)
        try:
            least = bool(fastest) and _is_least(costs, fastest, outputs=outputs)
            if least and search.feasible(evaluator.evaluate(fastest)):
                return Found(form, scheme, costs, fastest, finished=True)
            power = evaluator.power(tuple(gain))
        except OutOfTimeError:
            return Found(form, scheme, costs, frozenset(), finished=False)
        chosen, finished = cheapest(
            power,
            gain,
            partial(costs.total, outputs=outputs),
            lambda quantised: search.feasible(evaluator.evaluate(quantised)),
        )
    return Found(form, scheme, costs, chosen, finished)


def _is_least(costs: CostModel, chosen: Combination, *, outputs: bool) -> bool:
    """Whether no combination costs less."""
    least = costs.total(costs.fastest(outputs=outputs), outputs=outputs)
    return costs.total(chosen, outputs=outputs) <= least


def search_formats(
    search: Search, folder: Path, settle: Callable[[Found], Found]
) -> tuple[list[Found], bool]:
    """What was found in each format, the best first, and whether the search finished.

    ``settle`` decides whether the sums of a format's choice are in 8 bits.  A format whose fastest
    combination ranks below the choice of another is left out.

    Raises:
        UsageError: the budget ended before a combination was evaluated.
    """
    founds: list[Found] = []
    finished = True
    allowed = search.config.tries_outputs
    for form in search.formats:
        if founds:
            fastest = ideal(form, search.models[form], outputs=allowed)
            if fastest > min(found.rank for found in founds):
                continue
        try:
            founds.append(settle(_search_format(search, form, folder)))
        except OutOfTimeError:
            finished = False
            break
    if not founds:
        raise budget_ended("before a single combination was evaluated")
    founds.sort(key=lambda found: found.rank)
    return founds, finished and all(found.finished for found in founds)


def _guess(products: int) -> int:
    """An estimate of the steps of a search: each alone, the bisection, a round of trials."""
    return 2 * products + products.bit_length()
