"""Runs the reference and the artifacts on the same images and records every image.

    shuffled images -> batches -> crops ─┬─ PyTorch, or cached logits ─────┬─ records -> file
                                         └─ runner of every artifact ──────┘
                                            repeated: alone, other sizes, each profile

The order of the images is random and fixed. Neighbours in a batch are of different classes, which
reveals an artifact that mixes up the images of a batch.
:mod:`clipdeploy.verification.verdicts` derives the verdicts from the records.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from clipdeploy.core.errors import ArtifactError, DatasetError, UsageError
from clipdeploy.core.locks import sole_writer
from clipdeploy.core.passport import Passport
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.core.spans import BATCH, THREADS, WORKERS, check_numbers, check_shard
from clipdeploy.engines.passport import library_versions
from clipdeploy.imaging import CropCache, ImageFolder
from clipdeploy.models.clips import clip_of_file
from clipdeploy.models.load import LoadedModel, LoadedText
from clipdeploy.runners import Runner
from clipdeploy.verification.batches import (
    DecodedBatch,
    ImageSource,
    Source,
    digest_of_entries,
    prefetched,
    shuffled,
)
from clipdeploy.verification.cached import CachedRecords, read_cached
from clipdeploy.verification.early_stop import EarlyStop
from clipdeploy.verification.leaks import Calibrated, calibration_of, refuse_leaks
from clipdeploy.verification.records import ImageId, Logits, measure_images
from clipdeploy.verification.reference import Reference
from clipdeploy.verification.repeats import Repeat, RepeatPlan, repeat_calls
from clipdeploy.verification.results import (
    ArtifactEntry,
    BatchResult,
    Results,
    ResultsWriter,
    RunKey,
    save_results,
)
from clipdeploy.verification.targets import Target, open_target
from clipdeploy.verification.texts import TextReference, TextSource
from clipdeploy.verification.verdicts import Limits
from exporters.samples import GraphSamples, Samples

__all__ = ["VerifyConfig", "run_text_verification", "run_verification"]


@dataclass(frozen=True)
class VerifyConfig:
    """How to run the images, and the largest drop allowed.

    ``max_drop``: percentage points of top-1 that an artifact may lose, ``max_drop_top5`` of top-5,
    None to leave top-5 out of the verdict. ``shard`` (i, n) runs only the i-th of n parts, for
    :func:`~clipdeploy.stages.verify.merge.merge_verification`. ``sequential`` stops as soon as
    every verdict is known. ``workers`` and ``cache`` are those of
    :func:`clipdeploy.imaging.iter_crops`; the cache keeps the reference's logits as well. ``trust``
    loads engines without a passport. ``threads``: CPU threads, 0 for PyTorch's default; shards can
    only be merged if they ran with the same number.

    Raises:
        UsageError: a drop, batch size or shard is out of range, or a shard is sequential.
    """

    max_drop: float = 1.0
    max_drop_top5: float | None = None
    batch: int = 16
    skip_unreadable: bool = False
    workers: int | None = None
    cache: CropCache | None = None
    shard: tuple[int, int] | None = None
    sequential: bool = False
    trust: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        Limits(self.max_drop, self.max_drop_top5)
        check_numbers(self, batch=BATCH, workers=WORKERS.or_none, threads=THREADS)
        check_shard(self.shard)
        if self.shard is not None and self.sequential:
            raise UsageError(
                "a shard cannot stop early: only all shards together have a verdict",
                hint="leave out --sequential or --shard",
            )

    @property
    def limits(self) -> Limits:
        """The largest drops allowed."""
        return Limits(self.max_drop, self.max_drop_top5)


@dataclass(frozen=True)
class _Lane:
    """A runner and its artifact."""

    target: Target
    entry: ArtifactEntry
    runner: Runner


@dataclass(frozen=True)
class _Opened:
    """The reference and the runners that process a batch."""

    run_key: RunKey
    reference: Reference | TextReference
    lanes: tuple[_Lane, ...]
    calibrated: Calibrated
    allow_leak: bool

    def prepare(self, batch: DecodedBatch) -> GraphSamples | None:
        """Return the input of a batch, normalised if any artifact takes normalised input."""
        if not batch.crops:
            return None
        samples = batch.samples(self.run_key.preprocess)
        floats = any(lane.target.passport.input.dtype != "uint8" for lane in self.lanes)
        if floats and isinstance(samples, Samples):
            _ = samples.pixels
        return samples

    def record(
        self,
        batch: DecodedBatch,
        samples: GraphSamples | None,
        artifacts: Collection[ArtifactEntry],
    ) -> BatchResult:
        """Run ``artifacts`` on a batch; return its records and repeated calls."""
        lanes = [lane for lane in self.lanes if lane.entry in artifacts]
        crops = batch.crops
        if samples is None:
            return BatchResult(batch.number, (), batch.unreadable, ((),) * len(lanes))
        leaks = self.calibrated.leaks(crops)
        if not self.allow_leak:
            refuse_leaks(leaks)
        reference = self.reference([crop.sha256 for crop in crops], samples)
        answers = [self._run(lane, batch.number, samples, reference) for lane in lanes]
        records = measure_images(
            [ImageId(crop.entry.name, crop.sha256, *crop.fingerprint) for crop in crops],
            [crop.entry.label for crop in crops] if self.run_key.labelled else [None] * len(crops),
            [leak for _, leak in leaks],
            reference,
            [logits for logits, _ in answers],
            self._kept(batch.number),
        )
        repeats = tuple(repeats for _, repeats in answers)
        return BatchResult(batch.number, tuple(records), batch.unreadable, repeats)

    def _kept(self, number: int) -> bool | None:
        """Whether the embeddings of a batch are kept for the search; None for logits."""
        if self.run_key.task != "embedding":
            return None
        return self.run_key.keeps_embeddings(number)

    def _run(
        self, lane: _Lane, number: int, samples: GraphSamples, reference: Logits
    ) -> tuple[Logits, tuple[Repeat, ...]]:
        """Return an artifact's logits of a batch, and its repeated calls."""
        images = samples.as_input(lane.target.passport.input)
        # A copy: a runner may use the same memory for its next answer.
        logits, wanted = np.array(lane.runner(images)), (len(images), self.run_key.classes)
        if logits.shape != wanted:
            raise ArtifactError(
                f"{lane.target.path} gave logits of shape {logits.shape}, not {wanted}",
                hint="build it again: it was not made from this model",
            )
        plan = RepeatPlan(self.run_key.batches, self.run_key.batch)
        calls = plan.calls(number, len(images), lane.runner)
        name = str(lane.target.path)
        return logits, repeat_calls(lane.runner, name, images, logits, reference, calls)


def _run_key(
    model: LoadedModel | LoadedText,
    passport: Passport,
    source: Source,
    config: VerifyConfig,
    calibrated: Calibrated,
) -> RunKey:
    images = source.listed
    weights, recipe = (
        (model.weights, model.recipe)
        if isinstance(model, LoadedModel)
        else (passport.weights, passport.recipe)
    )
    made_of = weights.zero_shot
    clip = made_of and clip_of_file(Path(made_of.checkpoint), made_of.sha256)
    return RunKey(
        model=passport.model,
        weights=weights.identity,
        random_weights=weights.kind == "random",
        recipe=recipe,
        preprocess=passport.preprocess,
        decoder=source.decoder,
        reference="",
        classes=passport.classes,
        class_names=images.origin.class_names or passport.class_names,
        partial_classes=images.origin.partial,
        artifacts=(),
        images=len(images.entries),
        labelled=images.labelled,
        entries=digest_of_entries(images),
        contents=source.contents(),
        problems=(*source.problems(), *calibrated.problems),
        calibrated=calibrated.digest,
        batch=config.batch,
        sequential=config.max_drop if config.sequential else None,
        threads=config.threads or torch.get_num_threads(),
        versions=library_versions(),
        task=passport.task,
        tower=passport.tower,
        clip=None if made_of is None else clip.name if clip else "",
        prompts=made_of.prompts_sha256 if made_of else "",
    )


def _open(
    model: LoadedModel | LoadedText,
    targets: Sequence[Target],
    run_key: RunKey,
    config: VerifyConfig,
    calibrated: Calibrated,
    allow_leak: bool,
    stack: ExitStack,
) -> _Opened:
    lanes, artifacts = [], []
    for target in targets:
        runner, entry = open_target(target, trust=config.trust, threads=run_key.threads)
        entry = replace(entry, calibration=calibration_of(target, calibrated))
        artifacts.append(entry)
        if runner is not None:
            stack.callback(runner.close)
            lanes.append(_Lane(target, entry, runner))
    reference = (
        Reference(model, run_key.preprocess, config.cache, run_key.threads)
        if isinstance(model, LoadedModel)
        else TextReference(model, run_key.threads)
    )
    stack.callback(reference.close)
    asked_for = replace(run_key, artifacts=tuple(artifacts), reference=reference.name)
    # A leak matters only to calibrated artifacts, and random weights have no accuracy.
    harmless = run_key.random_weights or not any(entry.calibration for entry in artifacts)
    return _Opened(asked_for, reference, tuple(lanes), calibrated, allow_leak or harmless)


def run_verification(
    model: LoadedModel,
    passport: Passport,
    targets: Sequence[Target],
    images: ImageFolder,
    config: VerifyConfig = VerifyConfig(),
    *,
    calibrated: Calibrated = Calibrated(),
    allow_leak: bool = False,
    keep: Path | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Results:
    """Return the records of all ``images``, or of one shard, in a fixed random order.

    Args:
        model: the reference.
        passport: the passport of the reference's graph; its preprocessing is used.
        calibrated: the images that artifacts were calibrated on.
        allow_leak: count calibration images instead of refusing them.
        keep: the results file. Unless ``force``, the results there are reused: of a killed or
            finished run, and of other runs for the artifacts that are the same.

    Raises:
        DatasetError: an image cannot be read, unless ``skip_unreadable``, or an artifact was
            calibrated on it.
        GraphError, ArtifactError: a graph cannot be loaded or does not match its passport.
        FileError: the results cannot be written, or another run is writing there.
        UsageError: ``sequential`` with images without labels.
    """
    if config.sequential and not images.labelled:
        raise UsageError(
            "images without labels have no verdict to stop at", hint="leave out --sequential"
        )
    source = ImageSource(
        shuffled(images),
        passport.preprocess,
        config.skip_unreadable,
        config.workers,
        config.cache,
    )
    return _verify(
        model,
        passport,
        targets,
        source,
        config,
        calibrated=calibrated,
        allow_leak=allow_leak,
        keep=keep,
        force=force,
        progress=progress,
    )


def run_text_verification(
    model: LoadedText,
    passport: Passport,
    targets: Sequence[Target],
    texts: TextSource,
    config: VerifyConfig = VerifyConfig(),
    *,
    keep: Path | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Results:
    """Return the records of all ``texts``, or of one shard, as :func:`run_verification`.

    ``model`` and ``passport`` are those of a text tower, and so are the ``targets``.

    Raises:
        ClipdeployError: see :func:`run_verification`.
    """
    return _verify(
        model,
        passport,
        targets,
        texts,
        config,
        calibrated=Calibrated(),
        allow_leak=False,
        keep=keep,
        force=force,
        progress=progress,
    )


def _verify(
    model: LoadedModel | LoadedText,
    passport: Passport,
    targets: Sequence[Target],
    source: Source,
    config: VerifyConfig,
    *,
    calibrated: Calibrated,
    allow_leak: bool,
    keep: Path | None,
    force: bool,
    progress: Progress,
) -> Results:
    images = source.listed
    run_key = _run_key(model, passport, source, config, calibrated)
    with ExitStack() as stack:
        stack.enter_context(sole_writer(keep, "clipdeploy verify") if keep else nullcontext())
        opened = _open(model, targets, run_key, config, calibrated, allow_leak, stack)
        stamps = source.stamps() if keep else ""
        wanted = Results(opened.run_key, str(images.root), (), stamps, config.shard)
        partial = keep.with_name(f"{keep.name}.partial") if keep else None
        known = CachedRecords(wanted)
        if keep and partial and not force:
            known = read_cached((keep, partial), wanted, images)
        run = _Run(opened, source, config, known)
        return run.finish(progress, keep, partial)


@dataclass(frozen=True)
class _Run:
    opened: _Opened
    source: Source
    config: VerifyConfig
    known: CachedRecords

    def _numbers(self) -> range:
        first, step = self.config.shard or (1, 1)
        return range(first - 1, self.opened.run_key.batches, step)

    def finish(self, progress: Progress, keep: Path | None, partial: Path | None) -> Results:
        """Run everything that is not known yet, and save the results in ``keep``."""
        known = self.known.results(self._numbers())
        self._refuse(known)
        stop = self._stopper()
        if stop:
            for count, batch in enumerate(known.batches, 1):
                if stop(batch):
                    return replace(known, batches=known.batches[:count])
        left = frozenset(self._numbers()) - known.done
        if not left:
            return known
        fresh = self._fresh(left, stop, progress)
        first = next(fresh)
        if keep is None or partial is None:
            return _joined(known, [first, *fresh])
        added = [first]
        with closing(ResultsWriter(partial, known)) as writer:
            writer.append(first)
            for batch in fresh:
                writer.append(batch)
                added.append(batch)
        found = _joined(known, added)
        both = self.known.with_others(found)
        if both is not found or known.batches:
            # In the order of the images, and with the other artifacts of earlier runs.
            save_results(partial, both)
        partial.replace(keep)
        return found

    def _refuse(self, known: Results) -> None:
        """Refuse reused records that this run's options do not allow.

        Raises:
            DatasetError: the records have unreadable images or leaks, which this run does not
                allow.
        """
        if not self.opened.allow_leak:
            refuse_leaks((record.name, record.leak) for record in known.records)
        if known.unreadable and not self.config.skip_unreadable:
            raise DatasetError(
                f"cannot read the image {known.unreadable[0]}",
                hint="repair or remove it, or pass --skip-unreadable",
            )

    def _stopper(self) -> Callable[[BatchResult], bool] | None:
        if not self.config.sequential:
            return None
        nothing = Results(self.opened.run_key, str(self.source.listed.root), ())
        return EarlyStop(nothing, self.config.limits).add

    def _fresh(
        self,
        left: Collection[int],
        stop: Callable[[BatchResult], bool] | None,
        progress: Progress,
    ) -> Iterator[BatchResult]:
        """Yield the batches that are not known yet, as they are finished."""
        run_key = self.opened.run_key
        total = sum(run_key.size(number) for number in left)
        with progress.task("verify", total) as advance:
            for batch, samples in prefetched(self._prepared(left)):
                yield (result := self._result(batch, samples))
                advance(run_key.size(batch.number))
                if stop and stop(result):
                    return

    def _result(self, batch: DecodedBatch, samples: GraphSamples | None) -> BatchResult:
        """Return a batch; run only the artifacts that are not known for it."""
        missing = self.known.missing(batch.number)
        result = self.known.completed(self.opened.record(batch, samples, missing), missing)
        if result is None:
            # The reference's answers have changed: the known records cannot be reused.
            return self.opened.record(batch, samples, self.opened.run_key.ran)
        return result

    def _prepared(
        self, numbers: Collection[int]
    ) -> Generator[tuple[DecodedBatch, GraphSamples | None]]:
        for batch in self.source.batches(self.config.batch, numbers):
            yield batch, self.opened.prepare(batch)


def _joined(known: Results, fresh: Sequence[BatchResult]) -> Results:
    batches = sorted((*known.batches, *fresh), key=lambda batch: batch.batch)
    return replace(known, batches=tuple(batches))
