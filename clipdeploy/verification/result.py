"""The result of a verification: what ``verify --json`` prints, and every report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clipdeploy.core.display import Renderable, Shown
from clipdeploy.verification.metrics import Accuracy, Fidelity
from clipdeploy.verification.paired import DropJudgement, Interval
from clipdeploy.verification.repeatability import Repeatability

__all__ = [
    "COLUMNS",
    "Baseline",
    "BaselineStatus",
    "Cause",
    "Disagreement",
    "Row",
    "Verdict",
    "Verification",
    "artifact_names",
    "baseline_lines",
    "heading",
    "metrics_of",
    "verdict_line",
    "verification_table",
]

VERIFICATION_SCHEMA = 2

Verdict = Literal["equivalent", "regressed", "undecided", "not judged", "not executed"]
BaselineStatus = Literal[
    "confirmed", "unconfirmed", "missed", "implausible", "unpublished", "skipped"
]


@dataclass(frozen=True)
class Cause:
    """Something that may explain a reference that misses its published accuracy.

    ``top1`` and ``gained`` are PyTorch's with it, in percent and points, on ``images`` of them.
    """

    what: str
    mend: str
    top1: float
    gained: float
    images: int


@dataclass(frozen=True)
class Baseline:
    """Whether PyTorch itself is as accurate as it is to be on these images.

    ``confirmed``: the ``published`` top-1 and top-5 lie within the intervals of what was found, and
    there are images enough for that to mean something; ``unconfirmed``: they are too few, or the
    whole validation set gives slightly other figures; ``missed``: a published figure lies outside;
    ``implausible``: PyTorch is no better than guessing; ``unpublished``: nothing to compare with;
    ``skipped``: the user asked for no comparison.  Only after ``missed`` and ``implausible`` no
    artifact is judged.  ``excludes`` is by how many points of top-1 a reference has to be worse for
    this check to notice it 19 times in 20, None if it never would or nothing was compared.
    ``causes`` are the usual ones, tried out, the likeliest first.
    """

    status: BaselineStatus
    sentence: str
    published_top1: float | None = None
    published_top5: float | None = None
    top1_interval: Interval | None = None
    top5_interval: Interval | None = None
    causes: tuple[Cause, ...] = ()
    excludes: float | None = None

    def __bool__(self) -> bool:
        return self.status not in ("missed", "implausible")


@dataclass(frozen=True)
class Disagreement:
    """An image of which reference and artifact give different first answers, as class indices.

    An answer is None where all logits are NaN.  ``max_abs`` is the largest difference of two
    logits, None where one is NaN or infinite.
    """

    name: str
    label: int | None
    reference: int | None
    artifact: int | None
    max_abs: float | None


@dataclass(frozen=True)
class Row:
    """One artifact's figures and verdict; ``reason`` is a sentence for every verdict.

    ``vouched`` is False for a graph without a passport; ``drop`` is of top-1, ``drop_top5`` of
    top-5.  ``repeats`` says whether it answered alike when it was asked again; ``calibrated`` is
    False for an artifact that no image was calibrated on, None if that is unknown.
    ``disagreements`` counts images with another first answer than PyTorch's, ``worst`` are those
    with the largest difference of logits.
    """

    artifact: str
    kind: str
    precision: str
    runner: str
    vouched: bool
    verdict: Verdict
    reason: str
    fidelity: Fidelity | None
    drop: DropJudgement | None
    disagreements: int
    worst: tuple[Disagreement, ...]
    drop_top5: DropJudgement | None = None
    repeats: Repeatability | None = None
    calibrated: bool | None = False


@dataclass(frozen=True)
class Verification(Shown):
    """The result: ``passed`` only if every row is equivalent; use it as a truth value.

    ``images`` different ones were judged, of ``listed``: ``copies`` more have the decoded pixels of
    one of these and count once with it, and of ``images`` themselves ``near_copies`` look nearly
    like another.  ``problems`` has a sentence for each thing that is odd about them; ``leaked``
    counts those that an artifact was calibrated on, ``near_leaked`` those that look nearly like
    one, both None if that is unknown.  ``reference`` is PyTorch's accuracy, None without labels and
    for random weights.  ``left_out`` are engines of judged graphs that were not judged themselves.
    ``max_drop_top5`` is None if top-5 was not judged.
    """

    model: str
    data: str
    images: int
    listed: int
    labelled: bool
    skipped: tuple[str, ...]
    problems: tuple[str, ...]
    leaked: int | None
    random_weights: bool
    class_names: tuple[str, ...]
    max_drop: float
    sequential: bool
    baseline: Baseline
    reference: Accuracy | None
    rows: tuple[Row, ...]
    passed: bool
    copies: int = 0
    near_copies: int = 0
    near_leaked: int | None = None
    max_drop_top5: float | None = None
    left_out: tuple[str, ...] = ()
    schema: int = VERIFICATION_SCHEMA

    def __bool__(self) -> bool:
        return self.passed

    def class_name(self, index: int) -> str:
        """What the class with this index is called; its number where it has no name."""
        return self.class_names[index] if index < len(self.class_names) else str(index)

    def __rich__(self) -> Renderable:
        return verification_table(self)


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


def metrics_of(row: Row, result: Verification) -> tuple[str, ...]:
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
        table.add_row(Text(name), *metrics_of(row, result), verdict)
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
