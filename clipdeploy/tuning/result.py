"""The result of a bisection, and its table."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from clipdeploy.core.display import Renderable, Shown
from clipdeploy.tuning.bisection import Measurement, PartError
from clipdeploy.tuning.culprit import Culprit
from clipdeploy.tuning.linears import LinearFacts
from clipdeploy.tuning.tables import decibels, number_columns

__all__ = ["Bisection", "bisection_table"]


@dataclass(frozen=True)
class Bisection(Shown):
    """The compared graphs, the measured errors, and the finding.

    ``labelled``: whether drops are points of top-1; otherwise percent of answers changed.
    ``culprits``: parts whose error is an outlier, worst first.  ``sentence``: the finding in words.
    """

    model: str
    reference: str
    candidate: str
    precision: str
    data: str
    labelled: bool
    random_weights: bool
    measured: Measurement
    linears: tuple[LinearFacts, ...]
    culprits: tuple[Culprit, ...]
    sentence: str

    def __rich__(self) -> Renderable:
        return bisection_table(self)


def _blocks(result: Bisection, drop: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("block", no_wrap=True)
    number_columns(table, ("grown", "alone", "restored", "alone " + drop, "restored " + drop))
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
    number_columns(table, titles)
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
    """The finding, then a table of blocks, then a table of parts."""
    drop = "pts" if result.labelled else "%"
    whole = result.measured.fidelity
    heading = f"{result.candidate} against {result.reference}, {result.measured.images} images"
    loss = "points of top-1 lost" if result.labelled else "% of the answers changed"
    total = f"whole graph: {decibels(whole.sqnr_db)} dB, {result.measured.drop:.2f} {loss}"
    legend = (
        "SQNR in dB: grown: output of the block, whole candidate; own: output of the part alone; "
        "alone: logits with only this part from the candidate; restored: logits with only this "
        "part from the reference; share: of the summed error of all parts alone; costs: what "
        "restoring the part gains"
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
