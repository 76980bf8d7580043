"""Searches for the fastest choice of 8 bits or FP16 for each product that keeps the accuracy.

Products are the Linears and, in each block but the last, attention.  A choice has one 8-bit format.
Each format that can be faster than the best choice so far is searched, that which can be fastest
first (``docs/int8.md`` has the reason for one format).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from calibration.formats import FORMATS
from calibration.recipe import QuantizeRecipe, save_recipe
from calibration.table import load_table
from clipdeploy.core.leftovers import scratch_folder
from clipdeploy.core.locks import sole_writer
from clipdeploy.core.paths import StrPath, as_path
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.engines.backends import BackendOption
from clipdeploy.models.cards import takes_any_name
from clipdeploy.stages.quantize import calibration_file
from clipdeploy.stages.search_costs import CostRun, engine_models, timed_gpu
from clipdeploy.stages.search_formats import Found, Search, search_formats
from clipdeploy.stages.search_graphs import (
    Writer,
    Written,
    found_config,
    may_round_outputs,
    score,
    write_choice,
    written_label,
)
from clipdeploy.tuning.images import check_enough, labelled_batches, make_splits
from clipdeploy.tuning.pareto import Candidate, Evaluation, pareto_front
from clipdeploy.tuning.search import SearchConfig, SearchResult, is_attention
from clipdeploy.tuning.splits import check_splits
from clipdeploy.verification.paired import judge_drop
from clipdeploy.workspace.folder import Workspace

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
    backend: BackendOption = "auto",
    note: Callable[[str], object] = lambda text: None,
    progress: Progress = SILENT,
) -> SearchResult:
    """Choose 8 bits or FP16 for every Linear and attention, write the graph, and confirm it.

    ``data`` is split in two: the choice is made on one part and confirmed on the other, or on
    ``confirm``.  The weight scales of the graph have the form for ``backend``.  ``note`` is called
    with remarks on the images.  All measurements are saved in the workspace, so that an interrupted
    search continues.

    Raises:
        ClipdeployError: see :mod:`clipdeploy.core.errors`.
    """
    if config.cost == "gpu":
        timed_gpu()
    data = Path(data)
    confirm = as_path(confirm)
    _, passport = workspace.source(model)
    calibration = calibration_file(workspace, model)
    splits = make_splits(data, confirm, passport, config, note)
    table = load_table(calibration)
    check_splits(*splits, frozenset(record.sha256 for record in table.images))
    check_enough(splits[0], config, "search")
    check_enough(splits[1], config, "confirm")
    state = workspace.search(model) / "state.json"
    with sole_writer(state, "clipdeploy search"), scratch_folder() as temporary:
        deadline = None if config.budget is None else time.monotonic() + 60 * config.budget
        run = CostRun(workspace, model, config, backend, deadline, note, progress)
        search = Search(
            *(workspace, model, splits, config, engine_models(run)),
            backend=backend,
            deadline=deadline,
            progress=progress,
        )
        return _run(search, temporary, data)


def _run(search: Search, folder: Path, data: Path) -> SearchResult:
    writer = Writer(search, folder)
    founds, finished = search_formats(search, folder, writer.settle)
    written = write_choice(search, writer, founds)
    best, measured = written.best, written.evaluation
    points = _points(search, founds, written)
    judged = judge_drop(measured.lost, measured.gained, measured.images, search.config.max_drop)
    with search.progress.task("confirm"):
        spec = search.passport.preprocess
        batch = search.config.batch
        images = labelled_batches(search.confirm, spec, batch, search.calibrated)
        fresh = score(search, written.artifact.path, search.answered(images))
    confirmed = judge_drop(fresh.lost, fresh.gained, fresh.images, search.config.max_drop)
    point = next(p for p in points if p.label.startswith(_CHOSEN))
    recipe = search.workspace.recipe(search.model)
    config = found_config(search, best)
    settings = {"max_drop": search.config.max_drop, "seed": search.config.seed, "cost": point.cost}
    save_recipe(
        QuantizeRecipe(search.model, search.passport.weights.identity, config, settings), recipe
    )
    models = search.models or {best.form: best.costs}
    outputs = search.config.tries_outputs
    return SearchResult(
        model=search.model,
        data=str(data),
        chosen=point,
        excluded=tuple(name for name in best.costs.order if name not in best.chosen),
        points=tuple(points),
        costs=best.costs,
        format=best.form,
        scheme=best.scheme,
        outputs=best.outputs,
        fastest={form: costs.least(outputs=outputs) for form, costs in models.items()},
        finished=finished,
        evaluations=sum(" written: " not in slot for slot in search.state.evaluations),
        search=judged,
        confirm=confirmed,
        confirmed=confirmed.verdict == "equivalent" and judged.verdict == "equivalent",
        recipe=recipe,
        artifact=written.artifact,
    )


def _points(search: Search, founds: list[Found], written: Written) -> list[Candidate]:
    """Every combination that was evaluated, all FP16 among them, cheapest first.

    The choice has the values that were measured on its graph.  Combinations with a label or on the
    Pareto front get a recipe file.
    """
    best = written.best
    evaluated = [each for each in _evaluated(search, founds, best) if each[0] != best]
    evaluated.append((best, written.evaluation))
    points = [(found, _point(search, found, best, each)) for found, each in evaluated]
    front = pareto_front(point for _, point in points)
    ordered = sorted(points, key=lambda item: (item[1].cost, item[1].drop))
    return [
        _with_recipe(search, found, replace(point, front=point in front), index)
        for index, (found, point) in enumerate(ordered)
    ]


def _evaluated(
    search: Search, founds: list[Found], best: Found
) -> Iterator[tuple[Found, Evaluation]]:
    """All FP16, all combinations of each format, and those whose graphs had 8-bit sums."""
    nothing = Evaluation(0, 0, len(search.search.hashes), None)
    yield replace(best, chosen=frozenset(), outputs=False), nothing
    for found in founds:
        for names, each in search.state.of(found.label).items():
            if names:
                yield replace(found, chosen=names, outputs=False), each
        rounded = replace(found, outputs=True)
        if may_round_outputs(search, found):
            for names, each in search.state.of(written_label(search, rounded)).items():
                yield replace(rounded, chosen=names), each


def _point(search: Search, found: Found, best: Found, evaluation: Evaluation) -> Candidate:
    label, order = FORMATS[found.form].label, found.costs.order
    named = {
        frozenset(order): f"all {label}+attn",
        frozenset(name for name in order if not is_attention(name)): f"all {label}",
        frozenset[str](): "all FP16",
    }
    name = named.get(found.chosen, "")
    labels = (_CHOSEN if found == best else "", f"{name}+out" if name and found.outputs else name)
    return Candidate(
        label=", ".join(filter(None, labels)),
        format=found.form,
        quantised=tuple(name for name in order if name in found.chosen),
        outputs=found.outputs,
        cost=found.costs.relative(found.chosen, outputs=found.outputs),
        quantised_macs=found.costs.quantised_macs(found.chosen),
        evaluation=evaluation,
        feasible=search.feasible(evaluation),
    )


def _with_recipe(search: Search, found: Found, point: Candidate, index: int) -> Candidate:
    if not (point.front or point.label):
        return point
    path = search.folder / f"point-{index:02}.json"
    config = found_config(search, found)
    settings = {"cost": point.cost, "drop": point.drop, "label": point.label}
    identity = search.passport.weights.identity
    save_recipe(QuantizeRecipe(search.model, identity, config, settings), path)
    return replace(point, recipe=str(path))
