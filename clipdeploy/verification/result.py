"""Defines the result of a verification: the content of ``verify --json`` and of every report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clipdeploy.core.display import Renderable, Shown
from clipdeploy.core.passport import Task, Tower
from clipdeploy.verification.metrics import NEIGHBOURS, Accuracy, Fidelity, Retrieval
from clipdeploy.verification.paired import DropJudgement, Interval
from clipdeploy.verification.repeatability import Repeatability
from clipdeploy.workspace.proof import ReferenceProof

__all__ = [
    "COLUMNS",
    "Baseline",
    "BaselineStatus",
    "Cause",
    "ClippedLinear",
    "Clipping",
    "Disagreement",
    "Row",
    "Verdict",
    "Verification",
    "artifact_names",
    "baseline_lines",
    "calibration_lines",
    "heading",
    "metrics_of",
    "proof_lines",
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
    """A possible cause of a reference that misses its published accuracy.

    ``top1`` (percent) is PyTorch's with this cause corrected and ``gained`` (points) the gain, both
    on ``images`` images.
    """

    what: str
    mend: str
    top1: float
    gained: float
    images: int


@dataclass(frozen=True)
class Baseline:
    """Whether PyTorch itself reaches its expected accuracy on these images.

    ``confirmed``: the ``published`` top-1 and top-5 are within the measured intervals, and the
    images are enough for that to be evidence; ``unconfirmed``: there are too few, or the whole
    validation set gives a slightly different accuracy; ``missed``: a published accuracy is outside
    its interval; ``implausible``: PyTorch is no better than guessing; ``unpublished``: there is
    nothing to compare with; ``skipped``: the user requested no comparison. Artifacts are not judged
    after ``missed`` and ``implausible``. ``excludes`` is the deficit in points of top-1 that this
    check detects in 19 of 20 cases, None if it detects none or nothing was compared. ``causes`` are
    the usual ones, each tried on these images, the likeliest first. ``top1`` (percent) was measured
    on ``images`` images; both are None if no accuracy was.
    """

    status: BaselineStatus
    sentence: str
    published_top1: float | None = None
    published_top5: float | None = None
    top1_interval: Interval | None = None
    top5_interval: Interval | None = None
    causes: tuple[Cause, ...] = ()
    excludes: float | None = None
    top1: float | None = None
    images: int | None = None

    def __bool__(self) -> bool:
        return self.status not in ("missed", "implausible")


@dataclass(frozen=True)
class Disagreement:
    """An image with different top-1 answers of reference and artifact, as class indices.

    An answer is None if all logits are NaN. ``max_abs`` is the largest difference of two logits,
    None if one is NaN or infinite.
    """

    name: str
    label: int | None
    reference: int | None
    artifact: int | None
    max_abs: float | None


@dataclass(frozen=True)
class ClippedLinear:
    """How much of the 8-bit input of the Linear ``name`` is clipped at the ends of its range.

    ``clipped``: percent of its values; ``lost``: the share of its energy (sum of squares), from 0
    to 1. ``calibration``: percent on calibration images, None if that was not measured.
    """

    name: str
    clipped: float
    lost: float
    calibration: float | None


@dataclass(frozen=True)
class Clipping:
    """The clipped inputs of an artifact's Linears on ``images`` of the images, most clipped first.

    ``cause`` is a sentence if the clipping is likely to change answers, else empty.
    """

    images: int
    linears: tuple[ClippedLinear, ...]
    cause: str = ""


@dataclass(frozen=True)
class Row:
    """The metrics and the verdict of one artifact; ``reason`` is a sentence for every verdict.

    ``vouched`` is False for a graph without a passport; ``drop`` is that of top-1, ``drop_top5`` of
    top-5. ``repeats``: whether repeated calls gave the same answers. ``calibrated`` is False for an
    artifact without calibration images, None if unknown. ``disagreements`` counts the images whose
    top-1 answer differs from PyTorch's, ``worst`` are those with the largest logit difference.
    ``retrieval`` is None for a classifier; an embedding model's ``drop`` is that of recall@10, and
    its disagreements have another nearest neighbour, as an index of the images that were searched.
    ``clipping`` is None without 8-bit inputs, or if they were not measured, for which
    ``clipping_unknown`` has the reason; an engine has that of its graph.
    ``calibration_findings``: what ``calibrate`` said against its images.
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
    retrieval: Retrieval | None = None
    clipping: Clipping | None = None
    clipping_unknown: str = ""
    calibration_findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verification(Shown):
    """The result: ``passed`` only if every row is equivalent; use it as a truth value.

    ``images`` distinct images were judged, of ``listed``. ``copies`` more have the same decoded
    pixels as one of these and are not counted again; of ``images``, ``near_copies`` look almost
    like another. ``problems`` has a sentence for each problem with the images. ``leaked`` counts
    the images that an artifact was calibrated on, ``near_leaked`` those that look almost like one;
    both are None if unknown. ``reference`` is PyTorch's accuracy, None without labels and for
    random weights. ``left_out`` are engines of judged graphs that were not judged themselves.
    ``max_drop_top5`` is None if top-5 was not judged. ``task`` is ``embedding`` if artifacts were
    judged by retrieval; ``max_drop`` is then in points of recall@10.  The images of a text
    ``tower`` are texts.  ``reference_proof`` says how the reference was proven, by this
    verification or earlier; None if the workspace has not the FP32 graph that was verified.
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
    task: Task = "classification"
    tower: Tower = "image"
    reference_proof: ReferenceProof | None = None
    schema: int = VERIFICATION_SCHEMA

    def __bool__(self) -> bool:
        return self.passed

    def __rich__(self) -> Renderable:
        return verification_table(self)


# The titles of metrics_of().
_ERRORS = ("SQNR dB", "cosine", "max abs")
COLUMNS: dict[Task, tuple[str, ...]] = {
    "classification": ("top-1 %", "top-5 %", "agree %", *_ERRORS),
    "embedding": ("R@10 %", "R@5 %", "R@1 %", *_ERRORS),
}


_COLOURS = {
    "equivalent": "green",
    "regressed": "red",
    "undecided": "yellow",
    "not judged": "yellow",
    "not executed": "yellow",
}
_SHOWN_CAUSES = 3


def verdict_line(result: Verification) -> str:
    """Return the verdict in one sentence: what was judged, and what was not."""
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
        what = "top-1" if result.task == "classification" else f"recall@{NEIGHBOURS}"
        return (
            f"EQUIVALENT: {' and '.join(judged)} "
            f"{'loses' if len(kinds) == 1 else 'lose'} no more than {result.max_drop:.2f} points "
            f"of {what}{f' and {top5:.2f} of top-5' if top5 is not None else ''}"
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
        return f"NOT JUDGED: the answers of {', '.join(unsteady)} are not repeatable"
    if not result.baseline:
        return f"NOT JUDGED: {result.baseline.sentence}"
    if result.random_weights:
        what = "logits" if result.task == "classification" else "embeddings"
        return f"NOT JUDGED: random weights have no accuracy; only {what} were compared"
    if any(row.verdict == "undecided" for row in bad):
        return f"UNDECIDED{_advice(result)}"
    return f"NOT PROVEN: {', '.join(f'{name} {row.verdict}' for name, row in names.items())}"


def _advice(result: Verification) -> str:
    """Return how many images may decide, by the test that allows several looks."""
    judged = [row.drop for row in result.rows if row.drop and row.verdict == "undecided"]
    needed = max((drop.images_needed or 0 for drop in judged), default=0)
    if not needed:
        return ""
    # A search needs all images at once.
    again = "" if result.sequential or result.task == "embedding" else " with --sequential"
    return f": about {needed:,} {result.tower}s{again} would decide"


def artifact_names(result: Verification) -> tuple[str, ...]:
    """Return a unique name for each row, such as ``int8 graph``.

    A file without a passport, or one of several of its kind, is named by its file name, or by its
    path if another has the same file name.
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
    """Return the model and its images in one line."""
    leaked = f", {result.leaked} of them used for calibration" if result.leaked else ""
    if result.leaked is None:
        leaked = ", unknown how many of them used for calibration"
    copies = f", {result.copies:,} more are copies of these" if result.copies else ""
    stopped = ""
    if result.sequential and result.images + result.copies + len(result.skipped) < result.listed:
        stopped = f" (stopped early, of {result.listed:,})"
    what = f"{result.images:,} {result.tower}s of {result.data}"
    return f"{result.model} on {what}{copies}{stopped}{leaked}"


def metrics_of(row: Row, result: Verification) -> tuple[str, ...]:
    """Return a row's metrics in the order of ``COLUMNS``; a dash for each that is missing."""
    fidelity = row.fidelity
    if fidelity is None:
        return ("-",) * len(COLUMNS[result.task])
    sqnr = "equal" if fidelity.sqnr_db is None else f"{fidelity.sqnr_db:.1f}"
    errors = (sqnr, f"{fidelity.cosine:.5f}", f"{fidelity.max_abs:.1e}")
    return (
        *_answer_metrics(row, fidelity, result),
        # Metrics of the remaining images would look like those of the artifact.
        *(errors if fidelity.finite else ("NaN/inf",) * len(errors)),
    )


def _answer_metrics(row: Row, fidelity: Fidelity, result: Verification) -> tuple[str, ...]:
    if result.task == "embedding":
        found = row.retrieval
        recalls = (found.recall10, found.recall5, found.recall1) if found else ()
        return tuple(f"{each:.2f}" for each in recalls) or ("-", "-", "-")
    # The accuracy of random weights is meaningless.
    accuracy = None if result.random_weights else fidelity.accuracy
    return (
        f"{accuracy.top1:.2f}" if accuracy else "-",
        f"{accuracy.top5:.2f}" if accuracy else "-",
        f"{fidelity.agreement:.2f}",
    )


def _table(result: Verification) -> Table:
    table = Table(box=None, pad_edge=False)
    # Names can be long: only this column may wrap.
    table.add_column("artifact", overflow="fold")
    for title in COLUMNS[result.task]:
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
    """Return the baseline's sentence, then the possible causes of a miss."""
    baseline = result.baseline
    compared = result.labelled or result.task == "embedding"
    if result.random_weights or not compared:
        return []
    causes = [
        f"{cause.gained:+.2f} points with {cause.what}" for cause in baseline.causes[:_SHOWN_CAUSES]
    ]
    return [f"baseline {baseline.status}: {baseline.sentence}", *causes]


def proof_lines(result: Verification) -> list[str]:
    """Return how the reference was proven before, or why it no longer is."""
    proof = result.reference_proof
    if proof is None or not (proof.by or proof.problem):
        return []
    if result.baseline.status == "confirmed" and not proof.problem:
        return []
    return [f"the reference is {proof.sentence}"]


def calibration_lines(row: Row) -> list[str]:
    """Return sentences on the ranges of an 8-bit artifact: what is clipped, and its images."""
    lines = [f"the calibration: {text}" for text in row.calibration_findings]
    found = row.clipping
    if found is None:
        unknown = f"8-bit inputs: not measured, {row.clipping_unknown}"
        return [unknown, *lines] if row.clipping_unknown else lines
    worst = found.linears[0]
    most = f"{worst.name} clips most, {worst.clipped:.2g} % of its values,"
    most = most if worst.clipped else "none clips a value"
    lines.insert(0, f"8-bit inputs: {most} on {found.images} of the images")
    if found.cause:
        what = "worth a look" if row.verdict == "equivalent" else "likely cause"
        lines.append(f"{what}: {found.cause}")
    return lines


def _indented(text: str, by: int = 2, style: str = "") -> Padding:
    """Indent a text, wrapped lines included."""
    return Padding(Text(text, style), (0, 0, 0, by))


def verification_table(result: Verification) -> Group:
    """Return verdict, baseline, a row per artifact, the reasons, and problems with the images.

    A report has the same order, see :mod:`clipdeploy.verification.reports`.
    """
    verdict = Text(verdict_line(result), style="bold")
    first, *causes = baseline_lines(result) or [""]
    baseline = [_indented(first)] if first else []
    baseline += [_indented(cause, 4) for cause in causes]
    baseline += [_indented(line) for line in proof_lines(result)]
    named = zip(artifact_names(result), result.rows, strict=True)
    reasons = []
    for name, row in named:
        reasons.append(_indented(f"{name}: {row.reason}"))
        if row.repeats:
            reasons.append(_indented(row.repeats.sentence, 4))
        reasons += [_indented(line, 4) for line in calibration_lines(row)]
    problems = [_indented(problem, style="yellow") for problem in result.problems]
    top: tuple[RenderableType, ...] = (verdict, Text(heading(result)), *baseline, Text(""))
    return Group(*top, _table(result), Text(""), *reasons, *problems)
