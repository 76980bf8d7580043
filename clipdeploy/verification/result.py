"""The result of a verification: what ``verify --json`` prints, and every report shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clipdeploy.core.display import Renderable, Shown
from clipdeploy.verification.metrics import Accuracy, Fidelity
from clipdeploy.verification.paired import DropJudgement, Interval
from clipdeploy.verification.repeatability import Repeatability

__all__ = [
    "Baseline",
    "BaselineStatus",
    "Cause",
    "Disagreement",
    "Row",
    "Verdict",
    "Verification",
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
        from clipdeploy.verification.table import verification_table

        return verification_table(self)
