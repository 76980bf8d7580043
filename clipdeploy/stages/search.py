"""Searches for the fastest choice of 8 bits or FP16 for each product that keeps the accuracy.

Products are the Linears and, in each block but the last, attention.  A choice has one 8-bit format.
Each format that can be faster than the best choice so far is searched, that which can be fastest
first (``docs/bisect.md`` has the reason for one format).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from calibration.formats import FORMATS, FormatName
from calibration.policy import Scope, find_linears
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
from clipdeploy.tuning.search import SearchConfig, SearchResult, is_attention
from clipdeploy.tuning.splits import Split, check_splits
from clipdeploy.tuning.state import load_state, save_state
from clipdeploy.verification.leaks import read_calibrated
from clipdeploy.verification.paired import judge_drop
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph
from exporters.headers import GraphArtifact

__all__ = ["SearchConfig", "SearchResult", "search_model"]

# Tried if the configured scheme loses too much accuracy with all Linears quantised: other range
# methods, then SmoothQuant's usual strengths with the best of these.
_OTHER_RANGES: tuple[RangeMethod, ...] = ("auto", "percentile", "mse")
_OTHER_STRENGTHS = (0.5, 0.75)
_STORAGE_IMAGES = 3
_EVERYTHING = Scope(attention=True)
_CHOSEN = "chosen"


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

        gpu = gpu_or_default(config.gpu) if config.cost == "roofline" else None
        self.estimates: dict[FormatName, CostModel] = (
            {} if gpu is None else self._estimates(gpu, config.formats(gpu))
        )
        self.formats = tuple(self.estimates) or config.formats(None)

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
        )
        parts = (
            to_json(config),
            sha256_file(self.source).encode(),
            sha256_file(self.calibration).encode(),
            self.search.digest.encode(),
        )
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def _estimates(
        self, gpu: GpuSpec, formats: tuple[FormatName, ...]
    ) -> dict[FormatName, CostModel]:
        """The costs of a ``roofline`` in each format, that which can be fastest first."""
        depth = 1 + max(site.block for site in find_linears(load_graph(self.source)))
        geometry = geometry_of(self.passport, depth)
        batch = self.config.batch
        costs = {form: estimated_costs(geometry, gpu, batch, form) for form in formats}
        return {form: costs[form] for form in sorted(costs, key=lambda form: _ideal(costs, form))}

    def chain(self, form: FormatName, scheme: SchemeConfig, folder: Path) -> Chain:
        """Reference against all products in 8 bits; INT8 has a flavour that runs fast here."""
        target = folder / f"{form} {scheme.label}.onnx"
        samples = sample_images(self.passport.preprocess, _STORAGE_IMAGES)
        remainder: Remainder = "fp32" if form == "int8" else "fp16"
        config = QuantizeConfig((), remainder, scheme, _EVERYTHING, min_sqnr=None, format=form)
        label = FORMATS[form].label
        with self.progress.task(f"quantise {self.model} to {label}, ranges by {scheme.label}"):
            quantize(self.source, self.calibration, target, samples, config)
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
        """The cost model, which is estimated, counted or measured; it is measured once."""
        if form in self.estimates:
            return self.estimates[form]
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

    def feasible(self, found: Evaluation) -> bool:
        """Whether the drop is within the limit, and would be on the confirming images."""
        return is_feasible(found, len(self.confirm.hashes), self.config.max_drop)

    def schemes(self, form: FormatName, best: _Best) -> Iterator[SchemeConfig]:
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


@dataclass(frozen=True)
class _Found:
    """The cheapest feasible combination of one format, and the scheme and costs it belongs to."""

    form: FormatName
    scheme: SchemeConfig
    costs: CostModel
    chosen: Combination
    finished: bool

    @property
    def label(self) -> str:
        """The name of the scheme in the state."""
        return _state_label(self.form, self.scheme)

    @property
    def cost(self) -> float:
        """The cost of the combination."""
        return self.costs.total(self.chosen)

    @property
    def rank(self) -> tuple[float, int]:
        """The rank of the combination among those of other formats."""
        return _rank(self.form, self.costs, self.chosen)


def _rank(form: FormatName, costs: CostModel, chosen: Combination) -> tuple[float, int]:
    """Sorts combinations by cost; a difference below 1 % counts less than the order of FORMATS.

    No estimate is that exact, and INT8 is the more accurate one.
    """
    return round(costs.relative(chosen), 2), tuple(FORMATS).index(form)


def _ideal(costs: Mapping[FormatName, CostModel], form: FormatName) -> tuple[float, int]:
    """The rank of a format's fastest combination."""
    return _rank(form, costs[form], costs[form].fastest())


def _state_label(form: FormatName, scheme: SchemeConfig) -> str:
    return f"{form} {scheme.label}"


def _choose_scheme(
    search: _Search, form: FormatName, folder: Path, advance: Callable[[int], None]
) -> tuple[Chain, SchemeConfig]:
    """The first scheme with which all Linears may be quantised, else that with the best logits.

    Raises:
        OutOfTimeError: the budget ended before a combination was evaluated.
    """
    best = _Best()
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


def _search_format(search: _Search, form: FormatName, folder: Path) -> _Found:
    """The cheapest feasible combination of one format.

    Raises:
        OutOfTimeError: the budget ended before a combination was evaluated.
    """
    chain, scheme = _choose_scheme(search, form, folder, lambda count: None)
    costs = search.costs(form, chain)
    gain = {name: saved for name, saved in costs.gains().items() if saved > 0}
    with search.progress.task(f"search {FORMATS[form].label}", _guess(len(gain))) as advance:
        evaluator = search.evaluator(chain, _state_label(form, scheme), advance)
        try:
            power = evaluator.power(tuple(gain))
        except OutOfTimeError:
            return _Found(form, scheme, costs, frozenset(), finished=False)
        chosen, finished = cheapest(
            power,
            gain,
            costs.total,
            lambda quantised: search.feasible(evaluator.evaluate(quantised)),
        )
    return _Found(form, scheme, costs, chosen, finished)


def _search_formats(search: _Search, folder: Path) -> tuple[list[_Found], bool]:
    """What was found in each format, the best first, and whether the search finished.

    A format whose fastest combination ranks below the choice of another is left out.

    Raises:
        UsageError: the budget ended before a combination was evaluated.
    """
    founds: list[_Found] = []
    finished = True
    for form in search.formats:
        if founds and _ideal(search.estimates, form) > min(found.rank for found in founds):
            continue
        try:
            founds.append(_search_format(search, form, folder))
        except OutOfTimeError:
            finished = False
            break
    if not founds:
        raise UsageError(
            "the budget ended before a single combination was evaluated",
            hint="allow more minutes with --budget; the results so far are reused",
        )
    founds.sort(key=lambda found: found.rank)
    return founds, finished and all(found.finished for found in founds)


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
    """Choose 8 bits or FP16 for every Linear and attention, write the graph, and confirm it.

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
    founds, finished = _search_formats(search, folder)
    best, artifact, measured = _write(search, founds)
    points = _points(search, founds, best, measured)
    judged = judge_drop(measured.lost, measured.gained, measured.images, search.config.max_drop)
    with search.progress.task("confirm"):
        spec = search.passport.preprocess
        batch = search.config.batch
        images = labelled_batches(search.confirm, spec, batch, search.calibrated)
        fresh = _score(search, artifact.path, images)
    confirmed = judge_drop(fresh.lost, fresh.gained, fresh.images, search.config.max_drop)
    point = next(p for p in points if p.label.startswith(_CHOSEN))
    recipe = search.workspace.recipe(search.model)
    config = _config(search, best, best.chosen)
    settings = {"max_drop": search.config.max_drop, "seed": search.config.seed, "cost": point.cost}
    save_recipe(
        QuantizeRecipe(search.model, search.passport.weights.identity, config, settings), recipe
    )
    models = search.estimates or {best.form: best.costs}
    return SearchResult(
        model=search.model,
        data=str(data),
        chosen=point,
        excluded=tuple(name for name in best.costs.order if name not in best.chosen),
        points=tuple(points),
        costs=best.costs,
        format=best.form,
        scheme=best.scheme,
        fastest={form: costs.relative(costs.fastest()) for form, costs in models.items()},
        finished=finished,
        evaluations=sum(" written: " not in slot for slot in search.state.evaluations),
        search=judged,
        confirm=confirmed,
        confirmed=confirmed.verdict == "equivalent" and judged.verdict == "equivalent",
        recipe=recipe,
        artifact=artifact,
    )


def _guess(products: int) -> int:
    """An estimate of the steps of a search: each alone, the bisection, a round of trials."""
    return 2 * products + products.bit_length()


def _config(search: _Search, found: _Found, quantised: Combination) -> QuantizeConfig:
    scope = Scope(attention=any(map(is_attention, quantised)))
    exclude = (
        node
        for name in found.costs.order
        if name not in quantised
        for node in _nodes(name, attention=scope.attention)
    )
    # The search judges accuracy itself, and decides which products stay.
    return QuantizeConfig(
        tuple(exclude),
        search.config.remainder,
        found.scheme,
        scope,
        min_sqnr=None,
        format=found.form,
    )


def _nodes(name: str, *, attention: bool) -> tuple[str, ...]:
    """What a graph calls a product, as far as it is in a scope with or without ``attention``."""
    if not is_attention(name):
        return (name,)
    return (f"{name}.scores", f"{name}.mix") if attention else ()


def _write(search: _Search, founds: list[_Found]) -> tuple[_Found, GraphArtifact, Evaluation]:
    """Write the graph of the cheapest choice; if it is not feasible, that of the next combination.

    Combinations were evaluated with FP32 instead of FP16, and with the foldings of a graph in which
    everything is quantised.  So the written graph is evaluated again.
    """
    written = search.state.evaluations
    failed: set[Path] = set()
    for best in _next_best(search, founds):
        slot = search.state.slot(f"{best.label} written", best.chosen)
        if slot in written and best.chosen and not search.feasible(written[slot]):
            continue
        config = _config(search, best, best.chosen)
        made = quantize_model(search.workspace, search.model, config, progress=search.progress)
        if slot not in written:
            written[slot] = _score(search, made.artifact.path, search.images)
            save_state(search.state, search.path)
        if search.feasible(written[slot]):
            break
        failed.add(made.artifact.path)
    # The graph of another format must not stay as if it had been chosen.
    for path in failed - {made.artifact.path}:
        path.unlink(missing_ok=True)
    return best, made.artifact, written[slot]


def _next_best(search: _Search, founds: list[_Found]) -> Iterator[_Found]:
    """The cheapest choice, then all other feasible combinations by cost, and at last all FP16."""
    best = founds[0]
    yield best
    others = [
        replace(found, chosen=quantised)
        for found in founds
        for quantised, evaluation in search.state.of(found.label).items()
        if quantised and search.feasible(evaluation)
    ]
    for other in sorted(others, key=lambda found: (found.cost, found.form, sorted(found.chosen))):
        if other != best and (other.form != best.form or other.cost >= best.cost):
            yield other
    if best.chosen:
        yield replace(best, chosen=frozenset())


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
    search: _Search, founds: list[_Found], best: _Found, measured: Evaluation
) -> list[Candidate]:
    """Every combination that was evaluated, all FP16 among them, cheapest first.

    The choice has the values ``measured`` on its written graph.  Combinations with a label or on
    the Pareto front get a recipe file.
    """
    nothing = Evaluation(0, 0, len(search.search.hashes), None)
    evaluated = [(replace(best, chosen=frozenset()), nothing)]
    for found in founds:
        known = search.state.of(found.label).items()
        evaluated += [(replace(found, chosen=names), each) for names, each in known if names]
    evaluated = [(found, each) for found, each in evaluated if found != best]
    evaluated.append((best, measured))
    points = [(found, _point(search, found, best, each)) for found, each in evaluated]
    front = pareto_front(point for _, point in points)
    ordered = sorted(points, key=lambda item: (item[1].cost, item[1].drop))
    return [
        _with_recipe(search, found, replace(point, front=point in front), index)
        for index, (found, point) in enumerate(ordered)
    ]


def _point(search: _Search, found: _Found, best: _Found, evaluation: Evaluation) -> Candidate:
    label, order = FORMATS[found.form].label, found.costs.order
    named = {
        frozenset(order): f"all {label}+attn",
        frozenset(name for name in order if not is_attention(name)): f"all {label}",
        frozenset[str](): "all FP16",
    }
    labels = (_CHOSEN if found == best else "", named.get(found.chosen, ""))
    return Candidate(
        label=", ".join(filter(None, labels)),
        format=found.form,
        quantised=tuple(name for name in order if name in found.chosen),
        cost=found.costs.relative(found.chosen),
        quantised_macs=found.costs.quantised_macs(found.chosen),
        evaluation=evaluation,
        feasible=search.feasible(evaluation),
    )


def _with_recipe(search: _Search, found: _Found, point: Candidate, index: int) -> Candidate:
    if not (point.front or point.label):
        return point
    path = search.folder / f"point-{index:02}.json"
    config = _config(search, found, found.chosen)
    settings = {"cost": point.cost, "drop": point.drop, "label": point.label}
    identity = search.passport.weights.identity
    save_recipe(QuantizeRecipe(search.model, identity, config, settings), path)
    return replace(point, recipe=str(path))
