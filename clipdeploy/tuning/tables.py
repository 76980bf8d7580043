"""A bisection as terminal tables."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from clipdeploy.tuning.bisection import PartError
from clipdeploy.tuning.result import Bisection

__all__ = ["bisection_table", "decibels"]


def decibels(value: float | None) -> str:
    """Signal over error: ``equal`` where there is no error, ``broken`` where it is not finite."""
    if value is None:
        return "equal"
    return "broken" if value == float("-inf") else f"{value:.1f}"


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
        facts = ("", "") if fact is None else (f"{fact.peak:.3g}", decibels(fact.weight_db))
        style = "bold red" if part.name in culprits else ""
        table.add_row(part.name, *_figures(part), *facts, style=style)
    return table


def _figures(part: PartError) -> tuple[str, ...]:
    return (
        decibels(part.own_db),
        decibels(part.alone_db),
        f"{100 * part.share:.0f} %",
        decibels(part.restored_db),
        f"{part.cost:.2f}",
    )


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
