"""Builds the contents of a report, texts and numbers, before it becomes HTML or Markdown.

Both formats show the same texts in the same order. Nothing is escaped here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from clipdeploy.core.passport import Task
from clipdeploy.models import cards
from clipdeploy.verification.metrics import NEIGHBOURS, Accuracy
from clipdeploy.verification.paired import DropJudgement, Interval
from clipdeploy.verification.records import Answer as RecordedAnswer
from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.reports.evidence import (
    Disagreeing,
    Spread,
    disagreeing_of,
    spread_of,
    worst_images,
)
from clipdeploy.verification.reports.provenance import provenance
from clipdeploy.verification.result import (
    COLUMNS,
    ClippedLinear,
    Row,
    Verification,
    artifact_names,
    baseline_lines,
    calibration_lines,
    heading,
    metrics_of,
    proof_lines,
    verdict_line,
)
from clipdeploy.verification.results import Results
from clipdeploy.verification.retrieval import with_retrieval

__all__ = ["Answer", "Contents", "Line", "Tone", "Worst", "contents_of", "tone_of"]

Tone = Literal["good", "bad", "open", ""]

_MOST, _LEAST = 24, 6
_MOST_CLIPPED = 8
_DROP = "drop, points"
_NO_ANSWER = "NaN or infinite"
# Of the intervals of metrics.accuracy_of(); the baseline's are 99 % and labelled so.
_ACCURACY_LEVEL = "95 %"


@dataclass(frozen=True)
class Line:
    """A line of the table: a value and a smaller detail in each column.

    ``repeats`` is the sentence about the repeated calls, ``ranges`` those about the 8-bit ranges.
    """

    artifact: str
    runner: str
    cells: tuple[tuple[str, str], ...]
    verdict: str
    tone: Tone
    reason: str
    repeats: str = ""
    ranges: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The class that PyTorch or an artifact gives an image; ``right`` is None without a label.

    ``same`` is True for an artifact's answer that equals PyTorch's.
    """

    who: str
    text: str
    right: bool | None
    detail: str = ""
    same: bool = False


@dataclass(frozen=True)
class Worst:
    """An image with a large error, and the answers to it: PyTorch's first."""

    name: str
    label: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Contents:
    """The contents of a report, section by section."""

    title: str
    tone: Tone
    verdict: str
    sentence: str
    heading: str
    baseline: tuple[str, ...]
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    problems: tuple[str, ...]
    spreads: Mapping[str, Spread]
    disagreeing: Mapping[str, Disagreeing]
    drops: Mapping[str, tuple[DropJudgement, Tone]]
    max_drop: float
    labelled: bool
    sequential: bool
    clipped: Mapping[str, tuple[ClippedLinear, ...]]
    worst: tuple[Worst, ...]
    provenance: tuple[tuple[str, str], ...]
    task: Task = "classification"

    @property
    def embeds(self) -> bool:
        """Whether the outputs are embeddings."""
        return self.task == "embedding"

    @property
    def output(self) -> str:
        """What an artifact gives for an image."""
        return "embedding" if self.embeds else "logits"

    @property
    def outputs(self) -> str:
        """What an artifact gives for images."""
        return "embeddings" if self.embeds else "logits"

    @property
    def judged(self) -> str:
        """The metric whose drop is judged."""
        return f"recall@{NEIGHBOURS}" if self.embeds else "top-1"


def tone_of(verdict: str) -> Tone:
    """Return ``good`` for equivalent, ``bad`` for regressed, ``open`` if nothing is proven."""
    tones: dict[str, Tone] = {"equivalent": "good", "regressed": "bad"}
    return tones.get(verdict.lower(), "open")


def contents_of(results: Results, result: Verification) -> Contents:
    """Return the contents of the report on a verification and its records."""
    results = with_retrieval(results)
    names = artifact_names(result)
    rows = list(zip(names, result.rows, results.run_key.artifacts, strict=True))
    # The records have the outcomes of the artifacts that ran, in this order.
    ran = [(name, row) for name, row, entry in rows if entry.runner]
    lanes = [name for name, _ in ran]
    records = results.records
    verdict, _, sentence = verdict_line(result).partition(": ")
    judged = result.labelled and not result.random_weights
    embeds = result.task == "embedding"
    words = _class_words(results.run_key.class_names if embeds else result.class_names)
    columns = COLUMNS[result.task]
    return Contents(
        title=f"{verdict}: {result.model}",
        tone=tone_of(verdict),
        verdict=verdict,
        sentence=sentence,
        heading=heading(result),
        baseline=(*baseline_lines(result), *proof_lines(result)),
        columns=(*columns[:2], _DROP, *columns[2:]),
        lines=(*_reference(result), *(_line(name, row, result) for name, row, _ in rows)),
        problems=result.problems,
        spreads={name: spread_of(records, lane) for lane, name in enumerate(lanes)},
        disagreeing={name: disagreeing_of(records, lane) for lane, name in enumerate(lanes)},
        drops={name: (row.drop, tone_of(row.verdict)) for name, row in ran if row.drop is not None},
        max_drop=result.max_drop,
        labelled=judged,
        sequential=result.sequential,
        clipped={
            name: row.clipping.linears[:_MOST_CLIPPED]
            for name, row, _ in rows
            if row.clipping is not None
        },
        worst=tuple(
            _worst(record, lanes, words, judged=judged)
            for record in worst_images(records, _MOST, _LEAST)
        ),
        provenance=provenance(results, result.reference_proof),
        task=result.task,
    )


def _between(interval: Interval, sign: str = "") -> str:
    return f"{interval.low:{sign}.2f} to {interval.high:{sign}.2f}"


def _accuracies(accuracy: Accuracy | None) -> tuple[str, str]:
    if accuracy is None:
        return "", ""
    intervals = (accuracy.top1_interval, accuracy.top5_interval)
    one, five = (f"{_ACCURACY_LEVEL}: {_between(interval)}" for interval in intervals)
    return one, five


def _intervals(row: Row, result: Verification) -> tuple[str, str]:
    if row.retrieval is not None:
        return f"{_ACCURACY_LEVEL}: {_between(row.retrieval.interval)}", ""
    return _accuracies(
        row.fidelity.accuracy if row.fidelity and not result.random_weights else None
    )


def _reference(result: Verification) -> list[Line]:
    found = result.reference
    if found is None:
        return []
    values = (f"{found.top1:.2f}", f"{found.top5:.2f}")
    cells = tuple(zip(values, _accuracies(found), strict=True))
    blank = (("", ""),) * (len(COLUMNS[result.task]) - 1)
    return [Line("PyTorch", "", (*cells, *blank), "reference", "", "")]


def _line(name: str, row: Row, result: Verification) -> Line:
    details = (*_intervals(row, result), *("",) * (len(COLUMNS[result.task]) - 2))
    first, second, *others = zip(metrics_of(row, result), details, strict=True)
    return Line(
        name,
        row.runner,
        (first, second, _drop(row), *others),
        row.verdict,
        tone_of(row.verdict),
        row.reason,
        row.repeats.sentence if row.repeats else "",
        tuple(calibration_lines(row)),
    )


def _drop(row: Row) -> tuple[str, str]:
    found = row.drop
    if found is None:
        return "-", ""
    return (
        f"{found.drop:+z.2f}",
        f"{100 * found.confidence:g} %: {_between(found.interval, '+z')}, "
        f"p\N{NO-BREAK SPACE}{found.p_value:.2g}",
    )


def _class_words(names: Sequence[str]) -> tuple[str, ...]:
    """Return readable class names: ``tench (n01440764)`` for a wnid, else the class itself."""
    words = dict(cards.imagenet_classes())
    return tuple(
        f"{words[name].partition(',')[0]} ({name})" if name in words else name for name in names
    )


def _worst(
    record: ImageRecord, lanes: Sequence[str], words: Sequence[str], *, judged: bool
) -> Worst:
    def word(index: int | None) -> str:
        if index is None:
            return _NO_ANSWER
        return words[index] if index < len(words) else str(index)

    def right(answer: RecordedAnswer) -> bool | None:
        return answer.right() if judged and record.label is not None else None

    first = record.reference.first
    answers = [Answer("PyTorch", word(first), right(record.reference))]
    for lane, outcome in zip(lanes, record.outcomes, strict=True):
        top, well = outcome.answer.first, right(outcome.answer)
        if outcome.max_abs is None:
            # The largest of the remaining logits is not an answer.
            answers.append(Answer(lane, _NO_ANSWER, well))
        else:
            off = f"off by {outcome.max_abs:.2g}"
            answers.append(Answer(lane, word(top), well, off, top == first))
    label = "" if record.label is None else word(record.label)
    return Worst(record.name, label, tuple(answers))
