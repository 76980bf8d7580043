"""Writes the graph of a search's choice, and evaluates every graph that it writes.

Combinations were evaluated with FP32 instead of FP16, and with the foldings of a graph in which
everything is quantised, so a written graph is evaluated again.  Where 8-bit sums of qkv and fc1
save time, the graph is written with them, and once more without them if it is not feasible.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from calibration.config import QuantizeConfig
from clipdeploy.core.files import atomic_path
from clipdeploy.core.passport import WEIGHTS_ROLE
from clipdeploy.runners.onnx import OnnxRunner
from clipdeploy.stages.quantize import quantize_model, with_scale_form, write_quantised
from clipdeploy.stages.search_formats import Answered, Found, Search
from clipdeploy.stages.search_products import product_config
from clipdeploy.tuning.evaluate import Counter
from clipdeploy.tuning.pareto import Evaluation
from clipdeploy.tuning.state import save_state
from exporters.headers import GraphArtifact, existing_graph, graph_sha256, read_passport

__all__ = [
    "Writer",
    "Written",
    "found_config",
    "may_round_outputs",
    "score",
    "write_choice",
    "written_label",
]


@dataclass(frozen=True)
class Written:
    """The choice, its graph, and what the graph loses on the search images."""

    best: Found
    artifact: GraphArtifact
    evaluation: Evaluation


def found_config(search: Search, found: Found) -> QuantizeConfig:
    """How to write the graph of a combination."""
    return product_config(
        found.costs.order,
        found.chosen,
        found.form,
        found.scheme,
        remainder=search.config.remainder,
        outputs=found.outputs,
    )


def may_round_outputs(search: Search, found: Found) -> bool:
    """Whether 8-bit sums are allowed, and the cost model knows what they save."""
    return search.config.tries_outputs and bool(found.costs.outputs)


def written_label(search: Search, found: Found) -> str:
    """The name in the state of the graphs of a scheme.

    Sums are rounded before the weights' ratios, so their error depends on the form of the scales;
    without 8-bit sums, graphs of both forms compute the same.
    """
    if not found.outputs:
        return f"{found.label} written"
    form = with_scale_form(found_config(search, found), search.backend).weight_scales
    return f"{found.label} outputs {form} written"


def score(search: Search, graph: Path, images: Iterable[Answered]) -> Evaluation:
    """Compare a graph with the FP32 graph, both on ONNX Runtime."""
    ours = OnnxRunner(graph, threads=search.config.threads)
    counter = Counter()
    for samples, labels, expected in images:
        counter.add(ours(samples.as_input(ours.input)), expected, labels)
    return counter.result()


def write_choice(search: Search, writer: Writer, founds: list[Found]) -> Written:
    """Write the graph of the cheapest choice; if it is not feasible, that of the next combination.

    ``founds`` are settled.  The sums of the next combination are in 8 bits under the same condition
    as those of the first one.
    """
    best = founds[0]
    if not search.feasible(writer.evaluate(best)):
        for best in _next_best(search, founds):
            if search.feasible(writer.evaluate(best)):
                break
        best = writer.rounded(best) or best
    return writer.keep(best)


class Writer:
    """Evaluates graphs on the search images once, also in a resumed search, and keeps one.

    Graphs are evaluated in ``folder``, because those in the workspace may be in use.
    """

    def __init__(self, search: Search, folder: Path) -> None:
        self._search, self._folder = search, folder
        self._made: dict[Path, QuantizeConfig] = {}

    def evaluate(self, found: Found) -> Evaluation:
        """What the graph of a combination loses."""
        search = self._search
        slot = search.state.slot(written_label(search, found), found.chosen)
        if slot not in search.state.evaluations:
            search.state.evaluations[slot] = score(search, self._graph(found), search.answers)
            save_state(search.state, search.path)
        return search.state.evaluations[slot]

    def settle(self, found: Found) -> Found:
        """A choice with 8-bit sums if they are cheaper and its graph with them is feasible.

        Else it is without them, and without the products that save time with 8-bit sums only.
        """
        if (rounded := self.rounded(found)) is not None:
            return rounded
        if not self._search.rounds(found.costs):
            return found
        fewer = replace(found, chosen=found.costs.fastest(found.chosen))
        return min(found, fewer, key=lambda each: each.cost)

    def rounded(self, found: Found) -> Found | None:
        """A choice with 8-bit sums; None if they cost more, or the graph is not feasible."""
        rounded = replace(found, outputs=True)
        if not may_round_outputs(self._search, found) or rounded.cost >= found.cost:
            return None
        return rounded if self._search.feasible(self.evaluate(rounded)) else None

    def _graph(self, found: Found) -> Path:
        search = self._search
        config = with_scale_form(found_config(search, found), search.backend)
        target = self._folder / f"{config.precision}.onnx"
        with search.progress.task(f"quantise {search.model}"):
            write_quantised(search.source, search.calibration, target, config)
        self._made[target] = config
        return target

    def keep(self, best: Found) -> Written:
        """Write the graph of the choice into the workspace: the same bytes as were evaluated."""
        search = self._search
        evaluation = self.evaluate(best)
        copied = self._copy(best)
        made = quantize_model(
            *(search.workspace, search.model, found_config(search, best)),
            backend=search.backend,
            progress=search.progress,
        ).artifact
        return Written(best, replace(made, changed=made.changed or copied), evaluation)

    def _copy(self, best: Found) -> bool:
        """Copy the graph of the choice if it was the last to be evaluated, and return whether."""
        search = self._search
        config = with_scale_form(found_config(search, best), search.backend)
        graph = self._folder / f"{config.precision}.onnx"
        if self._made.get(graph) != config:
            return False
        target = search.workspace.graph(search.model, config.precision)
        made, present = read_passport(graph), existing_graph(target)
        # Weights in a file beside the graph are written anew.
        if WEIGHTS_ROLE in made.parents or (present and present.sha256 == graph_sha256(graph)):
            return False
        with atomic_path(target) as temporary:
            shutil.copyfile(graph, temporary)
        return True


def _next_best(search: Search, founds: list[Found]) -> Iterator[Found]:
    """All feasible combinations but the cheapest choice by cost, and at last all FP16."""
    best = founds[0]
    others = founds[1:]
    others += [
        replace(found, chosen=quantised, outputs=False)
        for found in founds
        for quantised, evaluation in search.state.of(found.label).items()
        if quantised and search.feasible(evaluation)
    ]
    for other in sorted(others, key=lambda found: (found.cost, found.form, sorted(found.chosen))):
        if other != best and (other.form != best.form or other.cost >= best.cost):
            yield other
    yield replace(best, chosen=frozenset(), outputs=False)
