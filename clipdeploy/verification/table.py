"""A verification as a terminal table: the verdict first, then a row an artifact, then why."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clipdeploy.verification.result import Row, Verification

__all__ = [
    "COLUMNS",
    "artifact_names",
    "baseline_lines",
    "figures_of",
    "heading",
    "verdict_line",
    "verification_table",
]

# Of the figures; see figures_of().
COLUMNS = ("top-1 %", "top-5 %", "agree %", "SQNR dB", "cosine", "max abs")


_COLOURS = {
    "equivalent": "green",
    "regressed": "red",
    "undecided": "yellow",
    "not judged": "yellow",
    "not executed": "yellow",
}
_SHOWN_CAUSES = 3


def verdict_line(result: Verification) -> str:
    """The verdict in one sentence: what was judged, and what was not."""
    line = _verdict(result)
    if not result.left_out:
        return line
    return f"{line}; {_counted(len(result.left_out), 'engine')} not executed and not judged"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _verdict(result: Verification) -> str:
    if result.passed:
        kinds = [row.kind for row in result.rows]
        judged = [_counted(kinds.count(kind), kind) for kind in dict.fromkeys(kinds)]
        top5 = result.max_drop_top5
        return (
            f"EQUIVALENT: {' and '.join(judged)} "
            f"{'loses' if len(kinds) == 1 else 'lose'} no more than {result.max_drop:.2f} points "
            f"of top-1{f' and {top5:.2f} of top-5' if top5 is not None else ''}"
        )
    named = zip(artifact_names(result), result.rows, strict=True)
    names = {name: row for name, row in named if row.verdict != "equivalent"}
    bad = names.values()
    if regressed := [name for name, row in names.items() if row.verdict == "regressed"]:
        return f"REGRESSED: {', '.join(regressed)}"
    unsteady = [
        name for name, row in names.items() if row.repeats is not None and not row.repeats.steady
    ]
    if unsteady:
        return f"NOT JUDGED: {', '.join(unsteady)} {_do(unsteady)} not repeat"
    if not result.baseline:
        return f"NOT JUDGED: {result.baseline.sentence}"
    if result.random_weights:
        return "NOT JUDGED: random weights have no accuracy; the logits are compared, no more"
    if any(row.verdict == "undecided" for row in bad):
        return f"UNDECIDED{_advice(result)}"
    return f"NOT PROVEN: {', '.join(f'{name} {row.verdict}' for name, row in names.items())}"


def _do(names: Sequence[str]) -> str:
    return "does" if len(names) == 1 else "do"


def _advice(result: Verification) -> str:
    """How many images may decide; after a look at a fixed number, by a test that allows looks."""
    judged = [row.drop for row in result.rows if row.drop and row.verdict == "undecided"]
    needed = max((drop.images_needed or 0 for drop in judged), default=0)
    if not needed:
        return ""
    again = "" if result.sequential else " with --sequential"
    return f": about {needed:,} images{again} would decide"


def artifact_names(result: Verification) -> tuple[str, ...]:
    """``int8 graph`` for each row, no name twice.

    A file that no passport vouches for, or that is not the only one of its kind, goes by its own
    name, and by its path where another has the same.
    """
    rows = result.rows
    kinds = [f"{row.precision} {row.kind}" if row.vouched else _own_name(row) for row in rows]
    alone = [name if kinds.count(name) == 1 else "" for name in kinds]
    names = [name or _own_name(row) for name, row in zip(alone, rows, strict=True)]
    return tuple(
        name if names.count(name) == 1 else row.artifact
        for name, row in zip(names, rows, strict=True)
    )


def _own_name(row: Row) -> str:
    return row.artifact.replace("\\", "/").rpartition("/")[2]


def heading(result: Verification) -> str:
    """Which model on which images."""
    leaked = f", {result.leaked} of them used for calibration" if result.leaked else ""
    if result.leaked is None:
        leaked = ", unknown how many of them used for calibration"
    copies = f", {result.copies:,} more are copies of these" if result.copies else ""
    stopped = ""
    if result.sequential and result.images + result.copies + len(result.skipped) < result.listed:
        stopped = f" (stopped early, of {result.listed:,})"
    return f"{result.model} on {result.images:,} images of {result.data}{copies}{stopped}{leaked}"


def figures_of(row: Row, result: Verification) -> tuple[str, ...]:
    """A row's figures in the order of ``COLUMNS``; a dash where there is none."""
    fidelity = row.fidelity
    if fidelity is None:
        return ("-",) * len(COLUMNS)
    # Random weights have an accuracy that means nothing.
    accuracy = None if result.random_weights else fidelity.accuracy
    sqnr = "equal" if fidelity.sqnr_db is None else f"{fidelity.sqnr_db:.1f}"
    errors = (sqnr, f"{fidelity.cosine:.5f}", f"{fidelity.max_abs:.1e}")
    return (
        f"{accuracy.top1:.2f}" if accuracy else "-",
        f"{accuracy.top5:.2f}" if accuracy else "-",
        f"{fidelity.agreement:.2f}",
        # Those of the other images alone, or of none, would look like an artifact's.
        *(errors if fidelity.finite else ("NaN/inf",) * len(errors)),
    )


def _table(result: Verification) -> Table:
    table = Table(box=None, pad_edge=False)
    # A name of any length: only its own column may give way.
    table.add_column("artifact", overflow="fold")
    for title in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    if result.reference is not None:
        accuracy = (f"{result.reference.top1:.2f}", f"{result.reference.top5:.2f}")
        table.add_row("PyTorch", *accuracy, "", "", "", "", "reference")
    for name, row in zip(artifact_names(result), result.rows, strict=True):
        verdict = Text(row.verdict, style=_COLOURS[row.verdict])
        table.add_row(Text(name), *figures_of(row, result), verdict)
    return table


def baseline_lines(result: Verification) -> list[str]:
    """Whether PyTorch is as accurate as it is to be, and what may explain it if not."""
    baseline = result.baseline
    if result.random_weights or not result.labelled:
        return []
    causes = [
        f"{cause.gained:+.2f} points with {cause.what}" for cause in baseline.causes[:_SHOWN_CAUSES]
    ]
    return [f"baseline {baseline.status}: {baseline.sentence}", *causes]


def _indented(text: str, by: int = 2, style: str = "") -> Padding:
    """A sentence that stays indented where it is wrapped."""
    return Padding(Text(text, style), (0, 0, 0, by))


def verification_table(result: Verification) -> Group:
    """Verdict first, then the baseline, a row an artifact, what each verdict rests on, oddities.

    A report has the same order, see :mod:`clipdeploy.verification.reports`.
    """
    verdict = Text(verdict_line(result), style="bold")
    first, *causes = baseline_lines(result) or [""]
    baseline = [_indented(first)] if first else []
    baseline += [_indented(cause, 4) for cause in causes]
    named = zip(artifact_names(result), result.rows, strict=True)
    reasons = []
    for name, row in named:
        reasons.append(_indented(f"{name}: {row.reason}"))
        if row.repeats:
            reasons.append(_indented(row.repeats.sentence, 4))
    problems = [_indented(problem, style="yellow") for problem in result.problems]
    top: tuple[RenderableType, ...] = (verdict, Text(heading(result)), *baseline, Text(""))
    return Group(*top, _table(result), Text(""), *reasons, *problems)
