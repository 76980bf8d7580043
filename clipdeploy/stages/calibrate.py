"""Images -> ``calibration.json``: which images, which shard, going on from an unfinished run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibration.collect import CalibrationImage, CollectConfig, collect
from calibration.table import (
    CalibrationImageRecord,
    CalibrationTable,
    load_table,
    merge_tables,
    save_table,
)
from clipdeploy.imaging import ImageFolder, Skipped, iter_crops, open_images, select
from clipdeploy.workspace import Workspace
from exporters.artifact import Passport
from exporters.errors import ArtifactError, DatasetError, UsageError
from exporters.files import file_errors, sha256_file
from exporters.progress import SILENT, Progress
from exporters.samples import Samples

__all__ = ["CalibrateConfig", "CalibrationArtifact", "calibrate_model", "merge_calibration"]

_DEFAULT_IMAGES = 512


@dataclass(frozen=True)
class CalibrateConfig:
    """``images``: how many, ``None`` for all up to 512; ``seed`` draws them.

    ``shard`` (i, n) observes only the i-th of n parts of them, for :func:`merge_calibration`.
    """

    images: int | None = None
    seed: int = 0
    skip_unreadable: bool = False
    shard: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise UsageError(
                "there is no shard {}/{}".format(*self.shard), hint="--shard 1/4 to --shard 4/4"
            )


@dataclass(frozen=True)
class CalibrationArtifact:
    """The table, where it lies, and the images that were skipped."""

    path: Path
    table: CalibrationTable
    skipped: tuple[str, ...]
    changed: bool


def _calibration_images(
    images: ImageFolder, passport: Passport, skipped: Skipped | None
) -> Iterator[CalibrationImage]:
    spec = passport.preprocess
    for crop in iter_crops(images, spec, skipped=skipped):
        image = Samples(crop.pixels[None], spec).as_input(passport.input)
        yield CalibrationImage(crop.entry.name, crop.sha256, image)


def _choose(data: Path, config: CalibrateConfig) -> ImageFolder:
    everything = open_images(data)
    folders = {entry.name.rpartition("/")[0] for entry in everything.entries}
    if len(folders) == 1 and "" not in folders and len(everything.entries) > 1:
        raise DatasetError(
            f"all images of {data} are of one class, {folders.pop()}",
            hint="calibrate with images of all classes, as they will be served",
        )
    count = config.images or min(len(everything.entries), _DEFAULT_IMAGES)
    chosen = select(everything, count, config.seed)
    if config.shard is None:
        return chosen
    first, parts = config.shard
    return ImageFolder(chosen.root, chosen.entries[first - 1 :: parts])


def calibrate_model(
    workspace: Workspace,
    model: str,
    data: Path,
    config: CalibrateConfig = CalibrateConfig(),
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> CalibrationArtifact:
    """Images -> ``calibration.json``, or one shard of it; an unfinished run is gone on with.

    Raises:
        ClipdeployError: see :mod:`exporters.errors`.
    """
    graph, passport = workspace.source(model)
    chosen = _choose(data, config)
    path = workspace.calibration(model, config.shard)
    wanted = _records(chosen)
    if not force and path.exists():
        table = load_table(path)
        if table.source_graph == sha256_file(graph) and table.images == wanted:
            return CalibrationArtifact(path, table, (), changed=False)
    skipped = Skipped() if config.skip_unreadable else None

    def rest(done: frozenset[CalibrationImageRecord]) -> Iterator[CalibrationImage]:
        names = {record.name for record in done}
        left = tuple(entry for entry in chosen.entries if entry.name not in names)
        return _calibration_images(ImageFolder(chosen.root, left), passport, skipped)

    partial = path.with_suffix(".partial")
    if force:
        with file_errors("remove", partial):
            partial.unlink(missing_ok=True)
    settings = CollectConfig(partial, shard=config.shard)
    table = save_table(collect(graph, rest, wanted, settings, progress), path)
    with file_errors("remove", partial):
        partial.unlink(missing_ok=True)
    return CalibrationArtifact(path, table, tuple(skipped.names if skipped else ()), changed=True)


def merge_calibration(
    workspace: Workspace, model: str, parts: Sequence[Path] = ()
) -> CalibrationArtifact:
    """Shards -> ``calibration.json``; without ``parts``, all shards of the workspace.

    Raises:
        ClipdeployError: a shard is missing, damaged, or of another run.
    """
    found = parts or sorted(workspace.folder(model).glob("calibration.*-of-*.json"))
    table = merge_tables([load_table(path) for path in found])
    graph, _ = workspace.source(model)
    if table.source_graph != sha256_file(graph):
        raise ArtifactError(
            f"the shards were not made from {graph}", hint="calibrate them again from this graph"
        )
    path = workspace.calibration(model)
    return CalibrationArtifact(path, save_table(table, path), (), changed=True)


def _records(images: ImageFolder) -> tuple[CalibrationImageRecord, ...]:
    reader = images.reader()
    try:
        return tuple(
            CalibrationImageRecord(entry.name, hashlib.sha256(reader.read(entry.name)).hexdigest())
            for entry in images.entries
        )
    finally:
        reader.close()
