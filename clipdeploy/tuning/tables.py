"""Bisections and searches as terminal tables."""

from __future__ import annotations

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clipdeploy.tuning.bisection import BROKEN_DB, PartError
from clipdeploy.tuning.result import Bisection
from clipdeploy.tuning.search import SearchResult

__all__ = ["bisection_table", "decibels", "search_table"]


def decibels(value: float | None) -> str:
    """Signal over error: ``equal`` where there is no error, ``broken`` where it is not finite."""
    if value is None:
        return "equal"
    return "broken" if value == BROKEN_DB else f"{value:.1f}"


def _columns(table: Table, titles: tuple[str, ...]) -> Table:
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _blocks(result: Bisection, drop: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("block", no_wrap=True)
    _columns(table, ("grown", "alone", "restored", "alone " + drop, "restored " + drop))
    for block in result.measured.blocks:
        table.add_row(
            block.name,
            decibels(block.grown_db),
            decibels(block.alone_db),
            decibels(block.restored_db),
            f"{block.alone_drop:.2f}",
            f"{block.restored_drop:.2f}",
        )
    return table


def _parts(result: Bisection, drop: str) -> Table:
    linears = {fact.name: fact for fact in result.linears}
    culprits = {culprit.name for culprit in result.culprits}
    table = Table(box=None, pad_edge=False)
    table.add_column("part", no_wrap=True)
    titles = ("own", "alone", "share", "restored", "costs " + drop, "max |x|", "weight")
    _columns(table, titles)
    for part in result.measured.parts:
        if part.name.endswith(".rest") and part.name not in culprits:
            continue
        fact = linears.get(part.name)
        facts = ("", "") if fact is None else (_peak(fact.peak), decibels(fact.weight_db))
        style = "bold red" if part.name in culprits else ""
        table.add_row(part.name, *_figures(part), *facts, style=style)
    return table


def _peak(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _figures(part: PartError) -> tuple[str, ...]:
    own = (decibels(part.own_db), decibels(part.alone_db), f"{100 * part.share:.0f} %")
    restored = ("-", "-")
    if part.cost is not None:
        restored = (decibels(part.restored_db), f"{part.cost:.2f}")
    return (*own, *restored)


def bisection_table(result: Bisection) -> Group:
    """The finding first, then a row a block, then a row a Linear."""
    drop = "pts" if result.labelled else "%"
    whole = result.measured.fidelity
    heading = f"{result.candidate} against {result.reference}, {result.measured.images} images"
    loss = "points of top-1 lost" if result.labelled else "% of the answers changed"
    total = f"all of it: {decibels(whole.sqnr_db)} dB, {result.measured.drop:.2f} {loss}"
    legend = (
        "own, alone, restored, grown: signal over error in dB, of its output or of the logits; "
        "alone: only this as in the candidate; restored: only this as in the reference; "
        "share: of the error of all parts alone; costs: what restoring it gives back"
    )
    return Group(
        Text(heading),
        Text(result.sentence, style="bold"),
        Text(total),
        Text(""),
        _blocks(result, drop),
        Text(""),
        _parts(result, drop),
        Text(""),
        Text(legend, style="dim"),
    )


def _front(result: SearchResult) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("point", no_wrap=True)
    _columns(table, ("INT8", "MACs", "cost", "drop", "dB", "within", "recipe"))
    for point in result.points:
        if not (point.front or point.label):
            continue
        table.add_row(
            point.label or "front",
            str(len(point.int8)),
            f"{100 * point.int8_macs:.0f} %",
            f"{point.cost:.3f}",
            f"{point.drop:+.2f}",
            decibels(point.evaluation.sqnr_db),
            "yes" if point.feasible else "no",
            point.recipe.rpartition("/")[2],
            style="bold" if point.int8 == result.chosen.int8 else "",
        )
    return table


def search_table(result: SearchResult) -> Group:
    """The verdict first, then the front, then what was left out of INT8."""
    chosen, total = result.chosen, len(result.costs.linears)
    heading = (
        f"{result.model}: {len(chosen.int8)} of {total} Linears in INT8, "
        f"{100 * chosen.int8_macs:.0f} % of their MACs, cost {chosen.cost:.3f} of all FP16"
    )
    verdict = "CONFIRMED" if result.confirmed else "NOT CONFIRMED"
    lines = [
        f"searched on {result.search.n} images: {result.search.sentence}",
        f"fresh {result.confirm.n} images: {result.confirm.sentence}",
        f"cost: {result.costs.unit}, batch {result.costs.batch}; ranges by {result.plan.label}; "
        f"{result.evaluations} combination{'s' * (result.evaluations > 1)} evaluated",
        f"written: {result.artifact.path}",
        f"recipe: {result.recipe}",
    ]
    if not result.finished:
        lines.append("the budget ended the search early: run it again to go on")
    left = ", ".join(result.excluded)
    return Group(
        Text(heading),
        Text(verdict, style="bold green" if result.confirmed else "bold red"),
        *(Padding(Text(line), (0, 0, 0, 2)) for line in lines),
        Text(""),
        _front(result),
        Text(""),
        Text(f"left in FP16: {left}" if left else "all Linears in INT8"),
    )
