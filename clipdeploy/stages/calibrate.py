"""Images -> ``calibration.json``: which images, which shard, going on from an unfinished run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Group
from rich.text import Text

from calibration.collect import CalibrationImage, CollectConfig, collect
from calibration.images import check_images, image_warnings
from calibration.table import (
    CalibrationImageRecord,
    CalibrationTable,
    load_table,
    merge_tables,
    save_table,
)
from clipdeploy.core.display import Renderable, Shown, facts
from clipdeploy.core.errors import ArtifactError, DatasetError, UsageError
from clipdeploy.core.files import file_errors, sha256_file
from clipdeploy.core.locks import sole_writer
from clipdeploy.core.passport import Passport
from clipdeploy.core.paths import StrPath, as_path, as_paths
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.core.spans import IMAGES, SEED, THREADS, check_numbers, check_shard
from clipdeploy.imaging import ImageFolder, Skipped, iter_crops, open_images, select, survey
from clipdeploy.models.cards import takes_any_name
from clipdeploy.stages.cluster import ClusterConfig, Shard, ShardJob, shards_on_cluster
from clipdeploy.workspace.folder import Workspace
from exporters.samples import Samples

__all__ = [
    "FEW_IMAGES",
    "CalibrateConfig",
    "CalibrationArtifact",
    "calibrate_model",
    "choose_images",
    "is_calibrated",
    "merge_calibration",
]

# Fewer give the ranges of these images rather than those of the data.
FEW_IMAGES = 128
_DEFAULT_IMAGES = 512
# Of a cluster's shards: fewer are not worth the time that it takes to load a graph.
_SHARD_IMAGES = 8


@dataclass(frozen=True)
class CalibrateConfig:
    """``images``: how many, ``None`` for all up to 512; ``seed`` draws them.

    ``shard`` (i, n) observes only the i-th of n parts of them, for :func:`merge_calibration`.
    ``threads`` compute, 0 for ONNX Runtime's own choice.

    Raises:
        UsageError: a number that cannot be, or no such shard.
    """

    images: int | None = None
    seed: int = 0
    skip_unreadable: bool = False
    shard: tuple[int, int] | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, images=IMAGES.or_none, seed=SEED, threads=THREADS)
        check_shard(self.shard)


@dataclass(frozen=True)
class CalibrationArtifact(Shown):
    """The table, its path, and the images that were skipped.

    ``problems``: a sentence for each thing that is odd about the listed files, such as files that
    are no images.
    """

    path: Path
    table: CalibrationTable
    skipped: tuple[str, ...]
    changed: bool
    problems: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is unusual about the images."""
        return image_warnings(self.table)

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the images, a sentence each."""
        skipped = (f"skipped, unreadable: {name}" for name in self.skipped)
        return (*self.problems, *skipped, *self.warnings)

    def __rich__(self) -> Renderable:
        rows = [
            ("calibration", f"{self.path}: {len(self.table.images)} images"),
            ("made", "now" if self.changed else "before; nothing has changed since"),
            *(("unusual", warning) for warning in self.warnings),
            *(("skipped, unreadable", name) for name in self.skipped),
        ]
        return Group(facts(rows), Text(""), self.table)


def _calibration_images(
    images: ImageFolder, passport: Passport, skipped: Skipped | None
) -> Iterator[CalibrationImage]:
    spec = passport.preprocess
    for crop in iter_crops(images, spec, skipped=skipped):
        image = Samples(crop.pixels[None], spec).as_input(passport.input)
        yield CalibrationImage(crop.entry.name, crop.sha256, image, *crop.fingerprint, crop.pixels)


def choose_images(data: Path, config: CalibrateConfig) -> ImageFolder:
    """The images of ``data`` that a calibration with this ``config`` observes.

    Raises:
        DatasetError: there are too few, or they are of one class.
    """
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


@takes_any_name
def calibrate_model(
    workspace: Workspace,
    model: str,
    data: StrPath,
    config: CalibrateConfig = CalibrateConfig(),
    *,
    cluster: ClusterConfig | None = None,
    keep: StrPath | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> CalibrationArtifact:
    """Images -> ``calibration.json``, or one shard of it; an unfinished run is gone on with.

    The table is kept in ``keep``, by default in the workspace.  A ``cluster`` observes the images
    in shards; the table is the same to the bit.

    Raises:
        ClipdeployError: see :mod:`clipdeploy.core.errors`.
    """
    data = Path(data)
    keep = as_path(keep)
    if cluster is not None and config.shard:
        raise UsageError("a cluster cuts the shards itself", hint="leave out --shard or --ray")
    graph, passport = workspace.source(model)
    chosen = choose_images(data, config)
    odd = survey(chosen).problems()
    path = keep or workspace.calibration(model, config.shard)
    wanted = _records(chosen)
    if not force and path.exists():
        table = load_table(path)
        if table.source_graph == sha256_file(graph) and _has_all(table, wanted):
            return CalibrationArtifact(path, table, (), changed=False, problems=odd)
    if cluster is not None:
        job = _cluster_job(workspace, model, data, config, len(chosen.entries))
        with shards_on_cluster(cluster, job, force=force, progress=progress) as parts:
            return _with_skipped(merge_calibration(workspace, model, parts), chosen)
    skipped = Skipped() if config.skip_unreadable else None

    def rest(done: frozenset[CalibrationImageRecord]) -> Iterator[CalibrationImage]:
        names = {record.name for record in done}
        left = tuple(entry for entry in chosen.entries if entry.name not in names)
        return _calibration_images(ImageFolder(chosen.root, left), passport, skipped)

    unfinished = path.with_suffix(".partial")
    with sole_writer(path, "clipdeploy calibrate"):
        if force:
            with file_errors("remove", unfinished):
                unfinished.unlink(missing_ok=True)
        settings = CollectConfig(unfinished, shard=config.shard, threads=config.threads)
        table = collect(graph, rest, wanted, settings, progress)
        if config.shard is None:
            check_images(table)
        table = save_table(table, path)
        with file_errors("remove", unfinished):
            unfinished.unlink(missing_ok=True)
    names = tuple(skipped.names if skipped else ())
    return CalibrationArtifact(path, table, names, changed=True, problems=odd)


@takes_any_name
def is_calibrated(workspace: Workspace, model: str) -> bool:
    """Whether the workspace has a table, of whichever images, of the graph that is there now.

    Raises:
        ClipdeployError: the graph or the table cannot be read.
    """
    graph, _ = workspace.source(model)
    path = workspace.calibration(model)
    return path.exists() and load_table(path).source_graph == sha256_file(graph)


def _cluster_job(
    workspace: Workspace, model: str, data: Path, config: CalibrateConfig, images: int
) -> ShardJob:
    return ShardJob(
        title=f"calibrate with {images} images",
        run=partial(_one_shard, workspace, model, data, config),
        file=partial(workspace.calibration, model),
        most=max(1, images // _SHARD_IMAGES),
        reads=(workspace.folder(model), data),
        threads=config.threads,
    )


def _one_shard(
    workspace: Workspace,
    model: str,
    data: Path,
    config: CalibrateConfig,
    shard: Shard,
    threads: int,
    keep: Path,
) -> None:
    config = replace(config, shard=shard, threads=threads)
    calibrate_model(workspace, model, data, config, keep=keep)


def _with_skipped(merged: CalibrationArtifact, chosen: ImageFolder) -> CalibrationArtifact:
    used = {image.name for image in merged.table.images}
    skipped = tuple(entry.name for entry in chosen.entries if entry.name not in used)
    return replace(merged, skipped=skipped, problems=survey(chosen).problems())


@takes_any_name
def merge_calibration(
    workspace: Workspace, model: str, parts: StrPath | Iterable[StrPath] = ()
) -> CalibrationArtifact:
    """Shards -> ``calibration.json``; without ``parts``, all shards of the workspace.

    Raises:
        ClipdeployError: a shard is missing, damaged, or of another run.
    """
    parts = as_paths(parts)
    found = parts or sorted(workspace.folder(model).glob("calibration.*-of-*.json"))
    table = merge_tables([load_table(path) for path in found])
    graph, _ = workspace.source(model)
    if table.source_graph != sha256_file(graph):
        raise ArtifactError(
            f"the shards were not made from {graph}", hint="calibrate them again from this graph"
        )
    check_images(table)
    path = workspace.calibration(model)
    return CalibrationArtifact(path, save_table(table, path), (), changed=True)


def _has_all(table: CalibrationTable, wanted: Sequence[CalibrationImageRecord]) -> bool:
    """Whether a table is of these images, and knows their pixels, by which copies are found."""
    return table.images == wanted and all(image.decoded for image in table.images)


def _records(images: ImageFolder) -> tuple[CalibrationImageRecord, ...]:
    reader = images.reader()
    try:
        return tuple(
            CalibrationImageRecord(entry.name, hashlib.sha256(reader.read(entry.name)).hexdigest())
            for entry in images.entries
        )
    finally:
        reader.close()
