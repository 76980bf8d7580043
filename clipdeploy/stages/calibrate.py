"""Collects activation statistics on calibration images, in shards or in one run that resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from rich.console import Group
from rich.text import Text

from calibration.collect import CalibrationImage, CollectConfig, collect
from calibration.images import check_images, image_findings
from calibration.probing import probe
from calibration.table import (
    CalibrationImageRecord,
    CalibrationTable,
    load_table,
    merge_tables,
    save_table,
)
from clipdeploy.core.display import Renderable, Shown, facts
from clipdeploy.core.errors import ArtifactError, DatasetError, UsageError
from clipdeploy.core.files import file_errors
from clipdeploy.core.locks import remove_abandoned_lock, sole_writer
from clipdeploy.core.passport import Passport
from clipdeploy.core.paths import StrPath, as_path, as_paths
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.core.spans import IMAGES, SEED, THREADS, check_numbers, check_shard
from clipdeploy.imaging import ImageFolder, Skipped, iter_crops, open_images, select, survey
from clipdeploy.imaging.fingerprints import first_copies
from clipdeploy.imaging.preprocess import short_edge
from clipdeploy.models import cards
from clipdeploy.models.cards import takes_any_name
from clipdeploy.stages.cluster import ClusterConfig, Shard, ShardJob, shards_on_cluster
from clipdeploy.workspace.folder import Workspace
from exporters.headers import graph_sha256
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

# With fewer images, the ranges may not represent the data.
FEW_IMAGES = 128
_DEFAULT_IMAGES = 512
# Minimum number of images in a shard: with fewer, loading the graph takes longer than running it.
_SHARD_IMAGES = 8


@dataclass(frozen=True)
class CalibrateConfig:
    """Which images are observed, and how.

    ``images`` is the number of images, None for all up to 512, and ``seed`` chooses them.
    ``shard`` (i, n) observes only part i of n, for :func:`merge_calibration`.  ``threads`` are CPU
    threads, 0 for ONNX Runtime's own choice.

    Raises:
        UsageError: a number or the shard is out of range.
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
    """The table of statistics, its path, and the unreadable images that were skipped.

    ``problems`` has a sentence for each finding about the files, such as files that are not images.
    ``changed`` is False if an existing table was reused.
    """

    path: Path
    table: CalibrationTable
    skipped: tuple[str, ...]
    changed: bool
    problems: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was found about the calibration, see :mod:`calibration.images` and others."""
        return tuple(finding.sentence for finding in self.table.findings)

    def notes(self) -> tuple[str, ...]:
        """All findings about the images, as sentences."""
        skipped = (f"skipped, unreadable: {name}" for name in self.skipped)
        return (*self.problems, *skipped, *self.warnings)

    def __rich__(self) -> Renderable:
        rows = [
            ("calibration", f"{self.path}: {len(self.table.images)} images"),
            ("made", "now" if self.changed else "earlier; nothing has changed since"),
            *(("unusual", warning) for warning in self.warnings),
            *(("skipped, unreadable", name) for name in self.skipped),
        ]
        return Group(facts(rows), Text(""), self.table)


def _calibration_images(
    images: ImageFolder,
    passport: Passport,
    skipped: Skipped | None,
    edges: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[CalibrationImage]:
    spec = passport.preprocess
    for crop in iter_crops(images, spec, skipped=skipped):
        name = crop.entry.name
        image = Samples(crop.pixels[None], spec).as_input(passport.input)
        yield CalibrationImage(
            name, crop.sha256, image, *crop.fingerprint, crop.pixels, edges.get(name, 0)
        )


def choose_images(data: Path, config: CalibrateConfig) -> ImageFolder:
    """The images of ``data`` that ``config`` chooses.

    Raises:
        DatasetError: there are too few images, or they are all of one class.
    """
    everything = open_images(data)
    folders = {entry.name.rpartition("/")[0] for entry in everything.entries}
    if len(folders) == 1 and "" not in folders and len(everything.entries) > 1:
        raise DatasetError(
            f"all images of {data} are of one class, {folders.pop()}",
            hint="calibrate with images of all classes",
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
    """Collect activation statistics on the images of ``data`` and save them as a table.

    Continues an interrupted run.  The table is saved to ``keep``, by default in the workspace.  A
    ``cluster`` observes the images in shards and gives the same table, bit for bit.

    Raises:
        ClipdeployError: see :mod:`clipdeploy.core.errors`.
    """
    data = Path(data)
    keep = as_path(keep)
    if cluster is not None and config.shard:
        raise UsageError("a cluster makes the shards itself", hint="leave out --shard or --ray")
    graph, passport = workspace.source(model)
    chosen = choose_images(data, config)
    problems = survey(chosen).problems()
    path = keep or workspace.calibration(model, config.shard)
    wanted = _records(chosen)
    if not force and path.exists():
        table = load_table(path)
        if table.source_graph == graph_sha256(graph) and _has_all(table, wanted):
            remove_abandoned_lock(path)
            return CalibrationArtifact(path, table, (), changed=False, problems=problems)
    if cluster is not None:
        job = _cluster_job(workspace, model, data, config, len(chosen.entries))
        with shards_on_cluster(cluster, job, force=force, progress=progress) as parts:
            return _with_skipped(merge_calibration(workspace, model, parts), chosen)
    skipped = Skipped() if config.skip_unreadable else None

    def rest(done: frozenset[CalibrationImageRecord]) -> Iterator[CalibrationImage]:
        names = {record.name for record in done}
        left = tuple(entry for entry in chosen.entries if entry.name not in names)
        edges = {record.name: record.edge for record in wanted}
        return _calibration_images(ImageFolder(chosen.root, left), passport, skipped, edges)

    unfinished = path.with_suffix(".partial")
    with sole_writer(path, "clipdeploy calibrate"):
        if force:
            with file_errors("remove", unfinished):
                unfinished.unlink(missing_ok=True)
        settings = CollectConfig(unfinished, shard=config.shard, threads=config.threads)
        table = collect(graph, rest, wanted, settings, progress)
        if config.shard is None:
            table = _monitored(table, graph, passport, config.threads, progress)
        table = save_table(table, path)
        with file_errors("remove", unfinished):
            unfinished.unlink(missing_ok=True)
    names = tuple(skipped.names if skipped else ())
    return CalibrationArtifact(path, table, names, changed=True, problems=problems)


@takes_any_name
def is_calibrated(workspace: Workspace, model: str) -> bool:
    """Whether the workspace has a table for its present FP32 graph, from any images.

    Raises:
        ClipdeployError: the graph or the table cannot be read.
    """
    graph, _ = workspace.source(model)
    path = workspace.calibration(model)
    return path.exists() and load_table(path).source_graph == graph_sha256(graph)


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
    """Join shards into one table; without ``parts``, all shards in the workspace.

    Raises:
        ClipdeployError: a shard is missing, damaged, or belongs to another run.
    """
    parts = as_paths(parts)
    found = parts or sorted(workspace.folder(model).glob("calibration.*-of-*.json"))
    table = merge_tables([load_table(path) for path in found])
    graph, passport = workspace.source(model)
    if table.source_graph != graph_sha256(graph):
        raise ArtifactError(
            f"the shards were not made from {graph}", hint="calibrate them again from this graph"
        )
    table = _monitored(table, graph, passport, 0, SILENT)
    path = workspace.calibration(model)
    return CalibrationArtifact(path, save_table(table, path), (), changed=True)


def _has_all(table: CalibrationTable, wanted: Sequence[CalibrationImageRecord]) -> bool:
    """Whether a table is of these images and they were checked."""
    return table.monitored and table.images == wanted


def _records(images: ImageFolder) -> tuple[CalibrationImageRecord, ...]:
    reader = images.reader()
    try:
        return tuple(_record(entry.name, reader.read(entry.name)) for entry in images.entries)
    finally:
        reader.close()


def _record(name: str, data: bytes) -> CalibrationImageRecord:
    return CalibrationImageRecord(name, hashlib.sha256(data).hexdigest(), edge=short_edge(data))


def _monitored(
    table: CalibrationTable, graph: Path, passport: Passport, threads: int, progress: Progress
) -> CalibrationTable:
    """``table`` of a whole run, with all findings about its images.

    Raises:
        CalibrationError: the images show nothing, or the same.
        GraphError: the graph cannot be run.
    """
    prints = [image for image in table.images if image.decoded]
    thumbnails = np.frombuffer(b"".join(image.thumbnail for image in prints), np.uint8)
    _, first = first_copies([image.pixels for image in prints], thumbnails)
    different = len(set(first.tolist())) + len(table.images) - len(prints)
    check_images(table, different)
    with progress.task("check the images"):
        colour = passport.classes == len(cards.imagenet_classes())
        trained = passport.weights.kind != "random"
        found = image_findings(table, different, FEW_IMAGES, colour=colour)
        found += probe(graph, passport, table, trained=trained, threads=threads)
    return replace(table, findings=found)
