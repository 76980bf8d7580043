"""Searches for the fastest choice of 8 bits or FP16 for each product that keeps the accuracy.

Products are the Linears and, in each block but the last, attention.  A choice has one 8-bit format.
Each format that can be faster than the best choice so far is searched, that which can be fastest
first (``docs/int8.md`` has the reason for one format).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from calibration.config import QuantizeConfig
from calibration.formats import FORMATS
from calibration.policy import Scope
from calibration.recipe import QuantizeRecipe, save_recipe
from calibration.table import load_table
from clipdeploy.core.leftovers import scratch_folder
from clipdeploy.core.locks import sole_writer
from clipdeploy.core.paths import StrPath, as_path
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.engines.gpus import DEFAULT_GPU, local_gpu
from clipdeploy.models.cards import takes_any_name
from clipdeploy.runners.onnx import OnnxRunner
from clipdeploy.stages.quantize import calibration_file, quantize_model
from clipdeploy.stages.search_formats import Found, Search, search_formats
from clipdeploy.tuning.evaluate import Counter
from clipdeploy.tuning.images import Labelled, check_enough, labelled_batches, make_splits
from clipdeploy.tuning.optimiser import Combination
from clipdeploy.tuning.pareto import Candidate, Evaluation, pareto_front
from clipdeploy.tuning.search import SearchConfig, SearchResult, is_attention
from clipdeploy.tuning.splits import check_splits
from clipdeploy.tuning.state import save_state
from clipdeploy.verification.paired import judge_drop
from clipdeploy.workspace.folder import Workspace
from exporters.headers import GraphArtifact

__all__ = ["SearchConfig", "SearchResult", "search_model"]

_CHOSEN = "chosen"


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
        search = Search(workspace, model, splits, config, progress)
        return _run(search, temporary, data)


def _run(search: Search, folder: Path, data: Path) -> SearchResult:
    founds, finished = search_formats(search, folder)
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


def _config(search: Search, found: Found, quantised: Combination) -> QuantizeConfig:
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


def _write(search: Search, founds: list[Found]) -> tuple[Found, GraphArtifact, Evaluation]:
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


def _next_best(search: Search, founds: list[Found]) -> Iterator[Found]:
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


def _score(search: Search, graph: Path, images: Iterable[Labelled]) -> Evaluation:
    """Compare a graph with the FP32 graph, both on ONNX Runtime."""
    threads = search.config.threads
    reference, ours = OnnxRunner(search.source, threads=threads), OnnxRunner(graph, threads=threads)
    counter = Counter()
    for samples, labels in images:
        expected = reference(samples.as_input(reference.input))
        counter.add(ours(samples.as_input(ours.input)), expected, labels)
    return counter.result()


def _points(
    search: Search, founds: list[Found], best: Found, measured: Evaluation
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


def _point(search: Search, found: Found, best: Found, evaluation: Evaluation) -> Candidate:
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


def _with_recipe(search: Search, found: Found, point: Candidate, index: int) -> Candidate:
    if not (point.front or point.label):
        return point
    path = search.folder / f"point-{index:02}.json"
    config = _config(search, found, found.chosen)
    settings = {"cost": point.cost, "drop": point.drop, "label": point.label}
    identity = search.passport.weights.identity
    save_recipe(QuantizeRecipe(search.model, identity, config, settings), path)
    return replace(point, recipe=str(path))
