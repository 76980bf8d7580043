"""Run the reference and artifacts over the same images and keep a record of each image.

    images -> batches -> crops ─┬─ PyTorch, or its logits from the cache ─┬─ records -> file
                                └─ every artifact's runner ───────────────┘

:mod:`clipdeploy.verification.verdicts` makes the verdicts from the records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipdeploy.engines.passport import library_versions
from clipdeploy.imaging import Crop, CropCache, ImageFolder, Reading, survey
from clipdeploy.model import LoadedModel
from clipdeploy.runners import Runner
from clipdeploy.verification.batches import (
    DecodedBatch,
    decoded_batches,
    digest_of_entries,
    digest_of_files,
    prefetched,
    shuffled,
)
from clipdeploy.verification.paired import SequentialDrop
from clipdeploy.verification.records import ImageRecord, measure_images
from clipdeploy.verification.reference import Reference
from clipdeploy.verification.results import (
    BatchResult,
    Question,
    Results,
    ResultsWriter,
    resume_results,
)
from clipdeploy.verification.targets import Target, open_target
from exporters.artifact import Passport
from exporters.errors import ArtifactError, DatasetError, UsageError
from exporters.progress import SILENT, Progress
from exporters.samples import Samples

__all__ = ["VerifyConfig", "run_verification"]

# The order of a sequential run is this seed's: the same in every run.
_SEQUENCE_SEED = 0


@dataclass(frozen=True)
class VerifyConfig:
    """How images are run, and when a drop is too large.

    ``max_drop``: percentage points of top-1 that an artifact may lose.  ``shard`` (i, n) runs only
    the i-th of n parts, for :func:`clipdeploy.stages.merge.merge_verification`.  ``sequential``
    takes the images in random order and stops as soon as every verdict is out.  ``workers`` and
    ``cache`` are those of :func:`clipdeploy.imaging.iter_crops`; the cache keeps the reference's
    logits as well.  ``trust`` loads engines that no passport vouches for.  ``threads`` compute on
    the CPU, 0 for as many as PyTorch takes; shards can only be joined if they had as many.

    Raises:
        UsageError: a drop, a batch or a shard that cannot be, or a shard that is sequential.
    """

    max_drop: float = 1.0
    batch: int = 16
    skip_unreadable: bool = False
    workers: int | None = None
    cache: CropCache | None = None
    shard: tuple[int, int] | None = None
    sequential: bool = False
    trust: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop <= 100:
            raise UsageError(
                f"a largest drop of {self.max_drop} points", hint="--max-drop is 0 to 100"
            )
        if self.batch < 1:
            raise UsageError(f"a batch of {self.batch} images", hint="1 or more")
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise UsageError(
                "there is no shard {}/{}".format(*self.shard), hint="--shard 1/4 to --shard 4/4"
            )
        if self.shard is not None and self.sequential:
            raise UsageError(
                "a shard cannot stop early: only all of them together have a verdict",
                hint="leave out --sequential or --shard",
            )


@dataclass(frozen=True)
class _Opened:
    """Everything that a batch passes through."""

    question: Question
    reference: Reference
    lanes: tuple[tuple[Target, Runner], ...]
    seen: frozenset[str]

    def prepare(self, batch: DecodedBatch) -> Samples | None:
        """The input of a batch, normalised where anybody will want it so."""
        if not batch.crops:
            return None
        samples = batch.samples(self.question.preprocess)
        if any(target.passport.input.dtype != "uint8" for target, _ in self.lanes):
            _ = samples.pixels
        return samples

    def record(
        self, batch: DecodedBatch, samples: Samples | None, *, allow_leak: bool
    ) -> BatchResult:
        """What everybody makes of a batch."""
        crops = batch.crops
        if samples is None:
            return BatchResult(batch.number, (), batch.unreadable)
        leaked = [crop.sha256 in self.seen for crop in crops]
        if any(leaked) and not allow_leak:
            _refuse_leak(crops[leaked.index(True)])
        records = measure_images(
            [(crop.entry.name, crop.sha256) for crop in crops],
            [crop.entry.label for crop in crops] if self.question.labelled else [None] * len(crops),
            leaked,
            self.reference([crop.sha256 for crop in crops], samples),
            self._logits(samples, len(crops)),
        )
        return BatchResult(batch.number, tuple(records), batch.unreadable)

    def _logits(self, samples: Samples, count: int) -> list[np.ndarray[Any, Any]]:
        shape = (count, self.question.classes)
        found = []
        for target, runner in self.lanes:
            logits = runner(samples.as_input(target.passport.input))
            if logits.shape != shape:
                raise ArtifactError(
                    f"{target.path} gave logits of shape {logits.shape}, not {shape}",
                    hint="it is no classifier of this model: build it again",
                )
            found.append(logits)
        return found


def _refuse_leak(crop: Crop) -> None:
    raise DatasetError(
        f"{crop.entry.name} was used for calibration: it cannot judge the result",
        hint="verify with other images, or pass --allow-leak to count and show them",
    )


def _question(
    model: LoadedModel,
    passport: Passport,
    images: ImageFolder,
    config: VerifyConfig,
    seen: frozenset[str] | None,
) -> Question:
    calibrated = None
    if seen is not None:
        calibrated = hashlib.sha256("".join(sorted(seen)).encode()).hexdigest()
    return Question(
        model=model.card.name,
        weights=model.weights.identity,
        random_weights=model.weights.kind == "random",
        recipe=model.recipe,
        preprocess=passport.preprocess,
        reference="",
        classes=passport.classes,
        class_names=passport.class_names,
        artifacts=(),
        images=len(images.entries),
        labelled=images.labelled,
        entries=digest_of_entries(images),
        problems=survey(images).problems(),
        calibrated=calibrated,
        batch=config.batch,
        sequential=config.max_drop if config.sequential else None,
        threads=config.threads or torch.get_num_threads(),
        versions=library_versions(),
    )


def _open(
    model: LoadedModel,
    targets: Sequence[Target],
    question: Question,
    config: VerifyConfig,
    seen: frozenset[str] | None,
    stack: ExitStack,
) -> _Opened:
    lanes, artifacts = [], []
    for target in targets:
        runner, asked = open_target(target, trust=config.trust, threads=question.threads)
        artifacts.append(asked)
        if runner is not None:
            stack.callback(runner.close)
            lanes.append((target, runner))
    reference = Reference(model, question.preprocess, config.cache, question.threads)
    stack.callback(reference.close)
    # What a foreign INT8 graph was calibrated on is anybody's guess.
    if any(target.precision.startswith("int8") and not target.vouched for target in targets):
        question = replace(question, calibrated=None)
    asked_for = replace(question, artifacts=tuple(artifacts), reference=reference.name)
    return _Opened(asked_for, reference, tuple(lanes), seen or frozenset())


class _EarlyStop:
    """Whether a sequential run has every verdict that it can have."""

    def __init__(self, artifacts: int, max_drop: float) -> None:
        self._drops = [SequentialDrop(max_drop) for _ in range(artifacts)]

    def add(self, records: Sequence[ImageRecord]) -> bool:
        """One batch; True as soon as the verdict on every artifact is out."""
        right = np.asarray([record.reference.right() for record in records], bool)
        for number, drop in enumerate(self._drops):
            ours = [record.outcomes[number].answer.right() for record in records]
            drop.add(right, np.asarray(ours, bool))
        return bool(self._drops) and all(drop.verdict() != "undecided" for drop in self._drops)


def run_verification(
    model: LoadedModel,
    passport: Passport,
    targets: Sequence[Target],
    images: ImageFolder,
    config: VerifyConfig = VerifyConfig(),
    *,
    seen: frozenset[str] | None = frozenset(),
    allow_leak: bool = False,
    keep: Path | None = None,
    force: bool = False,
    reading: Reading | None = None,
    progress: Progress = SILENT,
) -> Results:
    """Records of all ``images``, or of one shard of them.

    Args:
        model: the reference.
        passport: the reference's graph's; it says how images become its input.
        seen: SHA-256 of the images that an artifact was calibrated on, None if nobody knows them.
        allow_leak: count those instead of refusing them.
        keep: where the results are kept.  A run that was killed, or has already been done, is gone
            on with there, unless ``force``.

    Raises:
        DatasetError: an image that cannot be read, unless ``skip_unreadable``, or one of ``seen``.
        GraphError, ArtifactError: a graph that cannot be loaded or is not what it says.
        FileError: the results cannot be kept.
        UsageError: ``sequential`` on images without labels.
    """
    if config.sequential:
        if not images.labelled:
            raise UsageError(
                "without labels no verdict comes out, early or late", hint="leave out --sequential"
            )
        images = shuffled(images, _SEQUENCE_SEED)
    question = _question(model, passport, images, config, seen)
    with ExitStack() as stack:
        opened = _open(model, targets, question, config, seen, stack)
        stamps = digest_of_files(images) if keep else ""
        wanted = Results(opened.question, str(images.root), (), stamps, config.shard)
        partial = keep.with_name(f"{keep.name}.partial") if keep else None
        known = wanted
        if keep and partial and not force:
            known = resume_results((keep, partial), wanted)
        fresh = _Run(opened, images, config, allow_leak, reading).batches(known, progress)
        if keep is None or partial is None:
            return replace(known, batches=(*known.batches, *fresh))
        return _keep(keep, partial, known, fresh)


def _keep(keep: Path, partial: Path, known: Results, fresh: Iterator[BatchResult]) -> Results:
    first = next(fresh, None)
    if first is None:
        return known
    added = [first]
    with closing(ResultsWriter(partial, known)) as writer:
        writer.append(first)
        for batch in fresh:
            writer.append(batch)
            added.append(batch)
    partial.replace(keep)
    return replace(known, batches=(*known.batches, *added))


@dataclass(frozen=True)
class _Run:
    opened: _Opened
    images: ImageFolder
    config: VerifyConfig
    allow_leak: bool
    reading: Reading | None

    def _numbers(self) -> range:
        first, step = self.config.shard or (1, 1)
        return range(first - 1, self.opened.question.batches, step)

    def _stopper(self) -> _EarlyStop | None:
        if not self.config.sequential:
            return None
        return _EarlyStop(len(self.opened.lanes), self.config.max_drop)

    def batches(self, known: Results, progress: Progress) -> Iterator[BatchResult]:
        """The batches that are not known yet, as they get done."""
        stop = self._stopper()
        if stop and any(stop.add(batch.records) for batch in known.batches):
            return
        left = frozenset(self._numbers()) - known.done
        if not left:
            return
        total = sum(self._size(number) for number in left)
        with progress.task("verify", total) as advance:
            for batch, samples in prefetched(self._prepared(left)):
                result = self.opened.record(batch, samples, allow_leak=self.allow_leak)
                yield result
                advance(self._size(batch.number))
                if stop and stop.add(result.records):
                    return

    def _size(self, number: int) -> int:
        return min(self.config.batch, len(self.images.entries) - number * self.config.batch)

    def _prepared(self, numbers: Collection[int]) -> Generator[tuple[DecodedBatch, Samples | None]]:
        for batch in decoded_batches(
            self.images,
            self.opened.question.preprocess,
            self.config.batch,
            numbers,
            skip_unreadable=self.config.skip_unreadable,
            workers=self.config.workers,
            cache=self.config.cache,
            reading=self.reading,
        ):
            yield batch, self.opened.prepare(batch)
