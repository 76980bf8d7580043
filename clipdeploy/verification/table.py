"""A verification as a terminal table."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from clipdeploy.verification.statistics import Fidelity
from clipdeploy.verification.verifier import Row, Verification

__all__ = ["verdict_line", "verification_table"]

_COLOURS = {
    "equivalent": "green",
    "regressed": "red",
    "undecided": "yellow",
    "not judged": "yellow",
    "not executed": "yellow",
}


def verdict_line(result: Verification) -> str:
    """The verdict in one sentence."""
    if result.passed:
        return f"EQUIVALENT: no artifact loses more than {result.max_drop:.2f} points of top-1"
    bad = [row for row in result.rows if row.verdict != "equivalent"]
    if any(row.verdict == "regressed" for row in bad):
        names = ", ".join(_name(row) for row in bad if row.verdict == "regressed")
        return f"REGRESSED: {names}"
    if result.random_weights:
        return "NOT JUDGED: random weights have no accuracy; the logits are compared, no more"
    if any(row.verdict == "undecided" for row in bad):
        needed = max((row.drop.images_needed or 0 for row in bad if row.drop), default=0)
        more = f": about {needed:,} images would tell" if needed else ""
        return f"UNDECIDED{more}"
    return f"NOT PROVEN: {', '.join(f'{_name(row)} {row.verdict}' for row in bad)}"


def _name(row: Row) -> str:
    return f"{row.precision} {row.kind}"


def _figures(fidelity: Fidelity | None) -> list[str]:
    if fidelity is None:
        return ["-"] * 6
    accuracy = fidelity.accuracy
    sqnr = "equal" if fidelity.sqnr_db is None else f"{fidelity.sqnr_db:.1f}"
    return [
        f"{accuracy.top1:.2f}" if accuracy else "-",
        f"{accuracy.top5:.2f}" if accuracy else "-",
        f"{fidelity.agreement:.2f}",
        sqnr,
        f"{fidelity.cosine:.5f}",
        f"{fidelity.max_abs:.1e}",
    ]


def verification_table(result: Verification) -> Group:
    """Verdict first, then a row an artifact, then what each verdict rests on."""
    table = Table(box=None, pad_edge=False)
    table.add_column("artifact", no_wrap=True)
    for title in ("top-1 %", "top-5 %", "agree %", "SQNR dB", "cosine", "max abs"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    if not result.random_weights:
        scored = next((r.fidelity for r in result.rows if r.fidelity is not None), None)
        if scored is not None and scored.reference_accuracy is not None:
            reference = scored.reference_accuracy
            table.add_row(
                "PyTorch",
                f"{reference.top1:.2f}",
                f"{reference.top5:.2f}",
                "",
                "",
                "",
                "",
                "reference",
            )
    for row in result.rows:
        figures = _figures(row.fidelity)
        if result.random_weights:
            figures[:2] = ["-", "-"]
        table.add_row(_name(row), *figures, Text(row.verdict, style=_COLOURS[row.verdict]))
    leaked = f", {result.leaked} of them used for calibration" if result.leaked else ""
    if result.leaked is None:
        leaked = ", nobody knows how many of them used for calibration"
    heading = Text(f"{result.model} on {result.images} images of {result.data}{leaked}")
    verdict = Text(verdict_line(result), style="bold")
    reasons = [Text(f"  {_name(row)}: {row.reason}") for row in result.rows]
    problems = [Text(f"  {problem}", style="yellow") for problem in result.problems]
    return Group(heading, *problems, verdict, Text(""), table, Text(""), *reasons)
