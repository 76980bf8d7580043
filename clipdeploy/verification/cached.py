"""Reuses the records of earlier runs, artifact by artifact.

The next run may have more artifacts, fewer or others: without the engines, after a build, with
``--sequential``. If everything else that determines an image's records is the same, including the
state of the image files, the outcomes of an artifact with the same file and runner are reused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from clipdeploy.core.errors import ArtifactError
from clipdeploy.imaging import ImageFolder
from clipdeploy.verification.records import ImageRecord, Outcome
from clipdeploy.verification.repeats import Repeat
from clipdeploy.verification.results import ArtifactEntry, BatchResult, Results, read_results

__all__ = ["CachedRecords", "read_cached"]

Lane = tuple[tuple[Outcome, ...], tuple[Repeat, ...]]


def _common(results: Results) -> Results:
    """Return what must be equal in two runs that share records."""
    run_key = replace(results.run_key, artifacts=(), sequential=None)
    return replace(results, run_key=run_key, batches=())


class CachedRecords:
    """The records of ``found`` that fit the run key of ``wanted``, a run without batches."""

    def __init__(self, wanted: Results, found: Iterable[Results] = ()) -> None:
        self._wanted = wanted
        self._bases: dict[int, BatchResult] = {}
        self._lanes: dict[int, dict[ArtifactEntry, Lane]] = {}
        for results in found:
            for batch in results.batches:
                self._add(batch, results.run_key.ran)

    def _add(self, batch: BatchResult, artifacts: Sequence[ArtifactEntry]) -> None:
        base = _base(batch)
        if self._bases.setdefault(batch.batch, base) != base:
            return
        lanes = self._lanes.setdefault(batch.batch, {})
        for number, entry in enumerate(artifacts):
            outcomes = tuple(record.outcomes[number] for record in batch.records)
            lanes.setdefault(entry, (outcomes, batch.repeats[number]))

    def missing(self, number: int) -> tuple[ArtifactEntry, ...]:
        """Return the artifacts without known outcomes for batch ``number``."""
        lanes = self._lanes.get(number, {})
        return tuple(entry for entry in self._wanted.run_key.ran if entry not in lanes)

    def whole(self, number: int) -> BatchResult | None:
        """Return batch ``number`` with every artifact of the run, None if anything is not known."""
        base = self._bases.get(number)
        if base is None or self.missing(number):
            return None
        return self._with_lanes(base, self._lanes[number], self._wanted.run_key.ran)

    def completed(
        self, fresh: BatchResult, artifacts: Sequence[ArtifactEntry]
    ) -> BatchResult | None:
        """Add the known outcomes to a batch that was run for ``artifacts`` only.

        None if the batch differs from the known one in more than the artifacts.
        """
        base = _base(fresh)
        if self._bases.get(fresh.batch, base) != base:
            return None
        lanes = dict(self._lanes.get(fresh.batch, {}))
        for number, each in enumerate(artifacts):
            outcomes = tuple(record.outcomes[number] for record in fresh.records)
            lanes[each] = (outcomes, fresh.repeats[number])
        return self._with_lanes(base, lanes, self._wanted.run_key.ran)

    @staticmethod
    def _with_lanes(
        base: BatchResult, lanes: dict[ArtifactEntry, Lane], artifacts: Sequence[ArtifactEntry]
    ) -> BatchResult:
        chosen = [lanes[entry] for entry in artifacts]
        records = tuple(
            _with_outcomes(record, tuple(outcomes[at] for outcomes, _ in chosen))
            for at, record in enumerate(base.records)
        )
        return replace(base, records=records, repeats=tuple(repeats for _, repeats in chosen))

    def results(self, numbers: Iterable[int]) -> Results:
        """Return those of the batches with these numbers that are completely known."""
        batches = (self.whole(number) for number in sorted(numbers))
        return replace(self._wanted, batches=tuple(b for b in batches if b is not None))

    def with_others(self, results: Results) -> Results:
        """Add the artifacts of earlier runs to ``results`` of a finished run.

        Only artifacts with known outcomes for all of these images are added.
        """
        ours = set(results.run_key.artifacts)
        numbers = [batch.batch for batch in results.batches]
        everywhere = [set(self._lanes.get(number, {})) for number in numbers]
        others = set.intersection(*everywhere) - ours if everywhere else set()
        if not others or any(self._bases.get(b.batch) != _base(b) for b in results.batches):
            return results
        added = tuple(sorted(others, key=lambda entry: entry.artifact))
        both = CachedRecords(replace(results, batches=()), [results])
        for number in numbers:
            both._lanes[number].update({entry: self._lanes[number][entry] for entry in added})
        artifacts = (*results.run_key.artifacts, *added)
        run_key = replace(results.run_key, artifacts=artifacts)
        both._wanted = replace(both._wanted, run_key=run_key)
        return both.results(numbers)


def _with_outcomes(record: ImageRecord, outcomes: tuple[Outcome, ...]) -> ImageRecord:
    """Return the record with the outcomes replaced."""
    return msgspec.structs.replace(record, outcomes=outcomes)


def _base(batch: BatchResult) -> BatchResult:
    """Return a batch without any artifact."""
    records = tuple(_with_outcomes(record, ()) for record in batch.records)
    return replace(batch, records=records, repeats=())


def read_cached(paths: Iterable[Path], wanted: Results, images: ImageFolder) -> CachedRecords:
    """Read what earlier runs have recorded for the same run key and unchanged files.

    Files that are damaged, edited or of other images are ignored.
    """
    found = []
    for path in paths:
        if not path.exists() or not wanted.stamps:
            continue
        try:
            results = read_results(path)
        except ArtifactError:
            continue
        if _common(results) == _common(wanted) and _of_these(results, images):
            found.append(results)
    return CachedRecords(wanted, found)


def _of_these(results: Results, images: ImageFolder) -> bool:
    """Return whether every record is of an image that belongs to its batch, with the same class."""
    size, labelled = results.run_key.batch, results.run_key.labelled
    for batch in results.batches:
        entries = images.entries[batch.batch * size : (batch.batch + 1) * size]
        labels = {entry.name: entry.label if labelled else None for entry in entries}
        recorded = [(record.name, record.label) for record in batch.records]
        if any(name not in labels or labels[name] != label for name, label in recorded):
            return False
        if not labels.keys() >= set(batch.unreadable):
            return False
    return True
