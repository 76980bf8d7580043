"""Searches for the fastest choice of 8 bits or FP16 for each Linear that keeps the accuracy."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from calibration.formats import FORMATS
from calibration.qdq import QuantizeConfig, Remainder, quantize
from calibration.ranges import RangeMethod
from calibration.recipe import QuantizeRecipe, save_recipe
from calibration.scheme import SchemeConfig
from calibration.table import load_table
from clipdeploy.core.errors import UsageError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.leftovers import scratch_folder
from clipdeploy.core.locks import sole_writer
from clipdeploy.core.passport import to_json
from clipdeploy.core.paths import StrPath, as_path
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.engines.gpus import DEFAULT_GPU, GpuSpec, gpu_or_default, local_gpu
from clipdeploy.engines.roofline import geometry_of
from clipdeploy.models.cards import takes_any_name
from clipdeploy.runners.onnx import OnnxRunner
from clipdeploy.stages.quantize import calibration_file, quantize_model
from clipdeploy.stages.samples import sample_images
from clipdeploy.tuning.chain import Chain
from clipdeploy.tuning.cost import (
    CostModel,
    counted_costs,
    estimated_costs,
    linear_shapes,
    measured_costs,
)
from clipdeploy.tuning.evaluate import Counter, Evaluator, is_feasible
from clipdeploy.tuning.images import Labelled, check_enough, labelled_batches, make_splits
from clipdeploy.tuning.optimiser import Combination, OutOfTimeError, cheapest
from clipdeploy.tuning.pareto import Candidate, Evaluation, pareto_front
from clipdeploy.tuning.search import SearchConfig, SearchResult
from clipdeploy.tuning.splits import Split, check_splits
from clipdeploy.tuning.state import load_state, save_state
from clipdeploy.verification.leaks import read_calibrated
from clipdeploy.verification.paired import judge_drop
from clipdeploy.workspace.folder import Workspace
from exporters.headers import GraphArtifact

__all__ = ["SearchConfig", "SearchResult", "search_model"]

# Tried if the configured scheme loses too much accuracy with all Linears quantised: other range
# methods, then SmoothQuant's usual strengths with the best of these.
_OTHER_RANGES: tuple[RangeMethod, ...] = ("auto", "percentile", "mse")
_OTHER_STRENGTHS = (0.5, 0.75)
_STORAGE_IMAGES = 3


class _Search:
    """One search: its splits, its state on disk, and the schemes that it has tried."""

    def __init__(
        self,
        workspace: Workspace,
        model: str,
        splits: tuple[Split, Split],
        config: SearchConfig,
        progress: Progress,
    ) -> None:
        self.workspace, self.model, self.config = workspace, model, config
        self.progress = progress
        self.source, self.passport = workspace.source(model)
        self.calibration = workspace.calibration(model)
        self.search, self.confirm = splits
        self.folder = workspace.search(model)
        self.path = self.folder / "state.json"
        self.state = load_state(self.path, self._key())
        minutes = config.budget
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        spec = self.passport.preprocess
        self.calibrated = read_calibrated(self.calibration)
        self.images = list(labelled_batches(self.search, spec, config.batch, self.calibrated))

    def _key(self) -> str:
        """A hash of all inputs that the evaluations in the state depend on."""
        config = replace(self.config, budget=None, max_drop=1.0, threads=0, cost="roofline", gpu="")
        parts = (
            to_json(config),
            sha256_file(self.source).encode(),
            sha256_file(self.calibration).encode(),
            self.search.digest.encode(),
        )
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def chain(self, scheme: SchemeConfig, folder: Path) -> Chain:
        """Reference against all Linears in 8 bits; INT8 has a flavour that runs fast here."""
        target = folder / f"{scheme.label}.onnx"
        samples = sample_images(self.passport.preprocess, _STORAGE_IMAGES)
        form = self.config.format
        remainder: Remainder = "fp32" if form == "int8" else "fp16"
        config = QuantizeConfig((), remainder, scheme, min_sqnr=None, format=form)
        with self.progress.task(f"quantise {self.model}, ranges by {scheme.label}"):
            quantize(self.source, self.calibration, target, samples, config)
            return Chain(self.source, target, threads=self.config.threads)

    def evaluator(
        self, chain: Chain, scheme: SchemeConfig, advance: Callable[[int], None]
    ) -> Evaluator:
        """Of one scheme's combinations."""
        return Evaluator(
            chain,
            self.images,
            self.passport.input,
            scheme.label,
            self.state,
            self.path,
            self._deadline,
            advance,
        )

    def costs(self, chain: Chain) -> CostModel:
        """The cost model, which is measured, estimated or counted once."""
        kind, batch = self.config.cost, self.config.batch
        gpu = gpu_or_default(self.config.gpu) if kind == "roofline" else None
        wanted = (kind, gpu.name if gpu else "", batch)
        known = self.state.costs
        if known is None or (known.kind, known.gpu, known.batch) != wanted:
            self.state.costs = self._made_costs(chain, gpu)
            save_state(self.state, self.path)
        assert self.state.costs is not None
        return self.state.costs

    def _made_costs(self, chain: Chain, gpu: GpuSpec | None) -> CostModel:
        image, batch = self.images[0][0].as_input(self.passport.input)[:1], self.config.batch
        shapes = linear_shapes(chain, image)
        if gpu is not None:
            depth = sum(name.endswith(".attn.qkv") for name in shapes)
            return estimated_costs(
                shapes, geometry_of(self.passport, depth), gpu, batch, self.config.format
            )
        if self.config.cost == "cpu":
            return measured_costs(chain, shapes, batch)
        return counted_costs(shapes, batch)

    def feasible(self, found: Evaluation) -> bool:
        """Whether the drop is within the limit, and would be on the confirming images."""
        return is_feasible(found, len(self.confirm.hashes), self.config.max_drop)

    def schemes(self, best: _Best) -> Iterator[SchemeConfig]:
        """The scheme asked for, then others; the ``best`` by then is varied further."""
        asked = self.config.scheme
        yield asked
        if self.config.fixed_scheme:
            return
        for method in _OTHER_RANGES:
            if method != asked.range_method:
                yield replace(asked, range_method=method)
        by_range = best.scheme or asked
        smooths = asked.smooth and FORMATS[self.config.format].even
        for strength in _OTHER_STRENGTHS if smooths else ():
            if strength != asked.strength:
                yield replace(by_range, strength=strength)


@dataclass
class _Best:
    """The scheme whose graph has the cleanest logits so far, and its chain."""

    db: float = -math.inf
    scheme: SchemeConfig | None = None
    chain: Chain | None = None

    def offer(self, found: Evaluation, scheme: SchemeConfig, chain: Chain) -> None:
        """All Linears in 8 bits under ``scheme``."""
        db = math.inf if found.sqnr_db is None else found.sqnr_db
        if self.chain is None or db > self.db:
            self.db, self.scheme, self.chain = db, scheme, chain


def _choose_scheme(
    search: _Search, folder: Path, advance: Callable[[int], None]
) -> tuple[Chain, SchemeConfig]:
    """The first scheme with which all Linears may be quantised, else that with the best logits."""
    best = _Best()
    for scheme in search.schemes(best):
        chain = search.chain(scheme, folder)
        try:
            found = search.evaluator(chain, scheme, advance).evaluate(frozenset(chain.linears))
        except OutOfTimeError:
            break
        if search.feasible(found):
            return chain, scheme
        best.offer(found, scheme, chain)
    if best.scheme is None or best.chain is None:
        raise UsageError(
            "the budget ended before a single combination was evaluated",
            hint="allow more minutes with --budget; the results so far are reused",
        )
    return best.chain, best.scheme


@takes_any_name
def search_model(
    workspace: Workspace,
    model: str,
    data: StrPath,
    config: SearchConfig = SearchConfig(),
    *,
    confirm: StrPath | None = None,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress = SILENT,
) -> SearchResult:
    """Choose 8 bits or FP16 for every Linear, write the graph of the choice, and confirm it.

    ``data`` is split in two: the choice is made on one part and confirmed on the other, or on
    ``confirm``.  ``note`` is called with remarks on the images.  All measurements are saved in the
    workspace, so that an interrupted search continues.

    Raises:
        ClipdeployError: see :mod:`clipdeploy.core.errors`.
    """
    data = Path(data)
    confirm = as_path(confirm)
    _, passport = workspace.source(model)
    calibration = calibration_file(workspace, model)
    splits = make_splits(data, confirm, passport, config, note)
    table = load_table(calibration)
    check_splits(*splits, frozenset(record.sha256 for record in table.images))
    check_enough(splits[0], config, "search")
    check_enough(splits[1], config, "confirm")
    if config.cost == "roofline" and not config.gpu and local_gpu() is None:
        note(
            f"times are estimated for {DEFAULT_GPU}: this machine has no GPU with a data sheet here"
        )
    state = workspace.search(model) / "state.json"
    with sole_writer(state, "clipdeploy search"), scratch_folder() as temporary:
        search = _Search(workspace, model, splits, config, progress)
        return _run(search, temporary, data)


def _run(search: _Search, folder: Path, data: Path) -> SearchResult:
    chain, scheme = _choose_scheme(search, folder, lambda count: None)
    with search.progress.task("search", _guess(len(chain.linears))) as advance:
        evaluator = search.evaluator(chain, scheme, advance)
        costs = search.costs(chain)
        gain = costs.gains()
        try:
            power = evaluator.power() if max(gain.values()) > 0 else {}
        except OutOfTimeError:
            chosen, finished = frozenset[str](), False
        else:
            chosen, finished = cheapest(
                power,
                gain,
                costs.total,
                lambda quantised: search.feasible(evaluator.evaluate(quantised)),
            )
    chosen, artifact, measured = _write(search, scheme, chosen, costs)
    points = _points(search, scheme, costs, chosen, measured)
    judged = judge_drop(measured.lost, measured.gained, measured.images, search.config.max_drop)
    with search.progress.task("confirm"):
        spec = search.passport.preprocess
        batch = search.config.batch
        images = labelled_batches(search.confirm, spec, batch, search.calibrated)
        fresh = _score(search, artifact.path, images)
    confirmed = judge_drop(fresh.lost, fresh.gained, fresh.images, search.config.max_drop)
    point = next(p for p in points if frozenset(p.quantised) == chosen)
    recipe = search.workspace.recipe(search.model)
    config = _config(search, scheme, costs, chosen)
    found = {"max_drop": search.config.max_drop, "seed": search.config.seed, "cost": point.cost}
    save_recipe(
        QuantizeRecipe(search.model, search.passport.weights.identity, config, found), recipe
    )
    return SearchResult(
        model=search.model,
        data=str(data),
        chosen=point,
        excluded=config.exclude,
        points=tuple(points),
        costs=costs,
        format=search.config.format,
        scheme=scheme,
        finished=finished,
        evaluations=sum(" written: " not in slot for slot in search.state.evaluations),
        search=judged,
        confirm=confirmed,
        confirmed=confirmed.verdict == "equivalent" and judged.verdict == "equivalent",
        recipe=recipe,
        artifact=artifact,
    )


def _guess(linears: int) -> int:
    """An estimate of the steps of a search: each Linear alone, the bisection, a round of trials."""
    return 2 * linears + linears.bit_length()


def _config(
    search: _Search, scheme: SchemeConfig, costs: CostModel, quantised: Combination
) -> QuantizeConfig:
    exclude = tuple(name for name in costs.order if name not in quantised)
    # The search judges accuracy itself, and decides which Linears stay.
    return QuantizeConfig(
        exclude, search.config.remainder, scheme, min_sqnr=None, format=search.config.format
    )


def _write(
    search: _Search, scheme: SchemeConfig, chosen: Combination, costs: CostModel
) -> tuple[Combination, GraphArtifact, Evaluation]:
    """Write the graph of the choice; if it is not feasible, that of the next combination.

    Combinations were evaluated with FP32 instead of FP16, and with the foldings of a graph in which
    all Linears are quantised.  So the written graph is evaluated again.
    """
    written = search.state.evaluations
    for quantised in _next_best(search, scheme, chosen, costs):
        slot = search.state.slot(f"{scheme.label} written", quantised)
        if slot in written and quantised and not search.feasible(written[slot]):
            continue
        config = _config(search, scheme, costs, quantised)
        made = quantize_model(search.workspace, search.model, config, progress=search.progress)
        if slot not in written:
            written[slot] = _score(search, made.artifact.path, search.images)
            save_state(search.state, search.path)
        if search.feasible(written[slot]):
            break
    return quantised, made.artifact, written[slot]


def _next_best(
    search: _Search, scheme: SchemeConfig, chosen: Combination, costs: CostModel
) -> Iterator[Combination]:
    """The choice, then the other feasible combinations by cost, and at last none in 8 bits."""
    yield chosen
    known = search.state.of(scheme.label)
    feasible = (
        quantised for quantised, found in known.items() if quantised and search.feasible(found)
    )
    for quantised in sorted(
        feasible, key=lambda quantised: (costs.total(quantised), sorted(quantised))
    ):
        if costs.total(quantised) >= costs.total(chosen) and quantised != chosen:
            yield quantised
    if chosen:
        yield frozenset()


def _score(search: _Search, graph: Path, images: Iterable[Labelled]) -> Evaluation:
    """Compare a graph with the FP32 graph, both on ONNX Runtime."""
    threads = search.config.threads
    reference, ours = OnnxRunner(search.source, threads=threads), OnnxRunner(graph, threads=threads)
    counter = Counter()
    for samples, labels in images:
        expected = reference(samples.as_input(reference.input))
        counter.add(ours(samples.as_input(ours.input)), expected, labels)
    return counter.result()


def _points(
    search: _Search,
    scheme: SchemeConfig,
    costs: CostModel,
    chosen: Combination,
    measured: Evaluation,
) -> list[Candidate]:
    """Every combination of ``scheme`` that was evaluated, all FP16 among them, cheapest first.

    The choice has the values ``measured`` on its written graph.  Combinations with a label or on
    the Pareto front get a recipe file.
    """
    everything = frozenset(costs.order)
    named = {frozenset[str](): "all FP16", everything: f"all {FORMATS[search.config.format].label}"}
    named[chosen] = ", ".join(["chosen", *([named[chosen]] if chosen in named else [])])
    known = search.state.of(scheme.label)
    known[chosen] = measured
    known.setdefault(frozenset(), Evaluation(0, 0, len(search.search.hashes), None))
    points = [
        Candidate(
            label=named.get(quantised, ""),
            quantised=tuple(name for name in costs.order if name in quantised),
            cost=costs.relative(quantised),
            quantised_macs=costs.quantised_macs(quantised),
            evaluation=found,
            feasible=search.feasible(found),
        )
        for quantised, found in known.items()
    ]
    front = {point.quantised for point in pareto_front(points)}
    points.sort(key=lambda point: (point.cost, point.drop))
    return [
        _with_recipe(search, scheme, costs, replace(point, front=point.quantised in front), index)
        for index, point in enumerate(points)
    ]


def _with_recipe(
    search: _Search, scheme: SchemeConfig, costs: CostModel, point: Candidate, index: int
) -> Candidate:
    if not (point.front or point.label):
        return point
    path = search.folder / f"point-{index:02}.json"
    config = _config(search, scheme, costs, frozenset(point.quantised))
    found = {"cost": point.cost, "drop": point.drop, "label": point.label}
    identity = search.passport.weights.identity
    save_recipe(QuantizeRecipe(search.model, identity, config, found), path)
    return replace(point, recipe=str(path))
