"""Judge artifacts against PyTorch on the same images.

It fails closed: an artifact that was not executed, random weights, images without labels and
logits that are not finite can each only lose the verdict ``equivalent``, never gain it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from clipdeploy.imaging import Crop, ImageFolder, Skipped, iter_crops
from clipdeploy.imaging.crops import CropCache
from clipdeploy.imaging.images import survey
from clipdeploy.imaging.survey import Reading
from clipdeploy.model import LoadedModel
from clipdeploy.runners import Runner, open_runner
from clipdeploy.runners.torch import TorchRunner
from clipdeploy.verification.paired import DropJudgement, judge_drop
from clipdeploy.verification.statistics import Fidelity, FidelityMeter
from exporters.artifact import Passport, Precision, Preprocess
from exporters.errors import DatasetError, EngineError, UsageError
from exporters.progress import SILENT, Progress
from exporters.samples import Samples

__all__ = ["Row", "Target", "Verification", "VerifyConfig", "verify_targets"]

Verdict = Literal["equivalent", "regressed", "undecided", "not judged", "not executed"]


@dataclass(frozen=True)
class VerifyConfig:
    """``max_drop``: percentage points of top-1 that an artifact may lose.

    ``workers`` and ``cache`` are those of :func:`clipdeploy.imaging.iter_crops`.
    """

    max_drop: float = 1.0
    batch: int = 16
    skip_unreadable: bool = False
    workers: int | None = None
    cache: CropCache | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop <= 100:
            raise UsageError(
                f"a largest drop of {self.max_drop} points", hint="--max-drop is 0 to 100"
            )


@dataclass(frozen=True)
class Target:
    """An artifact to judge; an engine names the graph it was compiled from."""

    path: Path
    kind: Literal["graph", "engine"]
    passport: Passport
    stand_in: Path | None = None

    @property
    def precision(self) -> Precision:
        """The artifact's precision."""
        return self.passport.precision


@dataclass(frozen=True)
class Row:
    """One artifact's figures and verdict; ``reason`` is a sentence for every verdict."""

    artifact: str
    kind: str
    precision: str
    runner: str
    verdict: Verdict
    reason: str
    fidelity: Fidelity | None
    drop: DropJudgement | None


@dataclass(frozen=True)
class Verification:
    """The result: ``passed`` only if every row is equivalent; use it as a truth value.

    ``problems`` has a sentence for each thing that is odd about the images; ``leaked`` counts
    images that an artifact was calibrated on, None if nobody can tell.
    """

    model: str
    data: str
    images: int
    labelled: bool
    skipped: tuple[str, ...]
    problems: tuple[str, ...]
    leaked: int | None
    random_weights: bool
    max_drop: float
    rows: tuple[Row, ...]
    passed: bool

    def __bool__(self) -> bool:
        return self.passed


def _open(target: Target) -> tuple[Runner | None, str]:
    try:
        return open_runner(target.path), ""
    except EngineError as error:
        stand_in = f"; {target.stand_in.name} was scored in its place" if target.stand_in else ""
        return None, f"{error.message}{stand_in}"


def judge(
    fidelity: Fidelity, *, random_weights: bool, max_drop: float
) -> tuple[Verdict, str, DropJudgement | None]:
    """The verdict on figures, the sentence that explains it, and what it rests on.

    It is on the interval of the paired drop, see :mod:`clipdeploy.verification.paired`: too few
    images leave it undecided.
    """
    if not fidelity.finite:
        return "regressed", "logits are NaN or infinite", None
    if random_weights:
        return "not judged", "random weights: logits only, accuracy means nothing", None
    if fidelity.drop is None:
        return "not judged", "images without labels: logits only", None
    drop = judge_drop(fidelity.lost, fidelity.gained, fidelity.images, max_drop)
    return drop.verdict, drop.sentence, drop


def _labels(crops: Sequence[Crop]) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
    labels = [crop.entry.label for crop in crops]
    return None if None in labels else np.asarray(labels, np.int64)


def _batches(
    images: ImageFolder, spec: Preprocess, config: VerifyConfig, skipped: Skipped, reading: Reading
) -> Iterator[list[Crop]]:
    batch: list[Crop] = []
    allowed = skipped if config.skip_unreadable else None
    crops = iter_crops(
        images,
        spec,
        skipped=allowed,
        workers=config.workers,
        cache=config.cache,
        reading=reading,
    )
    for crop in crops:
        batch.append(crop)
        if len(batch) == config.batch:
            yield batch
            batch = []
    if batch:
        yield batch


def _row(
    target: Target,
    runner: Runner | None,
    why_not: str,
    meter: FidelityMeter,
    reference: LoadedModel,
    config: VerifyConfig,
) -> Row:
    what = (str(target.path), target.kind, target.precision)
    if runner is None:
        return Row(*what, "", "not executed", why_not, None, None)
    fidelity = meter.result()
    random_weights = reference.weights.kind == "random"
    verdict, reason, drop = judge(fidelity, random_weights=random_weights, max_drop=config.max_drop)
    return Row(*what, runner.name, verdict, reason, fidelity, drop)


def _count_leaks(batch: Sequence[Crop], seen: frozenset[str], allow_leak: bool) -> int:
    leaks = [crop for crop in batch if crop.sha256 in seen]
    if leaks and not allow_leak:
        raise DatasetError(
            f"{leaks[0].entry.name} was used for calibration: it cannot judge the result",
            hint="verify with other images, or pass --allow-leak to count and show them",
        )
    return len(leaks)


def verify_targets(
    reference: LoadedModel,
    targets: Sequence[Target],
    images: ImageFolder,
    config: VerifyConfig = VerifyConfig(),
    progress: Progress = SILENT,
    *,
    seen: frozenset[str] | None = frozenset(),
    allow_leak: bool = False,
) -> Verification:
    """Run reference and artifacts over ``images`` and judge each artifact.

    ``seen`` holds the SHA-256 of images that an artifact was calibrated on, None if they are not
    known; with ``allow_leak`` they are counted, otherwise refused.

    Raises:
        DatasetError: an image that cannot be read, unless ``skip_unreadable``, or one of ``seen``.
        GraphError, ArtifactError: a graph that cannot be loaded or is not what it says.
    """
    opened = [(target, *_open(target)) for target in targets]
    meters = {target.path: FidelityMeter() for target in targets}
    skipped, reading = Skipped(), Reading()
    leaked = 0
    spec = targets[0].passport.preprocess
    runners = [(target, runner) for target, runner, _ in opened if runner is not None]
    try:
        with (
            TorchRunner(reference.module, spec) as torch_runner,
            progress.task("verify", len(images.entries)) as advance,
        ):
            for batch in _batches(images, spec, config, skipped, reading):
                samples = Samples(np.stack([crop.pixels for crop in batch]), spec)
                leaked += _count_leaks(batch, seen or frozenset(), allow_leak)
                expected = torch_runner(samples.pixels)
                labels = _labels(batch) if images.labelled else None
                for target, runner in runners:
                    logits = runner(samples.as_input(target.passport.input))
                    meters[target.path].add(logits, expected, labels)
                advance(len(batch))
    finally:
        for _, runner in runners:
            runner.close()
    rows = [
        _row(target, runner, why_not, meters[target.path], reference, config)
        for target, runner, why_not in opened
    ]
    return Verification(
        model=reference.card.name,
        data=str(images.root),
        images=len(images.entries) - len(skipped.names),
        labelled=images.labelled,
        skipped=tuple(skipped.names),
        problems=survey(images, reading).problems(),
        leaked=None if seen is None else leaked,
        random_weights=reference.weights.kind == "random",
        max_drop=config.max_drop,
        rows=tuple(rows),
        passed=bool(rows) and all(row.verdict == "equivalent" for row in rows),
    )
